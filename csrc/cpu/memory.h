// Fresh memory of the CPU kernels. A page touched for the first time costs the kernel's zeroing and
// a fault per 4 KB: 128 MB written afresh took 45 ms by two threads, 5 ms when written again, and
// 12 ms on huge pages. So large buffers ask for huge pages, as torch does under
// THP_MEM_ALLOC_ENABLE=1; only pages that lie inside the buffer, so that none of it grows.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>

#include <cstdint>
#include <cstdlib>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastnn {
inline namespace CPU_CAPABILITY {

// Results from here on are written past the caches, which would not hold them until they are read,
// and would first have to read what is overwritten: a quarter of the traffic of a fresh result.
inline constexpr size_t kStreamBytes = size_t{16} << 20;

inline constexpr size_t kHugePage = size_t{1} << 21;

inline void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__)
  const auto address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (address + bytes) / kHugePage * kHugePage;
  // Advice: where the system refuses it, the pages stay small.
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

#if defined(__linux__)
// Memory that begins on a huge page: else the first and the last 2 MB lie on small ones, and 32 MB
// written afresh take 2.8 ms instead of 2.3.
class HugePageAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* data = nullptr;
    TORCH_CHECK_WITH(OutOfMemoryError, posix_memalign(&data, kHugePage, bytes) == 0,
                     "fastnn: can't allocate ", bytes, " bytes");
    return {data, data, &std::free, c10::DeviceType::CPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* dest, const void* src, std::size_t count) const override {
    default_copy_data(dest, src, count);
  }
};
#endif

// at::empty for results and workspaces that may be large.
inline at::Tensor empty_tensor(at::IntArrayRef sizes, const at::TensorOptions& options) {
#if defined(__linux__)
  if (c10::multiply_integers(sizes) * options.dtype().itemsize() >= kStreamBytes) {
    static HugePageAllocator allocator;
    at::Tensor tensor =
        at::detail::empty_generic(sizes, &allocator, c10::DispatchKeySet(c10::DispatchKey::CPU),
                                  options.dtype().toScalarType(), std::nullopt);
    advise_huge_pages(tensor.mutable_data_ptr(), tensor.nbytes());
    return tensor;
  }
#endif
  at::Tensor tensor = at::empty(sizes, options);
  advise_huge_pages(tensor.mutable_data_ptr(), tensor.nbytes());
  return tensor;
}

// Uninitialized scratch, 64-byte aligned, from torch's allocator.
template <typename E>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t n) {
    if (n <= 0) return;
    data_ = c10::GetCPUAllocator()->allocate(n * sizeof(E));
    advise_huge_pages(data_.get(), n * sizeof(E));
  }
  E* get() const { return static_cast<E*>(data_.get()); }
  explicit operator bool() const { return static_cast<bool>(data_); }

 private:
  c10::DataPtr data_;
};

}  // namespace CPU_CAPABILITY
}  // namespace fastnn
