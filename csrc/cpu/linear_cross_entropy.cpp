// Softmax cross-entropy of logits = X W^T + b, X (N, D), W (V, D), without the N x V logits.
//   Rows go in chunks. Per chunk: logits by one GEMM, then, row by row while the row is in cache,
//   its statistics, loss and (in place) gradient; then dX = dlogits W, and dW += dlogits^T X. So
//   the forward makes the gradients for an upstream gradient of 1 with three GEMMs in all, and the
//   backward of a scaled loss only scales them; reduction "none" and a used lse recompute.
//   Rows whose label is ignored are dropped before the first GEMM: they cost nothing.
//   Work: the GEMMs are libtorch's where it has a fast one for the dtype. Half, and bfloat16 on a
//   CPU without its instructions, are multiplied as float in slices of W. For bfloat16 libtorch has
//   no GEMM that adds to float, so dW over several chunks is made of tiles of gemm.h.
//   Memory: one chunk of logits (workspace_bytes), and dW in float if it takes several chunks.
//   Numerics: logits in W's dtype as F.linear gives them; statistics, db and dW over chunks in
//   float.
#include <ATen/Dispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "cross_entropy.h"
#include "gemm.h"
#include "registry.h"

namespace fastnn {
inline namespace CPU_CAPABILITY {
namespace {

// A chunk of logits: large enough that reading W and dW once per chunk is small beside the GEMMs.
constexpr int64_t kDefaultWorkspace = int64_t{64} << 20;
constexpr int64_t kDefaultMinRows = 256;
// Rows of W converted to float at a time.
constexpr int64_t kSlice = 2048;
// Columns of dlogits transposed at a time; with 1024 rows, 256 KB.
constexpr int64_t kTransposed = 128;

int64_t rows_per_chunk(int64_t rows, int64_t classes, int64_t element, int64_t workspace_bytes) {
  const int64_t row = std::max<int64_t>(1, classes * element);
  int64_t most = workspace_bytes < 0 ? std::max(kDefaultWorkspace / row, kDefaultMinRows)
                                     : workspace_bytes / row;
  most = std::clamp<int64_t>(most, 1, std::max<int64_t>(rows, 1));
  const int64_t chunks = std::max<int64_t>(1, (rows + most - 1) / most);
  return std::max<int64_t>(1, (rows + chunks - 1) / chunks);
}

// dW (V x D, float) += dlogits^T (V x R) x (R x D), in tiles of 128 classes.
template <typename C>
void add_weight_gradient(const at::Tensor& dlogits, const at::Tensor& x, at::Tensor& dw) {
  const int64_t rows = dlogits.size(0), classes = dlogits.size(1), features = x.size(1);
  const C* gradient = dlogits.const_data_ptr<C>();
  const C* input = x.const_data_ptr<C>();
  float* out = dw.mutable_data_ptr<float>();
  const at::Tensor packed = empty_tensor({packed_size<C>(rows, features)}, x.options());
  C* b = packed.mutable_data_ptr<C>();
  at::parallel_for(0, panels(features), 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      pack_panel<C, C>(input, x.stride(0), 1, rows, features, panel, b);
    }
  });
  const int64_t depth = pad_k<C>(rows);
  const int64_t tiles = (classes + kTransposed - 1) / kTransposed;
  at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    std::vector<C> transposed(kTransposed * depth, C(0));
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t first = tile * kTransposed;
      const int64_t count = std::min(kTransposed, classes - first);
      // 16 x 16 pieces: both sides stay within a few lines.
      for (int64_t r0 = 0; r0 < rows; r0 += 16) {
        for (int64_t c0 = 0; c0 < count; c0 += 16) {
          const int64_t r1 = std::min(rows, r0 + 16), c1 = std::min(count, c0 + 16);
          for (int64_t r = r0; r < r1; ++r) {
            for (int64_t c = c0; c < c1; ++c) {
              transposed[c * depth + r] = gradient[r * classes + first + c];
            }
          }
        }
      }
      tile_gemm<C>(count, features, rows, transposed.data(), depth, b, out + first * features,
                   features, true);
    }
    release_tiles();
  });
}

// What a call wants of the rows, and where it puts it.
template <typename T>
struct Job {
  using A = accumulate_t<T>;
  LossOptions<A> options;
  const int64_t* labels = nullptr;
  const T* narrow = nullptr;  // probabilities (N, V), in the input's dtype
  const A* wide = nullptr;    // or in the accumulation type
  A* losses = nullptr;        // null in the recomputing backward
  A* lse = nullptr;
  const RowGradients<A>* upstream = nullptr;  // null if no gradient is wanted
};

