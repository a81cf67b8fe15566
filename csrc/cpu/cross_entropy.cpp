// Softmax cross-entropy of logits (N, C, d1, ...) with class indices or probabilities; the row
// mathematics is in cross_entropy.h.
//   Forward: one read of the logits, blocks of 2048 classes, merged online.
//   Backward: one read, one write; row statistics again only for probabilities and for |lse| so
//   large that float cannot hold it to the output's precision.
//   Work: rows over threads; with fewer rows than threads, (row, block) pairs over threads.
//   Logits whose classes are not contiguous go through tiles of 16 rows, transposed into L1.
//   Memory: O(rows). Sums in float (double for double); the reduction over rows in double.
#include "cross_entropy.h"

#include <ATen/Dispatch.h>

#include "registry.h"

namespace fastnn {
inline namespace CPU_CAPABILITY {
namespace {

constexpr int64_t kStrip = 16;  // rows of a transposed tile
constexpr int64_t kTileClasses = 256;

// Where row r = (n, i) of logits (N, C, inner) lies: base(r) + c * stride_c.
template <typename T>
struct Matrix {
  T* data = nullptr;
  int64_t stride_n = 0, stride_c = 0, stride_i = 0, inner = 1;

  T* row(int64_t r) const {
    return inner == 1 ? data + r * stride_n
                      : data + (r / inner) * stride_n + (r % inner) * stride_i;
  }
  bool rows_are_contiguous() const { return stride_c == 1; }
};

// (N, C, inner) view of logits-shaped tensors, one-dimensional ones being a single row.
at::Tensor three_dimensional(const at::Tensor& x) {
  if (x.dim() == 1) return x.unsqueeze(0).unsqueeze(2);
  if (x.dim() == 2) return x.unsqueeze(2);
  return x.flatten(2);
}

template <typename T, typename Element>
Matrix<T> matrix_of(const at::Tensor& x, Element* data) {
  const bool single_class = x.size(1) == 1;
  return {data, x.stride(0), single_class ? 1 : x.stride(1), x.stride(2), x.size(2)};
}

int64_t grain_of(int64_t classes) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(classes, 1)); }

// The tile's n classes of `rows` rows, as A, one row after the other. The rows may be anywhere.
template <typename T, typename A>
void gather_tile(const Matrix<const T>& m, int64_t first_row, int64_t rows, int64_t begin,
                 int64_t n, A* tile) {
  const T* base[kStrip];
  bool adjacent = true;
  for (int64_t r = 0; r < rows; ++r) {
    base[r] = m.row(first_row + r) + begin * m.stride_c;
    adjacent = adjacent && base[r] == base[0] + r;
  }
  for (int64_t c = 0; c < n; ++c) {
    if (adjacent) {
      const T* p = base[0] + c * m.stride_c;
      for (int64_t r = 0; r < rows; ++r) tile[r * kTileClasses + c] = static_cast<A>(p[r]);
    } else {
      for (int64_t r = 0; r < rows; ++r) {
        tile[r * kTileClasses + c] = static_cast<A>(base[r][c * m.stride_c]);
      }
    }
  }
}

template <typename T, typename A>
void scatter_tile(const Matrix<T>& m, int64_t first_row, int64_t rows, int64_t begin, int64_t n,
                  const A* tile) {
  for (int64_t r0 = 0; r0 < rows;) {
    // As many rows as lie side by side: those of one image.
    const int64_t row = first_row + r0;
    const int64_t run = m.inner == 1 ? 1 : std::min(rows - r0, m.inner - row % m.inner);
    T* base = m.row(row) + begin * m.stride_c;
    for (int64_t c = 0; c < n; ++c) {
      for (int64_t r = 0; r < run; ++r) {
        base[c * m.stride_c + r * m.stride_i] = static_cast<T>(tile[(r0 + r) * kTileClasses + c]);
      }
    }
    r0 += run;
  }
}

// Everything the kernels read, typed.
template <typename T>
struct Problem {
  using A = accumulate_t<T>;
  LossOptions<A> options;
  Matrix<const T> logits;
  int64_t rows = 0;
  const int64_t* labels = nullptr;
  Matrix<const T> narrow;  // probabilities in the logits' dtype,
  Matrix<const A> wide;    // or in the accumulation type
  bool contiguous = false;

