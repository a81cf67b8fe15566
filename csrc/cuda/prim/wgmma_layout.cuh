// Where things are for a warp group's product: the 128-byte swizzle, matrix descriptors, fragments.
// Plain arithmetic, for the host too.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fastnn {

// A row of a swizzled tile: 64 elements of 2 bytes. Eight rows are one pattern of 1024 bytes, in
// which the 16-byte chunk c of row r lies at chunk c ^ r: any eight rows' (or chunks') accesses
// meet every bank once. Tiles begin at multiples of 1024 bytes.
constexpr int kSwizzleRow = 128;
constexpr int kSwizzlePattern = 1024;
constexpr int kSwizzleElements = 64;

__host__ __device__ __forceinline__ constexpr uint32_t swizzled(uint32_t offset) {
  return offset ^ ((offset >> 3) & 0x70);
}

// A matrix in shared memory with the 128-byte swizzle; offsets in bytes.
//   Stored along K (64 of K a row): `pattern` is from one eight rows to the next; `block` is
//   unused. Stored across K (64 of M or N a row, a row per k): `pattern` is from one eight k to the
//   next, `block` from one 64 of M or N to the next.
__host__ __device__ __forceinline__ constexpr uint64_t matrix_descriptor(uint32_t address,
                                                                         uint32_t block,
                                                                         uint32_t pattern) {
  const auto field = [](uint32_t bytes) { return uint64_t{(bytes & 0x3ffff) >> 4}; };
  return field(address) | field(block) << 16 | field(pattern) << 32 | uint64_t{1} << 62;
}

// A descriptor moved on by so many bytes.
__host__ __device__ __forceinline__ constexpr uint64_t advanced(uint64_t descriptor,
                                                                uint32_t bytes) {
  return descriptor + (bytes >> 4);
}

// Accumulator i of thread `thread` of a warp group, in its 64 x N product.
__host__ __device__ __forceinline__ constexpr int fragment_row(int thread, int i) {
  return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
}
__host__ __device__ __forceinline__ constexpr int fragment_column(int thread, int i) {
  return i / 4 * 8 + thread % 4 * 2 + i % 2;
}

}  // namespace fastnn