// Statistics, loss and gradient of the rows of a chunk of logits (R x V), in place.
template <Target kind, typename T, typename G>
void chunk_rows(const Job<T>& job, G* logits, const std::vector<int64_t>& kept, int64_t first,
                int64_t count) {
  using A = accumulate_t<T>;
  const int64_t classes = job.options.classes;
  at::parallel_for(
      0, count, std::max<int64_t>(1, 32768 / std::max<int64_t>(classes, 1)),
      [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t row = kept.empty() ? first + i : kept[first + i];
          const int64_t label = job.labels ? job.labels[row] : -1;
          G* z = logits + i * classes;
          Probabilities<G> target;
          if constexpr (kind == Target::kSoft) {
            // Only read. Where the GEMM's type is not T, narrow probabilities were made wide.
            if constexpr (std::is_same_v<T, G>) {
              if (job.narrow) target.narrow = const_cast<T*>(job.narrow + row * classes);
            }
            if (job.wide) target.wide = const_cast<A*>(job.wide + row * classes);
          }
          const RowStats<A> stats = row_stats<kind>(job.options, z, target);
          if (job.losses) {
            const A logit = label >= 0 ? capped(job.options, static_cast<A>(z[label])) : A(0);
            job.losses[row] = row_loss(job.options, stats, label, logit);
            job.lse[row] = stats.lse();
          }
          if (job.upstream) {
            const RowGradient<A> gradient = row_gradient(
                job.options, stats, label, job.upstream->of_loss(row), job.upstream->of_lse(row));
            block_gradient<kind>(job.options, gradient, z, z, 0, classes, target,
                                 Probabilities<G>{});
          }
        }
      });
}

// X, W and b as the GEMMs take them, and the gradients.
struct Linear {
  at::Tensor x, w, b;
  at::Tensor grad_x, grad_w, grad_b;  // undefined where not wanted; grad_b accumulates
};

// T is the input's dtype, G the one its GEMMs run in.
template <typename T, typename G>
void run(const Job<T>& job, Linear& linear, const std::vector<int64_t>& kept, bool all_kept,
         int64_t workspace_bytes) {
  const int64_t features = linear.x.size(1), classes = linear.w.size(0);
  const int64_t rows = all_kept ? linear.x.size(0) : static_cast<int64_t>(kept.size());
  const auto gemm_dtype = c10::CppTypeToScalarType<G>::value;
  constexpr bool converts = !std::is_same_v<T, G>;
  const auto options = linear.x.options().dtype(gemm_dtype);
  const int64_t step = rows_per_chunk(rows, classes, sizeof(G), workspace_bytes);
  const int64_t slice = converts ? std::min(kSlice, classes) : classes;
  const bool one_chunk = step >= rows;
  const at::Tensor workspace = empty_tensor({rows ? step : 0, classes}, options);
  if (!all_kept && linear.grad_x.defined()) linear.grad_x.zero_();

  // dW in its own dtype if one GEMM makes it whole, else in the accumulation type.
  at::Tensor dw;
  if (linear.grad_w.defined()) {
    const bool direct = !converts && (one_chunk || !std::is_same_v<T, at::BFloat16>);
    dw = direct ? linear.grad_w
                : empty_tensor(linear.grad_w.sizes(), options.dtype(kAccumulate<accumulate_t<T>>));
    if (rows == 0 || (!direct && !converts)) dw.zero_();
  }
  const auto w_slice = [&](int64_t v, int64_t n) {
    const at::Tensor part = linear.w.narrow(0, v, n);
    return converts ? part.to(gemm_dtype) : part;
  };

  for (int64_t first = 0; first < rows; first += step) {
    const int64_t count = std::min(step, rows - first);
    at::Tensor x, index;
    if (all_kept) {
      x = linear.x.narrow(0, first, count);
    } else {
      index = at::from_blob(const_cast<int64_t*>(kept.data()) + first, {count}, at::kLong);
      x = linear.x.index_select(0, index);
    }
    if (converts) x = x.to(gemm_dtype);

    at::Tensor logits = workspace.narrow(0, 0, count);
    for (int64_t v = 0; v < classes; v += slice) {
      const int64_t n = std::min(slice, classes - v);
      at::Tensor part = logits.narrow(1, v, n);
      const at::Tensor w = w_slice(v, n).t();
      if (linear.b.defined()) {
        at::addmm_out(part, linear.b.narrow(0, v, n), x, w);
      } else {
        at::mm_out(part, x, w);
      }
    }

    visit_kind(job.options.kind, [&](auto kind) {
      chunk_rows<kind.value, T, G>(job, logits.mutable_data_ptr<G>(), kept, first, count);
    });

    if (linear.grad_b.defined())
      linear.grad_b.add_(at::sum(logits, {0}, false, linear.grad_b.scalar_type()));
    if (linear.grad_x.defined()) {
      const bool direct = all_kept && !converts;
      at::Tensor dx =
          direct ? linear.grad_x.narrow(0, first, count) : at::empty({count, features}, options);
      for (int64_t v = 0; v < classes; v += slice) {
        const int64_t n = std::min(slice, classes - v);
        const at::Tensor part = logits.narrow(1, v, n);
        if (v == 0) {
          at::mm_out(dx, part, w_slice(v, n));
        } else {
          dx.addmm_(part, w_slice(v, n));
        }
      }
      if (!all_kept) {
        linear.grad_x.index_copy_(0, index, dx.to(linear.grad_x.scalar_type()));
      } else if (!direct) {
        linear.grad_x.narrow(0, first, count).copy_(dx);
      }
    }
    if (dw.defined()) {
      if constexpr (std::is_same_v<G, at::BFloat16>) {
        if (!one_chunk) {
          add_weight_gradient<G>(logits, x.contiguous(), dw);
          continue;
        }
      }
      if (first == 0) {
        at::mm_out(dw, logits.t(), x);
      } else {
        dw.addmm_(logits.t(), x);
      }
    }
  }
  if (dw.defined() && !dw.is_same(linear.grad_w)) linear.grad_w.copy_(dw);
}