  bool counted(int64_t r) const { return !labels || labels[r] != options.ignore_index; }
  int64_t label(int64_t r) const { return labels ? labels[r] : -1; }
  bool soft() const { return options.kind == Target::kSoft; }

  Probabilities<T> target_row(int64_t r) const {
    // The kernels only read them: Probabilities serves the gradient too.
    return {narrow.data ? const_cast<T*>(narrow.row(r)) : nullptr,
            wide.data ? const_cast<A*>(wide.row(r)) : nullptr};
  }
  void gather_target(int64_t first, int64_t count, int64_t begin, int64_t n, A* tile) const {
    if (narrow.data) gather_tile<T, A>(narrow, first, count, begin, n, tile);
    if (wide.data) gather_tile<A, A>(wide, first, count, begin, n, tile);
  }
  A label_logit(int64_t r) const {
    if (!labels || !counted(r)) return A(0);
    return capped(options, static_cast<A>(logits.row(r)[labels[r] * logits.stride_c]));
  }
};

// Statistics of up to kStrip rows whose classes are not contiguous.
template <Target kind, typename T, typename A = accumulate_t<T>>
void strip_stats(const Problem<T>& p, int64_t first, int64_t count, RowStats<A>* stats) {
  alignas(64) A tile[kStrip * kTileClasses];
  alignas(64) A target[kind == Target::kSoft ? kStrip * kTileClasses : 1];
  for (int64_t begin = 0; begin < p.options.classes; begin += kTileClasses) {
    const int64_t n = std::min(kTileClasses, p.options.classes - begin);
    gather_tile<T, A>(p.logits, first, count, begin, n, tile);
    if constexpr (kind == Target::kSoft) p.gather_target(first, count, begin, n, target);
    for (int64_t r = 0; r < count; ++r) {
      Probabilities<A> probabilities;
      if constexpr (kind == Target::kSoft) {
        probabilities.wide = target + r * kTileClasses - begin;
      }
      stats[r].merge(
          block_stats<kind>(p.options, tile + r * kTileClasses, begin, n, probabilities));
    }
  }
}

// Calls f(first, count, stats) for all rows, in strips.
template <Target kind, typename T, typename F>
void for_stats(const Problem<T>& p, const F& f) {
  using A = accumulate_t<T>;
  const int64_t classes = p.options.classes;
  const int64_t blocks = (classes + kBlock - 1) / kBlock;
  if (!p.contiguous) {
    at::parallel_for(0, (p.rows + kStrip - 1) / kStrip, std::max<int64_t>(1, grain_of(classes) / 4),
                     [&](int64_t begin, int64_t end) {
                       for (int64_t strip = begin; strip < end; ++strip) {
                         RowStats<A> stats[kStrip];
                         const int64_t first = strip * kStrip;
                         const int64_t count = std::min(kStrip, p.rows - first);
                         strip_stats<kind>(p, first, count, stats);
                         for (int64_t r = 0; r < count; ++r) f(first + r, stats[r]);
                       }
                     });
  } else if (p.rows < at::get_num_threads() && blocks >= 8) {
    std::vector<RowStats<A>> parts(p.rows * blocks);
    at::parallel_for(0, p.rows * blocks, 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t r = i / blocks, c = (i % blocks) * kBlock;
        parts[i] = block_stats<kind>(p.options, p.logits.row(r) + c, c,
                                     std::min(kBlock, classes - c), p.target_row(r));
      }
    });
    for (int64_t r = 0; r < p.rows; ++r) {
      RowStats<A> stats;
      for (int64_t b = 0; b < blocks; ++b) stats.merge(parts[r * blocks + b]);
      f(r, stats);
    }
  } else {
    at::parallel_for(0, p.rows, grain_of(classes), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        f(r, row_stats<kind>(p.options, p.logits.row(r), p.target_row(r)));
      }
    });
  }
}

template <Target kind, typename T, typename A = accumulate_t<T>>
void forward_rows(const Problem<T>& p, A* losses, A* lse) {
  for_stats<kind>(p, [&](int64_t r, const RowStats<A>& stats) {
    lse[r] = stats.lse();
    losses[r] = p.counted(r) ? row_loss(p.options, stats, p.label(r), p.label_logit(r)) : A(0);
  });
}

