// The mathematics of one row of softmax cross-entropy, shared by cross_entropy.cpp and
// linear_cross_entropy.cpp. With logits z (softcapped first), p = softmax(z) and the row's target
// distribution q (class weights and label smoothing multiplied in, so it need not sum to 1):
//   loss = sum_c q_c (lse - z_c) + z_loss lse^2
//   grad = g ((sum q + 2 z_loss lse) p - q) + g_lse p,  times softcap's derivative
// A row is reduced block by block (max, then sums of exp(z - max) from L1), and the blocks are
// merged in order as in online softmax (Milakov & Gimelshein 2018, Algorithm 3): one read of
// memory, and the same bits for every number of threads. All sums are relative to the maximum, so
// an offset common to all logits costs no precision; for the same reason the backward recomputes
// the sum where lse is too large to hold log(sum) in its last bits.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/scalar_tensor.h>

#include <cmath>
#include <limits>
#include <optional>
#include <string_view>
#include <vector>

#include "../check.h"
#include "exp.h"
#include "memory.h"
#include "vec.h"

namespace fastnn {
inline namespace CPU_CAPABILITY {

// 8 KB of floats: the block's second pass reads it from L1.
inline constexpr int64_t kBlock = 2048;

// What q is: w_y at the label; that plus smoothing; the same with class weights; probabilities.
enum class Target { kIndex, kSmooth, kWeightedSmooth, kSoft };
enum class Reduction { kNone, kMean, kSum };

// The options of a call, with A the accumulation type.
template <typename A>
struct LossOptions {
  int64_t classes;
  int64_t ignore_index;
  Target kind;
  Reduction reduction;
  A smoothing;
  A share;  // smoothing / classes
  A z_loss;
  A softcap;        // 0 is off
  const A* weight;  // per class, or null
  A weight_sum;

  A class_weight(int64_t c) const { return weight ? weight[c] : A(1); }
};

// A row's class probabilities (or their gradient), in the logits' dtype or wide.
template <typename T>
struct Probabilities {
  T* narrow = nullptr;
  accumulate_t<T>* wide = nullptr;

  AccVec<T> get(int64_t c, int64_t n) const {
    return wide ? load_vec(wide + c, n) : load_vec(narrow + c, n);
  }
  void set(int64_t c, const AccVec<T>& v, int64_t n) const {
    if (wide) {
      store_vec(wide + c, v, n);
    } else {
      store_vec(narrow + c, v, n);
    }
  }
  explicit operator bool() const { return narrow || wide; }
};

template <typename A>
struct RowStats {
  A max = -std::numeric_limits<A>::infinity();
  A sum = 0;   // sum exp(z - reference)
  A dot = 0;   // sum u_c (z_c - reference); u is 1, w or q as `kind` says
  A mass = 0;  // sum u_c

  // exp(z - max) of a row of -inf would be NaN.
  A reference() const { return max == -std::numeric_limits<A>::infinity() ? A(0) : max; }
  A log_sum() const { return std::log(sum); }
  A lse() const { return reference() + log_sum(); }

  void merge(const RowStats& next) {
    const A top = std::max(max, next.max);
    rebase(top);
    RowStats other = next;
    other.rebase(top);
    sum += other.sum;
    dot += other.dot;
    mass += other.mass;
  }

 private:
  void rebase(A top) {
    if (max == top) return;
    if (max != -std::numeric_limits<A>::infinity()) {
      sum *= std::exp(max - top);
      dot += mass * (max - top);
    }
    max = top;
  }
};

template <typename A>
inline A sum_lanes(const Vectorized<A>& v) {
  using V = Vectorized<A>;
  return at::vec::VecReduceAllSIMD<A, V (*)(const V&, const V&)>::apply(
      [](const V& a, const V& b) { return a + b; }, v);
}

template <typename A>
inline A max_lanes(const Vectorized<A>& v) {
  using V = Vectorized<A>;
  return at::vec::VecReduceAllSIMD<A, V (*)(const V&, const V&)>::apply(
      [](const V& a, const V& b) { return at::vec::clamp_min(a, b); }, v);
}

template <typename A>
inline A capped(const LossOptions<A>& options, A z) {
  if (options.softcap == A(0)) return z;
  // By the vectors' tanh: the row's maximum must not differ from its own label's logit.
  using V = Vectorized<A>;
  A lanes[V::size()];
  ((V(z) / V(options.softcap)).tanh() * V(options.softcap)).store(lanes);
  return lanes[0];
}

// q of classes [c, c + n) where the target is probabilities.
template <typename T, typename A = accumulate_t<T>>
inline AccVec<T> soft_target(const LossOptions<A>& options, const Probabilities<T>& target,
                             int64_t c, int64_t n) {
  AccVec<T> q = at::vec::fmadd(target.get(c, n), AccVec<T>(A(1) - options.smoothing),
                               AccVec<T>(options.share));
  return options.weight ? q * load_vec(options.weight + c, n) : q;
}

// Statistics of the n <= kBlock classes from `begin`, whose (capped) logits start at `row`.
template <Target kind, typename T, typename S, typename A = accumulate_t<T>>
inline RowStats<A> block_stats_of(const LossOptions<A>& options, const S* row, int64_t begin,
                                  int64_t n, const Probabilities<T>& target) {
  using Vec = AccVec<T>;
  constexpr int64_t kLane = kLanes<T>;

  RowStats<A> stats;
  Vec top[4] = {Vec(stats.max), Vec(stats.max), Vec(stats.max), Vec(stats.max)};
  int64_t c = 0;
  for (; c + 4 * kLane <= n; c += 4 * kLane) {
    for (int i = 0; i < 4; ++i) top[i] = at::vec::clamp_min(top[i], load_vec(row + c + i * kLane));
  }
  for (; c < n; c += kLane) {
    const int64_t width = std::min(kLane, n - c);
    top[0] = at::vec::clamp_min(top[0], Vec::set(Vec(stats.max), load_vec(row + c, width), width));
  }
  stats.max = max_lanes(
      at::vec::clamp_min(at::vec::clamp_min(top[0], top[1]), at::vec::clamp_min(top[2], top[3])));

  const Vec reference(stats.reference());
  Vec sum(A(0)), dot(A(0)), mass(A(0));
  const auto accumulate = [&](int64_t at, int64_t width) __attribute__((always_inline)) {
    const bool partial = width < kLane;
    // The next block comes from memory while this one is computed.
    __builtin_prefetch(row + at + kBlock);
    const Vec v = load_vec(row + at, width) - reference;
    const Vec e = exp_below(v);
    sum = sum + (partial ? Vec::set(Vec(A(0)), e, width) : e);
    if constexpr (kind != Target::kIndex) {
      Vec u(A(1));
      if constexpr (kind == Target::kWeightedSmooth)
        u = load_vec(options.weight + begin + at, width);
      if constexpr (kind == Target::kSoft) u = soft_target(options, target, begin + at, width);
      const Vec uv = kind == Target::kSmooth ? v : u * v;
      dot = dot + (partial ? Vec::set(Vec(A(0)), uv, width) : uv);
      mass = mass + (partial ? Vec::set(Vec(A(0)), u, width) : u);
    }
  };
  c = 0;
  for (; c + kLane <= n; c += kLane) accumulate(c, kLane);
  if (c < n) accumulate(c, n - c);
  stats.sum = sum_lanes(sum);
  if constexpr (kind != Target::kIndex) {
    stats.dot = sum_lanes(dot);
    stats.mass = sum_lanes(mass);
  }
  return stats;
}

template <Target kind, typename T, typename A = accumulate_t<T>>
inline RowStats<A> block_stats(const LossOptions<A>& options, const T* z, int64_t begin, int64_t n,
                               const Probabilities<T>& target) {
  if (options.softcap == A(0)) return block_stats_of<kind, T>(options, z, begin, n, target);
  alignas(64) A buffer[kBlock];
  const AccVec<T> cap(options.softcap);
  for (int64_t c = 0; c < n; c += kLanes<T>) {
    const int64_t width = std::min(kLanes<T>, n - c);
    store_vec(buffer + c, (load_vec(z + c, width) / cap).tanh() * cap, width);
  }
  return block_stats_of<kind, T>(options, static_cast<const A*>(buffer), begin, n, target);
}

template <Target kind, typename T, typename A = accumulate_t<T>>
inline RowStats<A> row_stats(const LossOptions<A>& options, const T* z,
                             const Probabilities<T>& target) {
  RowStats<A> stats;
  for (int64_t begin = 0; begin < options.classes; begin += kBlock) {
    const int64_t n = std::min(kBlock, options.classes - begin);
    stats.merge(block_stats<kind>(options, z + begin, begin, n, target));
  }
  return stats;
}

// Sum of q: what the probabilities are multiplied with in the gradient.
template <typename A>
inline A target_mass(const LossOptions<A>& options, const RowStats<A>& stats, int64_t label) {
  if (options.kind == Target::kSoft) return stats.mass;
  A mass = (A(1) - options.smoothing) * options.class_weight(label);
  // fma by name: the compiler's choice of one must be the same here and in label_gradient.
  if (options.kind != Target::kIndex) mass = std::fma(options.share, options.weight_sum, mass);
  return mass;
}

// `label_logit` is the capped logit of the label (unused for probabilities).
template <typename A>
inline A row_loss(const LossOptions<A>& options, const RowStats<A>& stats, int64_t label,
                  A label_logit) {
  const A log_sum = stats.log_sum();
  A loss;
  if (options.kind == Target::kSoft) {
    loss = stats.mass * log_sum - stats.dot;
  } else {
    loss = options.class_weight(label) * (log_sum - (label_logit - stats.reference()));
    if (options.kind != Target::kIndex) {
      const A smooth = options.weight_sum * log_sum - stats.dot;
      loss = (A(1) - options.smoothing) * loss + options.share * smooth;
    }
  }
  if (options.z_loss != A(0)) {
    const A lse = stats.reference() + log_sum;
    loss += options.z_loss * lse * lse;
  }
  return loss;
}

// A row's gradient: p = exp(z - reference) * inverse_sum.
template <typename A>
struct RowGradient {
  A reference = 0;
  A log_sum = 0;  // lse - reference, for the gradient of probabilities
  A scale = 0;    // of exp(z - reference): (g mass + extra) / sum
  A g = 0;        // gradient of the row's loss
  int64_t label = -1;
  A mass = 0;   // sum of q
  A extra = 0;  // coefficient of p through lse
  A sum = 1;    // sum of exp(z - reference)

  bool is_zero() const { return scale == A(0) && g == A(0); }
};

template <typename A>
inline RowGradient<A> row_gradient(const LossOptions<A>& options, const RowStats<A>& stats,
                                   int64_t label, A g, A grad_lse) {
  RowGradient<A> row{stats.reference(), stats.log_sum(), A(0), g, label};
  row.sum = stats.sum;
  row.extra = grad_lse;
  if (g != A(0)) {
    row.mass = target_mass(options, stats, label);
    row.extra += g * A(2) * options.z_loss * stats.lse();
  }
  row.scale = (g * row.mass + row.extra) / stats.sum;
  return row;
}

// The gradient of the label's logit (capped). q is subtracted from p before anything is added:
// where p is close to 1, the difference is all there is.
template <Target kind, typename A>
inline A label_gradient(const LossOptions<A>& options, const RowGradient<A>& row, A logit) {
  const A p = std::exp(logit - row.reference) / row.sum;
  const A share = kind == Target::kIndex ? A(0) : options.share;
  // As target_mass does, so that for a single class the two cancel to the last bit.
  const A weight = options.class_weight(row.label);
  const A q = std::fma(share, weight, (A(1) - options.smoothing) * weight);
  const A grad = row.g * (row.mass * p - q) + row.extra * p;
  if (options.softcap == A(0)) return grad;
  const A t = logit / options.softcap;
  return grad * (A(1) - t * t);
}

// Writes the gradient of classes [begin, begin + n); z and out may be the same memory.
template <Target kind, bool kCapped, typename T, typename A = accumulate_t<T>>
inline void block_gradient_of(const LossOptions<A>& options, const RowGradient<A>& row, const T* z,
                              T* out, int64_t begin, int64_t n, const Probabilities<T>& target,
                              const Probabilities<T>& grad_target) {
  using Vec = AccVec<T>;
  constexpr int64_t kLane = kLanes<T>;
  const bool has_label =
      kind != Target::kSoft && row.label >= begin && row.label < begin + n && row.g != A(0);
  const A label_raw = has_label ? static_cast<A>(z[row.label - begin]) : A(0);
  const Vec reference(row.reference), scale(row.scale), g(row.g), one(A(1));
  const Vec share(row.g * options.share), cap(options.softcap);
  const A kept = A(1) - options.smoothing;
  const auto write = [&](int64_t at, int64_t width) __attribute__((always_inline)) {
    Vec v = load_vec(z + at, width), slope(A(1));
    if constexpr (kCapped) {
      const Vec t = (v / cap).tanh();
      slope = one - t * t;
      v = cap * t;
    }
    v = v - reference;
    Vec grad = exp_below(v) * scale;
    if constexpr (kind == Target::kSmooth) grad = grad - share;
    if constexpr (kind == Target::kWeightedSmooth) {
      grad = grad - share * load_vec(options.weight + begin + at, width);
    }
    if constexpr (kind == Target::kSoft) {
      // q from p before the rest is added, as in label_gradient.
      const Vec p = exp_below(v) / Vec(row.sum);
      grad = g * (Vec(row.mass) * p - soft_target(options, target, begin + at, width));
      grad = at::vec::fmadd(Vec(row.extra), p, grad);
      if (grad_target) {
        Vec to_target = (Vec(row.log_sum) - v) * Vec(row.g * kept);
        if (options.weight) to_target = to_target * load_vec(options.weight + begin + at, width);
        grad_target.set(begin + at, to_target, width);
      }
    }
    if constexpr (kCapped) grad = grad * slope;
    store_vec(out + at, grad, width);
  };
  int64_t c = 0;
  for (; c + kLane <= n; c += kLane) write(c, kLane);
  if (c < n) write(c, n - c);
  if (!has_label) return;
  const A logit = kCapped ? capped(options, label_raw) : label_raw;
  out[row.label - begin] = static_cast<T>(label_gradient<kind>(options, row, logit));
}

template <Target kind, typename T, typename A = accumulate_t<T>>
inline void block_gradient(const LossOptions<A>& options, const RowGradient<A>& row, const T* z,
                           T* out, int64_t begin, int64_t n, const Probabilities<T>& target,
                           const Probabilities<T>& grad_target) {
  if (row.is_zero()) {
    std::fill_n(out, n, T(0));
    for (int64_t c = begin; grad_target && c < begin + n; c += kLanes<T>) {
      grad_target.set(c, AccVec<T>(A(0)), std::min(kLanes<T>, begin + n - c));
    }
  } else if (options.softcap != A(0)) {
    block_gradient_of<kind, true>(options, row, z, out, begin, n, target, grad_target);
  } else {
    block_gradient_of<kind, false>(options, row, z, out, begin, n, target, grad_target);
  }
}

// Calls f with the target kind as a compile-time constant.
template <typename F>
inline void visit_kind(Target kind, const F& f) {
  switch (kind) {
    case Target::kIndex:
      return f(std::integral_constant<Target, Target::kIndex>{});
    case Target::kSmooth:
      return f(std::integral_constant<Target, Target::kSmooth>{});
    case Target::kWeightedSmooth:
      return f(std::integral_constant<Target, Target::kWeightedSmooth>{});
    case Target::kSoft:
      return f(std::integral_constant<Target, Target::kSoft>{});
  }
}

// The scalar arguments of an op, as its schema orders them.
struct LossArguments {
  std::string_view reduction;
  int64_t ignore_index;
  double label_smoothing;
  double z_loss;
  double softcap;
};

template <typename A>
inline constexpr at::ScalarType kAccumulate = std::is_same_v<A, double> ? at::kDouble : at::kFloat;

// The checked options; `weight_holder` keeps the class weights in A alive.
template <typename A>
LossOptions<A> loss_options(const char* op, int64_t classes, const at::Tensor& target,
                            const std::optional<at::Tensor>& weight, const LossArguments& arguments,
                            at::Tensor& weight_holder) {
  LossOptions<A> options{};
  options.classes = classes;
  options.ignore_index = arguments.ignore_index;
  options.smoothing = static_cast<A>(arguments.label_smoothing);
  options.share = classes ? options.smoothing / static_cast<A>(classes) : A(0);
  options.z_loss = static_cast<A>(arguments.z_loss);
  options.softcap = static_cast<A>(arguments.softcap);
  const auto reduction = arguments.reduction;
  FASTNN_CHECK(reduction == "none" || reduction == "mean" || reduction == "sum", op, "reduction",
               "one of none, mean, sum", reduction);
  options.reduction = reduction == "none"   ? Reduction::kNone
                      : reduction == "mean" ? Reduction::kMean
                                            : Reduction::kSum;
  FASTNN_CHECK(arguments.label_smoothing >= 0.0 && arguments.label_smoothing <= 1.0, op,
               "label_smoothing", "in [0, 1]", arguments.label_smoothing);
  options.weight_sum = static_cast<A>(classes);
  if (weight.has_value()) {
    check_shape(*weight, {classes}, op, "weight");
    weight_holder = weight->to(kAccumulate<A>).contiguous();
    options.weight = weight_holder.const_data_ptr<A>();
    double sum = 0;
    for (int64_t c = 0; c < classes; ++c) sum += options.weight[c];
    options.weight_sum = static_cast<A>(sum);
  }
  options.kind = target.is_floating_point()         ? Target::kSoft
                 : arguments.label_smoothing == 0.0 ? Target::kIndex
                 : weight.has_value()               ? Target::kWeightedSmooth
                                                    : Target::kSmooth;
  return options;
}

// What mean divides by; throws if a label is out of range.
template <typename A>
double total_target_weight(const LossOptions<A>& options, const int64_t* labels, int64_t rows) {
  if (options.kind == Target::kSoft) {
    return options.classes ? static_cast<double>(rows) : std::numeric_limits<double>::quiet_NaN();
  }
  double total = 0;
  for (int64_t i = 0; i < rows; ++i) {
    if (labels[i] == options.ignore_index) continue;
    TORCH_CHECK_INDEX(labels[i] >= 0 && labels[i] < options.classes, "Target ", labels[i],
                      " is out of bounds.");
    total += options.class_weight(labels[i]);
  }
  return total;
}

// The loss of the rows' losses. Summed in double on one thread: the order never changes.
template <typename A>
at::Tensor reduced_loss(const LossOptions<A>& options, const at::Tensor& row_losses, double total) {
  if (options.reduction == Reduction::kNone) return row_losses;
  const A* losses = row_losses.const_data_ptr<A>();
  double sum = 0;
  for (int64_t i = 0; i < row_losses.numel(); ++i) sum += losses[i];
  if (options.reduction == Reduction::kMean) sum /= total;
  return at::scalar_tensor(sum, row_losses.options());
}

// What a backward is given of the results: those of rows of that shape.
inline void check_upstream(const char* op, Reduction reduction, at::IntArrayRef rows,
                           const at::Tensor& grad_loss, const std::optional<at::Tensor>& grad_lse) {
  check_shape(grad_loss, reduction == Reduction::kNone ? rows : at::IntArrayRef{}, op, "grad_loss");
  if (grad_lse.has_value()) check_shape(*grad_lse, rows, op, "grad_lse");
}

// The gradient of each row's loss from that of the reduced loss.
template <typename A>
struct RowGradients {
  at::Tensor loss, lse;
  const A* loss_data = nullptr;
  const A* lse_data = nullptr;
  int64_t loss_step = 0;
  A divisor = 1;

  RowGradients(const LossOptions<A>& options, const at::Tensor& grad_loss,
               const std::optional<at::Tensor>& grad_lse, double total) {
    loss = grad_loss.to(kAccumulate<A>).contiguous();
    loss_data = loss.const_data_ptr<A>();
    loss_step = options.reduction == Reduction::kNone ? 1 : 0;
    if (grad_lse.has_value()) {
      lse = grad_lse->to(kAccumulate<A>).contiguous();
      lse_data = lse.const_data_ptr<A>();
    }
    if (options.reduction == Reduction::kMean) divisor = static_cast<A>(total);
  }
  A of_loss(int64_t row) const { return loss_data[row * loss_step] / divisor; }
  A of_lse(int64_t row) const { return lse_data ? lse_data[row] : A(0); }
};

}  // namespace CPU_CAPABILITY
}  // namespace fastnn