struct Result {
  at::Tensor loss, lse, total_weight, grad_input, grad_weight, grad_bias;
};

// Forward where `grad_loss` is undefined: the loss, and the gradients of the mask for an upstream
// gradient of 1. Backward otherwise: the gradients, from recomputed logits.
template <typename T>
Result run_typed(const char* op, const at::Tensor& grad_loss,
                 const std::optional<at::Tensor>& grad_lse, const at::Tensor& input,
                 const at::Tensor& linear_weight, const std::optional<at::Tensor>& linear_bias,
                 const at::Tensor& target, const std::optional<at::Tensor>& weight,
                 const LossArguments& arguments, int64_t workspace_bytes,
                 std::array<bool, 3> output_mask) {
  using A = accumulate_t<T>;
  const bool forward = !grad_loss.defined();
  const int64_t features = input.size(-1), classes = linear_weight.size(0);
  const int64_t rows = input.sizes().size() == 1
                           ? 1
                           : c10::multiply_integers(input.sizes().slice(0, input.dim() - 1));

  Job<T> job;
  at::Tensor weight_holder;
  job.options = loss_options<A>(op, classes, target, weight, arguments, weight_holder);
  auto rows_shape = input.sizes().slice(0, input.dim() - 1).vec();
  at::Tensor target_holder;
  if (job.options.kind == Target::kSoft) {
    auto shape = rows_shape;
    shape.push_back(classes);
    check_shape(target, shape, op, "target");
  } else {
    check_shape(target, rows_shape, op, "target");
    check_dtype(target, at::kLong, op, "target");
    target_holder = target.contiguous();
    job.labels = target_holder.const_data_ptr<int64_t>();
  }
  const double total = total_target_weight(job.options, job.labels, rows);
  std::vector<int64_t> kept;
  if (job.labels) {
    for (int64_t i = 0; i < rows; ++i) {
      if (job.labels[i] != job.options.ignore_index) kept.push_back(i);
    }
  }
  const bool all_kept = !job.labels || static_cast<int64_t>(kept.size()) == rows;
  if (all_kept) kept.clear();

  const auto accumulate_options = input.options().dtype(kAccumulate<A>);
  Result result;
  at::Tensor losses;
  if (forward) {
    losses = all_kept ? at::empty(rows_shape, accumulate_options)
                      : at::zeros(rows_shape, accumulate_options);
    result.lse = all_kept ? at::empty(rows_shape, accumulate_options)
                          : at::zeros(rows_shape, accumulate_options);
    job.losses = losses.mutable_data_ptr<A>();
    job.lse = result.lse.mutable_data_ptr<A>();
  }

  Linear linear;
  linear.x = input.reshape({rows, features});
  if (linear.x.stride(1) != 1) linear.x = linear.x.contiguous();
  linear.w = linear_weight;
  result.grad_input = at::empty({0}, input.options());
  result.grad_weight = at::empty({0}, linear_weight.options());
  result.grad_bias = at::empty({0}, linear_weight.options());
  if (output_mask[0]) {
    result.grad_input = empty_tensor(input.sizes(), input.options());
    linear.grad_x = result.grad_input.view({rows, features});
  }
  if (output_mask[1]) {
    result.grad_weight = empty_tensor(linear_weight.sizes(), linear_weight.options());
    linear.grad_w = result.grad_weight;
  }
  if (output_mask[2]) linear.grad_b = at::zeros({classes}, accumulate_options);
  std::optional<RowGradients<A>> upstream;
  if (output_mask[0] || output_mask[1] || output_mask[2]) {
    const at::Tensor unit = forward ? at::ones({}, accumulate_options) : grad_loss;
    upstream.emplace(job.options, unit, grad_lse, total);
    if (forward) upstream->loss_step = 0;
    job.upstream = &*upstream;
  }

  const auto launch = [&](auto gemm_type) {
    using G = decltype(gemm_type);
    if (linear_bias.has_value()) linear.b = linear_bias->to(c10::CppTypeToScalarType<G>::value);
    if (job.options.kind == Target::kSoft) {
      const bool narrow = std::is_same_v<T, G> && target.scalar_type() == input.scalar_type();
      target_holder = (narrow ? target : target.to(kAccumulate<A>)).contiguous();
      if (narrow) {
        job.narrow = target_holder.template const_data_ptr<T>();
      } else {
        job.wide = target_holder.template const_data_ptr<A>();
      }
    }
    run<T, G>(job, linear, kept, all_kept, workspace_bytes);
  };
  visit_tile_type<T>(launch);

  if (output_mask[2]) result.grad_bias = linear.grad_b.to(linear_weight.scalar_type());
  if (forward) {
    result.loss = reduced_loss(job.options, losses, total);
    result.total_weight = at::scalar_tensor(total, accumulate_options);
  }
  return result;
}