// |lse| up to which its rounding is below that of the gradient it is used for.
template <typename T>
constexpr double kExactLse = std::is_same_v<T, at::BFloat16> ? 4096.0
                             : std::is_same_v<T, at::Half>   ? 512.0
                                                             : 32.0;

template <typename T>
struct Gradients {
  Matrix<T> logits;
  Matrix<T> narrow;  // of the probabilities, as Problem
  Matrix<accumulate_t<T>> wide;
};

template <Target kind, typename T, typename A = accumulate_t<T>>
void strip_gradient(const Problem<T>& p, const RowGradient<A>* rows, int64_t first, int64_t count,
                    const Gradients<T>& out) {
  constexpr int64_t kSoftTile = kind == Target::kSoft ? kStrip * kTileClasses : 1;
  alignas(64) A tile[kStrip * kTileClasses];
  alignas(64) A target[kSoftTile];
  alignas(64) A grad_target[kSoftTile];
  const bool to_target = out.narrow.data || out.wide.data;
  for (int64_t begin = 0; begin < p.options.classes; begin += kTileClasses) {
    const int64_t n = std::min(kTileClasses, p.options.classes - begin);
    gather_tile<T, A>(p.logits, first, count, begin, n, tile);
    if constexpr (kind == Target::kSoft) p.gather_target(first, count, begin, n, target);
    for (int64_t r = 0; r < count; ++r) {
      Probabilities<A> probabilities, grads;
      if constexpr (kind == Target::kSoft) {
        probabilities.wide = target + r * kTileClasses - begin;
        if (to_target) grads.wide = grad_target + r * kTileClasses - begin;
      }
      A* row = tile + r * kTileClasses;
      block_gradient<kind>(p.options, rows[r], row, row, begin, n, probabilities, grads);
    }
    if (out.logits.data) scatter_tile(out.logits, first, count, begin, n, tile);
    if (out.narrow.data) scatter_tile(out.narrow, first, count, begin, n, grad_target);
    if (out.wide.data) scatter_tile(out.wide, first, count, begin, n, grad_target);
  }
}

template <Target kind, typename T, typename A = accumulate_t<T>>
void backward_rows(const Problem<T>& p, const RowGradients<A>& upstream, const A* lse,
                   const Gradients<T>& out) {
  const int64_t classes = p.options.classes;
  const auto g_of = [&](int64_t r) { return p.counted(r) ? upstream.of_loss(r) : A(0); };
  const auto from_lse = [&](int64_t r) {
    RowStats<A> stats;  // exp(z - lse) sums to 1
    stats.max = lse[r];
    stats.sum = A(1);
    return row_gradient(p.options, stats, p.label(r), g_of(r), upstream.of_lse(r));
  };
  const auto needs_stats = [&](int64_t r) {
    const bool used = g_of(r) != A(0) || upstream.of_lse(r) != A(0);
    return used && (kind == Target::kSoft || !(std::abs(lse[r]) <= A(kExactLse<T>)));
  };
  if (!p.contiguous || !out.logits.data) {
    at::parallel_for(
        0, (p.rows + kStrip - 1) / kStrip, std::max<int64_t>(1, grain_of(classes) / 4),
        [&](int64_t begin, int64_t end) {
          for (int64_t strip = begin; strip < end; ++strip) {
            const int64_t first = strip * kStrip;
            const int64_t count = std::min(kStrip, p.rows - first);
            RowGradient<A> rows[kStrip];
            bool exact = false;
            for (int64_t r = 0; r < count; ++r) {
              rows[r] = from_lse(first + r);
              exact = exact || needs_stats(first + r);
            }
            if (exact) {
              RowStats<A> stats[kStrip];
              strip_stats<kind>(p, first, count, stats);
              for (int64_t r = 0; r < count; ++r) {
                rows[r] = row_gradient(p.options, stats[r], p.label(first + r), g_of(first + r),
                                       upstream.of_lse(first + r));
              }
            }
            strip_gradient<kind>(p, rows, first, count, out);
          }
        });
    return;
  }
  const auto target_gradient_row = [&](int64_t r) {
    return Probabilities<T>{out.narrow.data ? out.narrow.row(r) : nullptr,
                            out.wide.data ? out.wide.row(r) : nullptr};
  };
  const auto write = [&](const RowGradient<A>& row, int64_t r, int64_t begin, int64_t n) {
    block_gradient<kind>(p.options, row, p.logits.row(r) + begin, out.logits.row(r) + begin, begin,
                         n, p.target_row(r), target_gradient_row(r));
  };
  const int64_t blocks = (classes + kBlock - 1) / kBlock;
  if (p.rows < at::get_num_threads() && blocks >= 8) {
    std::vector<RowGradient<A>> rows(p.rows);
    bool exact = false;
    for (int64_t r = 0; r < p.rows; ++r) {
      rows[r] = from_lse(r);
      exact = exact || needs_stats(r);
    }
    if (exact) {
      for_stats<kind>(p, [&](int64_t r, const RowStats<A>& stats) {
        if (!needs_stats(r)) return;
        rows[r] = row_gradient(p.options, stats, p.label(r), g_of(r), upstream.of_lse(r));
      });
    }
    at::parallel_for(0, p.rows * blocks, 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t r = i / blocks, c = (i % blocks) * kBlock;
        write(rows[r], r, c, std::min(kBlock, classes - c));
      }
    });
    return;
  }
  at::parallel_for(0, p.rows, grain_of(classes), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      RowGradient<A> row = from_lse(r);
      if (needs_stats(r)) {
        const auto stats = row_stats<kind>(p.options, p.logits.row(r), p.target_row(r));
        row = row_gradient(p.options, stats, p.label(r), g_of(r), upstream.of_lse(r));
      }
      write(row, r, 0, classes);
    }
  });
}

