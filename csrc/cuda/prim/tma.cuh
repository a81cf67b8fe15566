// The copy engine (sm_90): boxes of tensors in global memory, to and from shared memory.
#pragma once

#include <cuda.h>

#include "copy.cuh"
#include "mbarrier.cuh"

namespace fastnn {

using TensorMap = CUtensorMap;

// A view [parts, rows, columns], or [batches, parts, rows, columns], of half types or float, of
// which boxes [1, box_rows, 128 bytes] are copied, swizzled in shared memory; what lies outside of
// it reads as 0 and is not written. Strides in elements; they and the address have to be multiples
// of 16 bytes.
struct TensorView {
  const void* data;
  int64_t columns, rows, parts, row_stride, part_stride;
  int box_rows;
  int64_t batches = 0, batch_stride = 0;  // 0 batches: no such dimension, nor in a box's place
};

// The entry point is asked of the runtime: nothing is linked to the driver's library.
inline cudaError_t make_tensor_map(const TensorView& view, Storage storage, TensorMap* map) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry,
                                                               12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess
               ? reinterpret_cast<Encode>(entry)
               : nullptr;
  }();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint32_t size = storage == Storage::kFloat32 ? 4 : 2;
  const cuuint64_t sizes[4] = {
      static_cast<cuuint64_t>(view.columns), static_cast<cuuint64_t>(view.rows),
      static_cast<cuuint64_t>(view.parts), static_cast<cuuint64_t>(view.batches)};
  const cuuint64_t strides[3] = {static_cast<cuuint64_t>(view.row_stride) * size,
                                 static_cast<cuuint64_t>(view.part_stride) * size,
                                 static_cast<cuuint64_t>(view.batch_stride) * size};
  const cuuint32_t box[4] = {128 / size, static_cast<cuuint32_t>(view.box_rows), 1, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  const cuuint32_t rank = view.batches > 0 ? 4 : 3;
  const CUtensorMapDataType type = storage == Storage::kFloat32 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                   : storage == Storage::kFloat16
                                       ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                       : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult result =
      encode(map, type, rank, const_cast<void*>(view.data), sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Copies the box at (part, row, column); its bytes count at `barrier`.
__device__ __forceinline__ void load_box(void* shared, const TensorMap& map, int column, int row,
                                         int part, Mbarrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(column), "r"(row), "r"(part), "r"(shared_address(barrier))
      : "memory");
}

// The box at (batch, part, row, column).
__device__ __forceinline__ void load_box(void* shared, const TensorMap& map, int column, int row,
                                         int part, int batch, Mbarrier* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(column), "r"(row), "r"(part), "r"(batch), "r"(shared_address(barrier))
      : "memory");
}

// A box at (part, row, column) into every block of `blocks` (a bit for each of the cluster), at
// their barriers.
__device__ __forceinline__ void load_box_multicast(void* shared, const TensorMap& map, int column,
                                                   int row, int part, Mbarrier* barrier,
                                                   uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(shared_address(shared)),
      "l"(&map), "r"(column), "r"(row), "r"(part), "r"(shared_address(barrier)), "h"(blocks)
      : "memory");
}

// Copies a box back. The threads that wrote it have called fence_async_proxy before a barrier.
__device__ __forceinline__ void store_box(const TensorMap& map, int column, int row, int part,
                                          const void* shared) {
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3}], [%4];" ::"l"(
          &map),
      "r"(column), "r"(row), "r"(part), "r"(shared_address(shared))
      : "memory");
}

__device__ __forceinline__ void store_box(const TensorMap& map, int column, int row, int part,
                                          int batch, const void* shared) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::
          "l"(&map),
      "r"(column), "r"(row), "r"(part), "r"(batch), "r"(shared_address(shared))
      : "memory");
}

// The same of floats, added to those in memory (there, and rounded as any addition).
__device__ __forceinline__ void add_box(const TensorMap& map, int column, int row, int part,
                                        const void* shared) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group [%0, {%1, %2, %3}],"
      " [%4];" ::"l"(&map),
      "r"(column), "r"(row), "r"(part), "r"(shared_address(shared))
      : "memory");
}

__device__ __forceinline__ void store_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Until this thread's stores have read their shared memory.
__device__ __forceinline__ void store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// Orders this thread's accesses to shared memory before those of the copy engine and wgmma.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace fastnn
