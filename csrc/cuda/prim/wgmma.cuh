// A warp group's asynchronous product (sm_90a): D[64, 256] += A[64, 16] B[16, 256], both operands
// in shared memory; the registers' share between warp groups; matrices from fragments to memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "shared.cuh"
#include "wgmma_layout.cuh"

namespace fastnn {

// Kernels of other targets are empty: the launcher does not choose them.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kHasWgmma = true;
#else
constexpr bool kHasWgmma = false;
#endif

// Before a warp group's first product, and after its threads touched the accumulators.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most kPending of the warp group's committed groups are under way.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// kAcross: the operand is stored across K. `accumulate` false overwrites D.
template <typename T, bool kAAcross, bool kBAcross>
__device__ __forceinline__ void wgmma_m64n256k16(float (&d)[128], uint64_t a, uint64_t b,
                                                 bool accumulate) {
#define FASTNN_FOUR(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FASTNN_SIXTEEN(i) \
  FASTNN_FOUR(i), FASTNN_FOUR(i + 4), FASTNN_FOUR(i + 8), FASTNN_FOUR(i + 12)
#define FASTNN_WGMMA(type)                                                                         \
  asm volatile(                                                                                    \
      "{\n"                                                                                        \
      ".reg .pred accumulate;\n"                                                                   \
      "setp.ne.b32 accumulate, %130, 0;\n"                                                         \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type                                 \
      " {"                                                                                         \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                     \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "           \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "           \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "           \
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "           \
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "           \
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, "     \
      "%111, "                                                                                     \
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, " \
      "%127"                                                                                       \
      "}, %128, %129, accumulate, 1, 1, %131, %132;\n"                                             \
      "}"                                                                                          \
      : FASTNN_SIXTEEN(0), FASTNN_SIXTEEN(16), FASTNN_SIXTEEN(32), FASTNN_SIXTEEN(48),             \
        FASTNN_SIXTEEN(64), FASTNN_SIXTEEN(80), FASTNN_SIXTEEN(96), FASTNN_SIXTEEN(112)            \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kAAcross), "n"(kBAcross))
  if constexpr (std::is_same_v<T, __half>) {
    FASTNN_WGMMA("f16");
  } else {
    FASTNN_WGMMA("bf16");
  }
#undef FASTNN_WGMMA
#undef FASTNN_SIXTEEN
#undef FASTNN_FOUR
}

// A warp group gives registers back, or waits for them; kRegisters a thread from here on.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Lane l gives the address of row l % 8 of matrix l / 8, and two elements at (l / 4, 2 (l % 4)..)
// of each of the four matrices.
__device__ __forceinline__ void store_matrices(void* row, const uint32_t (&r)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
      "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
      : "memory");
}

}  // namespace fastnn