// Checks the tensors and fills a Problem; what it points into is kept alive by `holders`.
template <typename T>
Problem<T> make_problem(const char* op, const at::Tensor& logits, const at::Tensor& target,
                        const std::optional<at::Tensor>& weight, const LossArguments& arguments,
                        std::vector<at::Tensor>& holders) {
  using A = accumulate_t<T>;
  Problem<T> p;
  holders.resize(3);
  const int64_t classes = logits.dim() > 1 ? logits.size(1) : logits.size(0);
  p.options = loss_options<A>(op, classes, target, weight, arguments, holders[0]);
  const at::Tensor x = three_dimensional(logits);
  holders.push_back(x);
  p.logits = matrix_of<const T>(x, x.const_data_ptr<T>());
  p.rows = x.size(0) * x.size(2);
  p.contiguous = p.logits.rows_are_contiguous();
  if (p.soft()) {
    check_shape(target, logits.sizes(), op, "target");
    const bool narrow = target.scalar_type() == logits.scalar_type();
    at::Tensor t = three_dimensional(narrow ? target : target.to(kAccumulate<A>));
    if (narrow) {
      p.narrow = matrix_of<const T>(t, t.const_data_ptr<T>());
    } else {
      p.wide = matrix_of<const A>(t, t.const_data_ptr<A>());
    }
    p.contiguous = p.contiguous && (t.size(1) == 1 || t.stride(1) == 1);
    holders[1] = t;
  } else {
    auto shape = logits.sizes().vec();
    shape.erase(shape.begin() + (logits.dim() > 1 ? 1 : 0));
    check_shape(target, shape, op, "target");
    check_dtype(target, at::kLong, op, "target");
    holders[2] = target.contiguous();
    p.labels = holders[2].const_data_ptr<int64_t>();
  }
  return p;
}

template <typename T>
std::tuple<at::Tensor, at::Tensor, at::Tensor> forward_typed(
    const at::Tensor& logits, const at::Tensor& target, const std::optional<at::Tensor>& weight,
    const LossArguments& arguments) {
  using A = accumulate_t<T>;
  std::vector<at::Tensor> holders;
  const auto p = make_problem<T>("cross_entropy_forward", logits, target, weight, arguments,
                                 holders);
  const double total = total_target_weight(p.options, p.labels, p.rows);
  auto shape = logits.sizes().vec();
  shape.erase(shape.begin() + (logits.dim() > 1 ? 1 : 0));
  at::Tensor losses = at::empty(shape, logits.options().dtype(kAccumulate<A>));
  at::Tensor lse = at::empty_like(losses);
  visit_kind(p.options.kind, [&](auto kind) {
    forward_rows<kind.value>(p, losses.mutable_data_ptr<A>(), lse.mutable_data_ptr<A>());
  });
  return {reduced_loss(p.options, losses, total), lse, at::scalar_tensor(total, losses.options())};
}

