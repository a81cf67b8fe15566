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

// Reads data that no thread of the kernel writes, and that no other thread reads: it bypasses L1.
template <typename T>
__device__ __forceinline__ Packet<T> load_packet(const T* pointer) {
  Packet<T> packet;
#ifdef __CUDA_ARCH__
  uint4 words;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
      : "l"(__cvta_generic_to_global(pointer)));
  *reinterpret_cast<uint4*>(&packet) = words;
#else
  packet = *reinterpret_cast<const Packet<T>*>(pointer);
#endif
  return packet;
}

template <typename T>
__device__ __forceinline__ void store_packet(T* pointer, const Packet<T>& packet) {
  *reinterpret_cast<uint4*>(pointer) = *reinterpret_cast<const uint4*>(&packet);
}

}  // namespace fastnn
