// Softmax cross-entropy of logits (N, C, d1, ...) with class indices or probabilities; the row
// mathematics is in cross_entropy.h.
//   Forward: one read of the logits, blocks of 2048 classes, merged online.
//   Backward: one read, one write; row statistics again only for probabilities and for |lse| so
//   large that float cannot hold it to the output's precision.
//   Work: rows over threads; with fewer rows than threads, (row, block) pairs over threads.
//   Few classes, and classes that are not contiguous, go through strips of 16 rows, one a lane.
//   Memory: O(rows). Sums in float (double for double); the reduction over rows in double.
//   Reached by two Zen 4 cores (copy 31 GB/s): forward float 1024x32000 in 5 ms, 26 GB/s of logits
//   (8 ms without the prefetch of the next block), bfloat16 14 GB/s, bound by the exponentials, 3
//   ns a vector of 16; forward+backward 18 and 33 ms, a third of it the system zeroing fresh pages.
#include "cross_entropy.h"

#include <ATen/Dispatch.h>

#include "registry.h"

namespace fastnn {
inline namespace CPU_CAPABILITY {
namespace {

constexpr int64_t kStrip = 16;  // rows of a transposed tile
constexpr int64_t kTileClasses = 256;
// Up to here rows go side by side through vectors: a row alone does not fill enough of them. The
// backward has no sums across a vector, so transposing pays only where a row is a fraction of one.
constexpr int64_t kFewForward = 64;
constexpr int64_t kFewBackward = 4;

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

int64_t grain_of(int64_t classes) {
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(classes, 1));
}

// The rows of a strip: where each begins, and whether they lie side by side.
template <typename T>
struct Strip {
  T* base[kStrip];
  int64_t rows;
  int64_t stride_c;
  bool adjacent;

  Strip(const Matrix<T>& m, int64_t first, int64_t count) : rows(count), stride_c(m.stride_c) {
    adjacent = count == kStrip;
    for (int64_t r = 0; r < count; ++r) {
      base[r] = m.row(first + r);
      adjacent = adjacent && base[r] == base[0] + r;
    }
  }
};

// n classes from `begin` of a strip, as A: tile[c * kStrip + r]. Absent rows repeat the first.
template <typename T, typename A = accumulate_t<T>>
void gather_tile(const Strip<const T>& strip, int64_t begin, int64_t n, A* tile) {
  constexpr int64_t kLane = kLanes<T>;
  if (strip.adjacent) {
    for (int64_t c = 0; c < n; ++c) {
      const T* p = strip.base[0] + (begin + c) * strip.stride_c;
      for (int64_t r = 0; r < kStrip; r += kLane) {
        store_vec(tile + c * kStrip + r, load_vec(p + r));
      }
    }
    return;
  }
  for (int64_t r = 0; r < kStrip; ++r) {
    const T* p = strip.base[r < strip.rows ? r : 0] + begin * strip.stride_c;
    for (int64_t c = 0; c < n; ++c) tile[c * kStrip + r] = static_cast<A>(p[c * strip.stride_c]);
  }
}

template <typename T, typename A = accumulate_t<T>>
void scatter_tile(const Strip<T>& strip, int64_t begin, int64_t n, const A* tile) {
  constexpr int64_t kLane = kLanes<T>;
  if (strip.adjacent) {
    for (int64_t c = 0; c < n; ++c) {
      T* p = strip.base[0] + (begin + c) * strip.stride_c;
      for (int64_t r = 0; r < kStrip; r += kLane) {
        store_vec(p + r, AccVec<T>::loadu(tile + c * kStrip + r));
      }
    }
    return;
  }
  for (int64_t r = 0; r < strip.rows; ++r) {
    T* p = strip.base[r] + begin * strip.stride_c;
    for (int64_t c = 0; c < n; ++c) p[c * strip.stride_c] = static_cast<T>(tile[c * kStrip + r]);
  }
}

// The softcap, in place.
template <typename A>
void cap_tile(const LossOptions<A>& options, int64_t n, A* tile) {
  if (options.softcap == A(0)) return;
  const Vectorized<A> cap(options.softcap);
  for (int64_t i = 0; i < n * kStrip; i += Vectorized<A>::size()) {
    ((Vectorized<A>::loadu(tile + i) / cap).tanh() * cap).store(tile + i);
  }
}

// q of one class in the lanes of some rows.
template <typename A>
Vectorized<A> soft_target_lanes(const LossOptions<A>& options, const A* target, int64_t c) {
  const Vectorized<A> q =
      at::vec::fmadd(Vectorized<A>::loadu(target), Vectorized<A>(A(1) - options.smoothing),
                     Vectorized<A>(options.share));
  return q * Vectorized<A>(options.class_weight(c));
}

// Everything the kernels read, typed.
template <typename T>
struct Problem {
  using A = accumulate_t<T>;
  LossOptions<A> options;
  Matrix<const T> logits;
  int64_t rows = 0;
  const int64_t* labels = nullptr;
  Matrix<const T> narrow;   // probabilities in the logits' dtype,
  Matrix<const A> wide;     // or in the accumulation type
  bool contiguous = false;  // a row is worth going along

  bool counted(int64_t r) const { return !labels || labels[r] != options.ignore_index; }
  int64_t label(int64_t r) const { return labels ? labels[r] : -1; }
  bool soft() const { return options.kind == Target::kSoft; }

  Probabilities<T> target_row(int64_t r) const {
    // The kernels only read them: Probabilities serves the gradient too.
    return {narrow.data ? const_cast<T*>(narrow.row(r)) : nullptr,
            wide.data ? const_cast<A*>(wide.row(r)) : nullptr};
  }
  void gather_target(int64_t first, int64_t count, int64_t begin, int64_t n, A* tile) const {
    if (narrow.data) gather_tile<T>(Strip<const T>(narrow, first, count), begin, n, tile);
    if (wide.data) gather_tile<A>(Strip<const A>(wide, first, count), begin, n, tile);
  }
  A label_logit(int64_t r) const {
    if (!labels || !counted(r)) return A(0);
    return capped(options, static_cast<A>(logits.row(r)[labels[r] * logits.stride_c]));
  }
};

// Statistics of up to kStrip rows, one in each lane.
template <Target kind, typename T, typename A = accumulate_t<T>>
void strip_stats(const Problem<T>& p, int64_t first, int64_t count, RowStats<A>* stats) {
  using Vec = Vectorized<A>;
  constexpr int64_t kLane = Vec::size();
  constexpr A kLowest = -std::numeric_limits<A>::infinity();
  alignas(64) A tile[kStrip * kTileClasses];
  alignas(64) A target[kind == Target::kSoft ? kStrip * kTileClasses : 1];
  alignas(64) A max[kStrip], sum[kStrip], dot[kStrip], mass[kStrip];
  for (int64_t r = 0; r < kStrip; ++r) max[r] = kLowest, sum[r] = dot[r] = mass[r] = A(0);
  const Strip<const T> strip(p.logits, first, count);
  for (int64_t begin = 0; begin < p.options.classes; begin += kTileClasses) {
    const int64_t n = std::min(kTileClasses, p.options.classes - begin);
    gather_tile<T>(strip, begin, n, tile);
    cap_tile(p.options, n, tile);
    if constexpr (kind == Target::kSoft) p.gather_target(first, count, begin, n, target);
    for (int64_t r = 0; r < kStrip; r += kLane) {
      const Vec before = Vec::loadu(max + r);
      Vec top = before;
      for (int64_t c = 0; c < n; ++c) {
        top = at::vec::clamp_min(top, Vec::loadu(tile + c * kStrip + r));
      }
      // Lanes that saw only -inf so far have sums of 0 and nothing to rebase.
      const Vec lowest(kLowest), zero(A(0));
      const Vec reference = Vec::blendv(top, zero, top == lowest);
      const Vec moved = Vec::blendv(before - reference, zero, before == lowest);
      Vec s = Vec::loadu(sum + r) * exp_below(moved);
      Vec m = Vec::loadu(mass + r);
      Vec d = at::vec::fmadd(m, moved, Vec::loadu(dot + r));
      for (int64_t c = 0; c < n; ++c) {
        const Vec v = Vec::loadu(tile + c * kStrip + r) - reference;
        s = s + exp_below(v);
        if constexpr (kind == Target::kSmooth) d = d + v;
        if constexpr (kind == Target::kWeightedSmooth || kind == Target::kSoft) {
          Vec u(p.options.class_weight(begin + c));
          if constexpr (kind == Target::kSoft) {
            u = soft_target_lanes(p.options, target + c * kStrip + r, begin + c);
          }
          d = d + u * v;
          m = m + u;
        }
      }
      if constexpr (kind == Target::kSmooth) m = m + Vec(static_cast<A>(n));
      top.store(max + r);
      s.store(sum + r);
      d.store(dot + r);
      m.store(mass + r);
    }
  }
  for (int64_t r = 0; r < count; ++r) stats[r] = {max[r], sum[r], dot[r], mass[r]};
}

// Calls f(first, count, stats) for all rows, in strips.
template <Target kind, typename T, typename F>
void for_stats(const Problem<T>& p, const F& f) {
  using A = accumulate_t<T>;
  const int64_t classes = p.options.classes;
  const int64_t blocks = (classes + kBlock - 1) / kBlock;
  if (!p.contiguous) {
    at::parallel_for(0, (p.rows + kStrip - 1) / kStrip,
                     std::max<int64_t>(1, grain_of(classes) / kStrip),
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

// |lse| up to which the gradient may be made from it as it was rounded. Half a unit of its last
// place is then below that of a half gradient; for float it is 8 units of the gradient's, with
// which errors were measured at twice torch's.
template <typename T>
constexpr double kExactLse = std::is_same_v<T, at::BFloat16> ? 4096.0
                             : std::is_same_v<T, at::Half>   ? 512.0
                                                             : 16.0;

template <typename T>
struct Gradients {
  Matrix<T> logits;
  Matrix<T> narrow;  // of the probabilities, as Problem
  Matrix<accumulate_t<T>> wide;
};

template <Target kind, typename T, typename A = accumulate_t<T>>
void strip_gradient(const Problem<T>& p, const RowGradient<A>* rows, int64_t first, int64_t count,
                    const Gradients<T>& out) {
  using Vec = Vectorized<A>;
  constexpr int64_t kLane = Vec::size();
  constexpr int64_t kSoftTile = kind == Target::kSoft ? kStrip * kTileClasses : 1;
  alignas(64) A tile[kStrip * kTileClasses];
  alignas(64) A target[kSoftTile];
  alignas(64) A grad_target[kSoftTile];
  alignas(64) A references[kStrip] = {}, scales[kStrip] = {}, gs[kStrip] = {},
                log_sums[kStrip] = {};
  alignas(64) A masses[kStrip] = {}, extras[kStrip] = {}, sums[kStrip] = {};
  for (int64_t r = 0; r < count; ++r) {
    references[r] = rows[r].is_zero() ? A(0) : rows[r].reference;
    scales[r] = rows[r].scale;
    gs[r] = rows[r].g;
    log_sums[r] = rows[r].log_sum;
    masses[r] = rows[r].mass;
    extras[r] = rows[r].extra;
    sums[r] = rows[r].sum;
  }
  const LossOptions<A>& options = p.options;
  const bool is_capped = options.softcap != A(0);
  const A kept = A(1) - options.smoothing;
  const Strip<const T> strip(p.logits, first, count);
  for (int64_t begin = 0; begin < options.classes; begin += kTileClasses) {
    const int64_t n = std::min(kTileClasses, options.classes - begin);
    gather_tile<T>(strip, begin, n, tile);
    cap_tile(options, n, tile);
    if constexpr (kind == Target::kSoft) p.gather_target(first, count, begin, n, target);
    A label_logit[kStrip];
    for (int64_t r = 0; r < count && kind != Target::kSoft; ++r) {
      const int64_t c = rows[r].label - begin;
      if (c >= 0 && c < n) label_logit[r] = tile[c * kStrip + r];
    }
    for (int64_t r = 0; r < kStrip; r += kLane) {
      const Vec reference = Vec::loadu(references + r), scale = Vec::loadu(scales + r);
      const Vec g = Vec::loadu(gs + r), log_sum = Vec::loadu(log_sums + r);
      // 0 * NaN: a row without a gradient must not see its logits.
      const Vec silent = (scale == Vec(A(0))) & (g == Vec(A(0)));
      for (int64_t c = 0; c < n; ++c) {
        A* at = tile + c * kStrip + r;
        const Vec z = Vec::loadu(at);
        const Vec v = z - reference;
        Vec grad = exp_below(v) * scale;
        const Vec weight(options.class_weight(begin + c));
        if constexpr (kind == Target::kSmooth) grad = grad - g * Vec(options.share);
        if constexpr (kind == Target::kWeightedSmooth) {
          grad = grad - g * Vec(options.share) * weight;
        }
        if constexpr (kind == Target::kSoft) {
          const Vec p = exp_below(v) / Vec::loadu(sums + r);
          const Vec q = soft_target_lanes(options, target + c * kStrip + r, begin + c);
          grad = at::vec::fmadd(Vec::loadu(extras + r), p, g * (Vec::loadu(masses + r) * p - q));
          const Vec to_target = (log_sum - v) * (g * Vec(kept)) * weight;
          Vec::blendv(to_target, Vec(A(0)), silent).store(grad_target + c * kStrip + r);
        }
        if (is_capped) {
          const Vec t = z / Vec(options.softcap);
          grad = grad * (Vec(A(1)) - t * t);
        }
        Vec::blendv(grad, Vec(A(0)), silent).store(at);
      }
    }
    for (int64_t r = 0; r < count && kind != Target::kSoft; ++r) {
      const int64_t c = rows[r].label - begin;
      if (c < 0 || c >= n || rows[r].g == A(0)) continue;
      tile[c * kStrip + r] = label_gradient<kind>(options, rows[r], label_logit[r]);
    }
    if (out.logits.data) scatter_tile(Strip<T>(out.logits, first, count), begin, n, tile);
    if (out.narrow.data) scatter_tile(Strip<T>(out.narrow, first, count), begin, n, grad_target);
    if (out.wide.data) scatter_tile(Strip<A>(out.wide, first, count), begin, n, grad_target);
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
    at::parallel_for(0, (p.rows + kStrip - 1) / kStrip,
                     std::max<int64_t>(1, grain_of(classes) / kStrip),
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
                             if (!needs_stats(first + r)) continue;
                             rows[r] = row_gradient(p.options, stats[r], p.label(first + r),
                                                    g_of(first + r), upstream.of_lse(first + r));
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

// The shape of a result per row: the logits' without that of the classes.
std::vector<int64_t> rows_shape(const at::Tensor& logits) {
  auto shape = logits.sizes().vec();
  shape.erase(shape.begin() + (logits.dim() > 1 ? 1 : 0));
  return shape;
}

// Checks the tensors and fills a Problem; what it points into is kept alive by `holders`.
template <typename T>
Problem<T> make_problem(const char* op, const at::Tensor& logits, const at::Tensor& target,
                        const std::optional<at::Tensor>& weight, const LossArguments& arguments,
                        int64_t few_classes, std::vector<at::Tensor>& holders) {
  using A = accumulate_t<T>;
  Problem<T> p;
  holders.resize(3);
  const int64_t classes = logits.dim() > 1 ? logits.size(1) : logits.size(0);
  p.options = loss_options<A>(op, classes, target, weight, arguments, holders[0]);
  const at::Tensor x = three_dimensional(logits);
  holders.push_back(x);
  p.logits = matrix_of<const T>(x, x.const_data_ptr<T>());
  p.rows = x.size(0) * x.size(2);
  p.contiguous = p.logits.rows_are_contiguous() && classes > few_classes;
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
    check_shape(target, rows_shape(logits), op, "target");
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
                                 kFewForward, holders);
  const double total = total_target_weight(p.options, p.labels, p.rows);
  at::Tensor losses = at::empty(rows_shape(logits), logits.options().dtype(kAccumulate<A>));
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
  constexpr const char* op = "cross_entropy_backward";
  const auto p = make_problem<T>(op, logits, target, weight, arguments, kFewBackward, holders);
  if (p.labels) total_target_weight(p.options, p.labels, p.rows);
  check_upstream(op, p.options.reduction, rows_shape(logits), grad_loss, grad_lse);
  check_shape(total_weight, {}, op, "total_weight");
  const RowGradients<A> upstream(p.options, grad_loss, grad_lse, total_weight.item<double>());
  check_shape(lse, rows_shape(logits), op, "lse");
  check_dtype(lse, kAccumulate<A>, op, "lse");
  const at::Tensor saved = lse.contiguous();
  const bool to_target = output_mask[1] && p.soft();
  at::Tensor grad_logits, grad_target;
  Gradients<T> out;
  if (output_mask[0]) {
    grad_logits = empty_tensor(logits.sizes(), logits.options());
    const at::Tensor x = three_dimensional(grad_logits);
    out.logits = matrix_of<T>(x, x.mutable_data_ptr<T>());
  } else {
    grad_logits = at::empty({0}, logits.options());
  }
  if (to_target) {
    const auto dtype = p.narrow.data ? logits.scalar_type() : kAccumulate<A>;
    grad_target = empty_tensor(target.sizes(), target.options().dtype(dtype));
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
  FASTNN_CHECK(logits.dim() >= 1, "cross_entropy_forward", "logits", "at least 1-D", logits.dim());
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
  FASTNN_CHECK(logits.dim() >= 1, "cross_entropy_backward", "logits", "at least 1-D", logits.dim());
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