template <typename T>
std::tuple<at::Tensor, at::Tensor> backward_typed(
    const at::Tensor& grad_loss, const std::optional<at::Tensor>& grad_lse,
    const at::Tensor& logits, const at::Tensor& target, const std::optional<at::Tensor>& weight,
    const at::Tensor& lse, const at::Tensor& total_weight, const LossArguments& arguments,
    std::array<bool, 2> output_mask) {
  using A = accumulate_t<T>;
  std::vector<at::Tensor> holders;
  const auto p = make_problem<T>("cross_entropy_backward", logits, target, weight, arguments,
                                 holders);
  if (p.labels) total_target_weight(p.options, p.labels, p.rows);
  const RowGradients<A> upstream(p.options, grad_loss, grad_lse, total_weight.item<double>());
  const at::Tensor saved = lse.contiguous();
  check_dtype(saved, kAccumulate<A>, "cross_entropy_backward", "lse");
  const bool to_target = output_mask[1] && p.soft();
  at::Tensor grad_logits, grad_target;
  Gradients<T> out;
  if (output_mask[0]) {
    grad_logits = at::empty(logits.sizes(), logits.options());
    const at::Tensor x = three_dimensional(grad_logits);
    out.logits = matrix_of<T>(x, x.mutable_data_ptr<T>());
  } else {
    grad_logits = at::empty({0}, logits.options());
  }
  if (to_target) {
    const auto dtype = p.narrow.data ? logits.scalar_type() : kAccumulate<A>;
    grad_target = at::empty(target.sizes(), target.options().dtype(dtype));
    const at::Tensor t = three_dimensional(grad_target);
    if (p.narrow.data) {
      out.narrow = matrix_of<T>(t, t.mutable_data_ptr<T>());
    } else {
      out.wide = matrix_of<A>(t, t.mutable_data_ptr<A>());
    }
  } else {
    grad_target = at::empty({0}, target.options());
  }
  if (output_mask[0] || to_target) {
    const bool contiguous_out = p.options.classes == 1 || three_dimensional(logits).size(2) == 1;
    Problem<T> q = p;
    q.contiguous = p.contiguous && contiguous_out;
    visit_kind(p.options.kind, [&](auto kind) {
      backward_rows<kind.value>(q, upstream, saved.const_data_ptr<A>(), out);
    });
  }
  return {grad_logits, grad_target.to(target.scalar_type())};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> cross_entropy_forward_cpu(
    const at::Tensor& logits, const at::Tensor& target, const std::optional<at::Tensor>& weight,
    std::string_view reduction, int64_t ignore_index, double label_smoothing, double z_loss,
    double softcap) {
  check_float(logits, true, "cross_entropy_forward", "logits");
  FASTNN_CHECK(logits.dim() >= 1, "cross_entropy_forward", "logits", "at least 1-D",
               logits.dim());
  const LossArguments arguments{reduction, ignore_index, label_smoothing, z_loss, softcap};
  return AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kBFloat16, at::kHalf, logits.scalar_type(), "cross_entropy_forward",
      [&] { return forward_typed<scalar_t>(logits, target, weight, arguments); });
}

std::tuple<at::Tensor, at::Tensor> cross_entropy_backward_cpu(
    const at::Tensor& grad_loss, const std::optional<at::Tensor>& grad_lse,
    const at::Tensor& logits, const at::Tensor& target, const std::optional<at::Tensor>& weight,
    const at::Tensor& lse, const at::Tensor& total_weight, std::string_view reduction,
    int64_t ignore_index, double label_smoothing, double z_loss, double softcap,
    std::array<bool, 2> output_mask) {
  check_float(logits, true, "cross_entropy_backward", "logits");
  const LossArguments arguments{reduction, ignore_index, label_smoothing, z_loss, softcap};
  return AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kBFloat16, at::kHalf, logits.scalar_type(), "cross_entropy_backward", [&] {
        return backward_typed<scalar_t>(grad_loss, grad_lse, logits, target, weight, lse,
                                        total_weight, arguments, output_mask);
      });
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace fastnn

FASTNN_CPU_KERNELS(m) {
  m.impl("cross_entropy_forward", fastnn::cross_entropy_forward_cpu);
  m.impl("cross_entropy_backward", fastnn::cross_entropy_backward_cpu);
}
