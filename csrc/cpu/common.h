// What the CPU kernels share: dtype dispatch, scratch memory, tasks on threads, rows of floats.
#pragma once

#include <ATen/Parallel.h>

#include "gemm.h"
#include "memory.h"
#include "vec.h"

namespace fastnn {
inline namespace CPU_CAPABILITY {

// Work below which a second thread costs more than it brings (about 10 us), in multiply-adds.
inline constexpr int64_t kGrain = 1 << 19;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls f(begin, end) on ranges of the tasks, on threads only where a thread gets kGrain of work.
template <typename F>
inline void parallel_ranges(int64_t tasks, int64_t work_each, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, work_each));
  at::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    f(begin, end);
    release_tiles();
  });
}

// The same, task by task.
template <typename F>
inline void parallel_tasks(int64_t tasks, int64_t work_each, const F& f) {
  parallel_ranges(tasks, work_each, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) f(task);
  });
}

// Calls f with a value of the C++ type of a checked float dtype.
template <typename F>
inline void visit_float(at::ScalarType dtype, const F& f) {
  switch (dtype) {
    case at::kFloat:
      return f(float{});
    case at::kBFloat16:
      return f(at::BFloat16{});
    case at::kHalf:
      return f(at::Half{});
    default:
      return f(double{});
  }
}

template <typename T, typename A>
inline void store_row(T* out, const A* x, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const int64_t width = std::min(kLanes<T>, n - i);
    store_vec(out + i, AccVec<T>::loadu(x + i, width), width);
  }
}

template <typename T, typename A>
inline void load_row(A* x, const T* in, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const int64_t width = std::min(kLanes<T>, n - i);
    load_vec(in + i, width).store(x + i, width);
  }
}

template <typename T>
inline void add_row(accumulate_t<T>* x, const T* in, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const int64_t width = std::min(kLanes<T>, n - i);
    (AccVec<T>::loadu(x + i, width) + load_vec(in + i, width)).store(x + i, width);
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace fastnn