Result dispatch(const char* op, const at::Tensor& grad_loss,
                const std::optional<at::Tensor>& grad_lse, const at::Tensor& input,
                const at::Tensor& linear_weight, const std::optional<at::Tensor>& linear_bias,
                const at::Tensor& target, const std::optional<at::Tensor>& weight,
                const LossArguments& arguments, int64_t workspace_bytes,
                std::array<bool, 3> output_mask) {
  // The GEMMs below are ATen's: no graph of their own, and no cast by autocast.
  at::AutoDispatchBelowAutograd below_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  check_float(input, true, op, "input");
  FASTNN_CHECK(input.dim() >= 1, op, "input", "at least 1-D", input.dim());
  FASTNN_CHECK(linear_weight.dim() == 2 && linear_weight.size(1) == input.size(-1), op,
               "linear_weight", "of shape (classes, in)", linear_weight.sizes());
  check_dtype(linear_weight, input.scalar_type(), op, "linear_weight");
  if (linear_bias.has_value()) {
    check_shape(*linear_bias, {linear_weight.size(0)}, op, "linear_bias");
    check_dtype(*linear_bias, input.scalar_type(), op, "linear_bias");
  }
  return AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kBFloat16, at::kHalf, input.scalar_type(), "linear_cross_entropy", [&] {
        return run_typed<scalar_t>(op, grad_loss, grad_lse, input, linear_weight, linear_bias,
                                   target, weight, arguments, workspace_bytes, output_mask);
      });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
linear_cross_entropy_forward_cpu(const at::Tensor& input, const at::Tensor& linear_weight,
                                 const std::optional<at::Tensor>& linear_bias,
                                 const at::Tensor& target, const std::optional<at::Tensor>& weight,
                                 std::string_view reduction, int64_t ignore_index,
                                 double label_smoothing, double z_loss, double softcap,
                                 int64_t workspace_bytes, std::array<bool, 3> output_mask) {
  Result r =
      dispatch("linear_cross_entropy_forward", {}, std::nullopt, input, linear_weight, linear_bias,
               target, weight, {reduction, ignore_index, label_smoothing, z_loss, softcap},
               workspace_bytes, output_mask);
  return {r.loss, r.lse, r.total_weight, r.grad_input, r.grad_weight, r.grad_bias};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_cross_entropy_backward_cpu(
    const at::Tensor& grad_loss, const std::optional<at::Tensor>& grad_lse, const at::Tensor& input,
    const at::Tensor& linear_weight, const std::optional<at::Tensor>& linear_bias,
    const at::Tensor& target, const std::optional<at::Tensor>& weight, const at::Tensor& /*lse*/,
    const at::Tensor& /*total_weight*/, std::string_view reduction, int64_t ignore_index,
    double label_smoothing, double z_loss, double softcap, int64_t workspace_bytes,
    std::array<bool, 3> output_mask) {
  Result r = dispatch("linear_cross_entropy_backward", grad_loss, grad_lse, input, linear_weight,
                      linear_bias, target, weight,
                      {reduction, ignore_index, label_smoothing, z_loss, softcap}, workspace_bytes,
                      output_mask);
  return {r.grad_input, r.grad_weight, r.grad_bias};
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace fastnn

FASTNN_CPU_KERNELS(m) {
  m.impl("linear_cross_entropy_forward", fastnn::linear_cross_entropy_forward_cpu);
  m.impl("linear_cross_entropy_backward", fastnn::linear_cross_entropy_backward_cpu);
}
