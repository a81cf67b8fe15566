// Moving elements between memory and float registers: 16-byte packets, single elements, and the
// conversions between the storage types and float.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace fastnn {

// Storage types that are chosen at run time, where a template parameter is not worth a kernel.
enum class Storage : int { kFloat32, kFloat16, kBFloat16, kFloat64 };

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// `data` advanced by `count` elements.
template <typename Void>
__device__ __forceinline__ Void* offset_by(Void* data, int64_t count, Storage storage) {
  using Byte = std::conditional_t<std::is_const_v<Void>, const char, char>;
  const int size = storage == Storage::kFloat64 ? 8 : storage == Storage::kFloat32 ? 4 : 2;
  return static_cast<Byte*>(data) + size * count;
}

__device__ __forceinline__ float load_as_float(const void* data, int64_t index, Storage storage) {
  switch (storage) {
    case Storage::kFloat16:
      return to_float(static_cast<const __half*>(data)[index]);
    case Storage::kBFloat16:
      return to_float(static_cast<const __nv_bfloat16*>(data)[index]);
    case Storage::kFloat64:
      return static_cast<float>(static_cast<const double*>(data)[index]);
    default:
      return static_cast<const float*>(data)[index];
  }
}

__device__ __forceinline__ void store_from_float(void* data, int64_t index, Storage storage,
                                                 float x) {
  switch (storage) {
    case Storage::kFloat16:
      static_cast<__half*>(data)[index] = from_float<__half>(x);
      break;
    case Storage::kBFloat16:
      static_cast<__nv_bfloat16*>(data)[index] = from_float<__nv_bfloat16>(x);
      break;
    case Storage::kFloat64:
      static_cast<double*>(data)[index] = x;
      break;
    default:
      static_cast<float*>(data)[index] = x;
  }
}

// One 16-byte load or store: the widest, and four of them in flight per thread fill the memory
// system at half the usual occupancy.
template <typename T>
struct alignas(16) Packet {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

// Elements from `pointer` up to the next 16-byte boundary.
template <typename T>
__host__ __device__ __forceinline__ int elements_to_alignment(const T* pointer) {
  const auto past = static_cast<int>(reinterpret_cast<uintptr_t>(pointer) & 15);
  return past == 0 ? 0 : (16 - past) / static_cast<int>(sizeof(T));
}

// Reads data that no other thread of the kernel reads or writes: it bypasses L1.
template <typename T>
__device__ __forceinline__ Packet<T> load_packet(const T* pointer) {
  Packet<T> packet;
#ifdef __CUDA_ARCH__
  uint4 words;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "l"(__cvta_generic_to_global(pointer)));
  *reinterpret_cast<uint4*>(&packet) = words;
#else
  packet = *reinterpret_cast<const Packet<T>*>(pointer);
#endif
  return packet;
}

// The half types two at a time, as the hardware converts and compares them.
template <typename T>
using PairOf = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;

template <typename T>
__device__ __forceinline__ PairOf<T> pair_of(float x, float y) {
  if constexpr (std::is_same_v<T, __half>) {
    return __floats2half2_rn(x, y);
  } else {
    return __floats2bfloat162_rn(x, y);
  }
}

// Two floats rounded, the first in the low half: a word of an mma fragment.
template <typename T>
__device__ __forceinline__ uint32_t pack_pair(float x, float y) {
  const PairOf<T> pair = pair_of<T>(x, y);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

template <typename T, int kCount>
__device__ __forceinline__ void pack(Packet<T>& packet, int begin, const float (&x)[kCount]) {
  if constexpr (sizeof(T) == 2 && kCount % 2 == 0) {
#pragma unroll
    for (int k = 0; k < kCount; k += 2) {
      reinterpret_cast<PairOf<T>*>(&packet)[(begin + k) / 2] = pair_of<T>(x[k], x[k + 1]);
    }
  } else {
#pragma unroll
    for (int k = 0; k < kCount; ++k) packet.values[begin + k] = from_float<T>(x[k]);
  }
}

// The largest element of some packets; NaN only if they have nothing else.
template <typename T, int kPackets>
__device__ __forceinline__ float largest(const Packet<T> (&packets)[kPackets]) {
  if constexpr (sizeof(T) == 4) {
    float max = packets[0].values[0];
#pragma unroll
    for (int i = 1; i < kPackets * Packet<T>::kSize; ++i) {
      max = fmaxf(max, packets[i / Packet<T>::kSize].values[i % Packet<T>::kSize]);
    }
    return max;
  } else {
    using Pair = PairOf<T>;
    constexpr int kPairs = Packet<T>::kSize / 2;
    Pair max = reinterpret_cast<const Pair*>(&packets[0])[0];
#pragma unroll
    for (int i = 1; i < kPackets * kPairs; ++i) {
      max = __hmax2(max, reinterpret_cast<const Pair*>(&packets[i / kPairs])[i % kPairs]);
    }
    return fmaxf(to_float(max.x), to_float(max.y));
  }
}

template <typename T>
__device__ __forceinline__ void store_packet(T* pointer, const Packet<T>& packet) {
  *reinterpret_cast<uint4*>(pointer) = *reinterpret_cast<const uint4*>(&packet);
}

}  // namespace fastnn
