// A warp group's asynchronous product (sm_90a): D[64, N] += A[64, 16] B[16, N]; the registers'
// share between warp groups; matrices from fragments to memory.
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

// D (+)= A B over 16 of K, for D of 64 x 48, 64, 80, 128 or 256: N / 2 registers a thread, placed
// as fragment_row and fragment_column say. B is in shared memory, A too, or in registers: those of
// 16 columns of an accumulator, packed in pairs. kAcross: the operand is stored across K.
// `accumulate` false overwrites D. D and A's registers are not to be touched before the group is
// waited for.
#define FASTNN_D8(i)                                                                          \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define FASTNN_D32_FROM(i) FASTNN_D8(i), FASTNN_D8(i + 8), FASTNN_D8(i + 16), FASTNN_D8(i + 24)
#define FASTNN_D24 FASTNN_D8(0), FASTNN_D8(8), FASTNN_D8(16)
#define FASTNN_D32 FASTNN_D32_FROM(0)
#define FASTNN_D40 FASTNN_D32, FASTNN_D8(32)
#define FASTNN_D64 FASTNN_D32, FASTNN_D32_FROM(32)
#define FASTNN_D128 FASTNN_D64, FASTNN_D32_FROM(64), FASTNN_D32_FROM(96)
#define FASTNN_NAMES24                                                        \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16" \
  ", %17, %18, %19, %20, %21, %22, %23"
#define FASTNN_NAMES32 FASTNN_NAMES24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define FASTNN_NAMES40 FASTNN_NAMES32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define FASTNN_NAMES64                                                          \
  FASTNN_NAMES40                                                                \
  ", %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54" \
  ", %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FASTNN_NAMES128                                                         \
  FASTNN_NAMES64                                                                \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78" \
  ", %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93" \
  ", %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106"    \
  ", %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118"    \
  ", %119, %120, %121, %122, %123, %124, %125, %126, %127"
// p to v: the numbers of the operands after D's.
#define FASTNN_WGMMA(columns, type, names, accumulate, rest)                                  \
  "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %" #accumulate                          \
  ", 0;\n"                                                                                    \
  "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" names "}, " rest \
  ";\n}"
#define FASTNN_FROM_SHARED(columns, type, count, p, q, r, s, t)                  \
  asm volatile(FASTNN_WGMMA(columns, type, FASTNN_NAMES##count, r,               \
                            "%" #p ", %" #q ", accumulate, 1, 1, %" #s ", %" #t) \
               : FASTNN_D##count                                                 \
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kAAcross), "n"(kBAcross))
#define FASTNN_FROM_REGISTERS(columns, type, count, p, q, r, s, t, u, v)                       \
  asm volatile(                                                                                \
      FASTNN_WGMMA(columns, type, FASTNN_NAMES##count, u,                                      \
                   "{%" #p ", %" #q ", %" #r ", %" #s "}, %" #t ", accumulate, 1, 1, %" #v)    \
      : FASTNN_D##count                                                                        \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)), \
        "n"(kBAcross))
#define FASTNN_PRODUCTS(columns, count, p, q, r, s, t, u, v)                             \
  template <typename T, bool kAAcross, bool kBAcross>                                    \
  __device__ __forceinline__ void wgmma(float (&d)[columns / 2], uint64_t a, uint64_t b, \
                                        bool accumulate) {                               \
    if constexpr (std::is_same_v<T, __half>) {                                           \
      FASTNN_FROM_SHARED(columns, "f16", count, p, q, r, s, t);                          \
    } else {                                                                             \
      FASTNN_FROM_SHARED(columns, "bf16", count, p, q, r, s, t);                         \
    }                                                                                    \
  }                                                                                      \
  template <typename T, bool kBAcross>                                                   \
  __device__ __forceinline__ void wgmma(float (&d)[columns / 2], const uint32_t (&a)[4], \
                                        uint64_t b, bool accumulate) {                   \
    if constexpr (std::is_same_v<T, __half>) {                                           \
      FASTNN_FROM_REGISTERS(columns, "f16", count, p, q, r, s, t, u, v);                 \
    } else {                                                                             \
      FASTNN_FROM_REGISTERS(columns, "bf16", count, p, q, r, s, t, u, v);                \
    }                                                                                    \
  }
FASTNN_PRODUCTS(48, 24, 24, 25, 26, 27, 28, 29, 30)
FASTNN_PRODUCTS(64, 32, 32, 33, 34, 35, 36, 37, 38)
FASTNN_PRODUCTS(80, 40, 40, 41, 42, 43, 44, 45, 46)
FASTNN_PRODUCTS(128, 64, 64, 65, 66, 67, 68, 69, 70)
FASTNN_PRODUCTS(256, 128, 128, 129, 130, 131, 132, 133, 134)
#undef FASTNN_PRODUCTS
#undef FASTNN_FROM_REGISTERS
#undef FASTNN_FROM_SHARED
#undef FASTNN_WGMMA
#undef FASTNN_NAMES128
#undef FASTNN_NAMES64
#undef FASTNN_NAMES40
#undef FASTNN_NAMES32
#undef FASTNN_NAMES24
#undef FASTNN_D128
#undef FASTNN_D64
#undef FASTNN_D40
#undef FASTNN_D32
#undef FASTNN_D24
#undef FASTNN_D32_FROM
#undef FASTNN_D8

// What computes d stays before this point, what reads it behind: the compiler knows of no wait.
template <int kCount>
__device__ __forceinline__ void pin(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
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
