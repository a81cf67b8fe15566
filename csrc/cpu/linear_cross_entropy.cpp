// Softmax cross-entropy of logits = X W^T + b, X (N, D), W (V, D), without the N x V logits.
//   Rows go in chunks. Per chunk: logits by one GEMM, then, row by row while the row is in cache,
//   its statistics, loss and (in place) gradient; then dX = dlogits W, and dW += dlogits^T X. So
//   the forward makes the gradients for an upstream gradient of 1 with three GEMMs in all, and the
//   backward of a scaled loss only scales them; reduction "none" and a used lse recompute.
//   Rows whose label is ignored are dropped before the first GEMM: they cost nothing.
//   Work: the GEMMs are tiles of gemm.h. A task of the logits and of dW is 128 classes, whose part
//   of W or dlogits it packs itself, once a chunk; a task of dX is 256 rows by 128 columns, over
//   the classes in steps of 256. No sum depends on the number of threads.
//   Memory: one chunk of logits (workspace_bytes), and dW in float if it takes several chunks.
//   Numerics: logits rounded to the tiles' type (bfloat16 as F.linear gives them; of half, float);
//   statistics, db and dW over chunks in float.
#include <ATen/Dispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "common.h"
#include "cross_entropy.h"
#include "registry.h"

namespace fastnn {
inline namespace CPU_CAPABILITY {
namespace {

// A chunk of logits: large enough that reading W and dW once per chunk is small beside the GEMMs.
constexpr int64_t kDefaultWorkspace = int64_t{64} << 20;
constexpr int64_t kDefaultMinRows = 256;
// The logits' and dX's tiles are rows by 128 columns, whose panels of W stay in L2; dX sums 256
// classes at a time. A tile of dW is 256 classes by all columns of X.
constexpr int64_t kTileCols = 2 * kPanel;
constexpr int64_t kTileRows = 512;
constexpr int64_t kTileDeep = 256;
constexpr int64_t kTileClasses = 256;

int64_t rows_per_chunk(int64_t rows, int64_t classes, int64_t element, int64_t workspace_bytes) {
  const int64_t row = std::max<int64_t>(1, classes * element);
  int64_t most = workspace_bytes < 0 ? std::max(kDefaultWorkspace / row, kDefaultMinRows)
                                     : workspace_bytes / row;
  most = std::clamp<int64_t>(most, 1, std::max<int64_t>(rows, 1));
  const int64_t chunks = std::max<int64_t>(1, (rows + most - 1) / most);
  return std::max<int64_t>(1, (rows + chunks - 1) / chunks);
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

// X, W and b, and the gradients.
struct Linear {
  at::Tensor x, w, b;                 // b in the accumulation type
  at::Tensor grad_x, grad_w, grad_b;  // undefined where not wanted; grad_b accumulates
};

// A chunk of rows: X and the logits (later their gradient) as rows of the GEMMs' type, each row
// padded with zeros to pad_k and apart from the next by a line more, so that no stride is a power
// of two.
template <typename C>
struct Chunk {
  int64_t features, classes, ld_x, ld_z;
  Buffer<C> x, z, x_panels;

  Chunk(int64_t rows, int64_t features, int64_t classes)
      : features(features),
        classes(classes),
        ld_x(pad_k<C>(features) + 64 / sizeof(C)),
        ld_z(pad_k<C>(classes) + 64 / sizeof(C)),
        x(rows * ld_x),
        z(rows * ld_z) {}
};

// Statistics, loss and gradient of the rows of a chunk, in place.
template <Target kind, typename T, typename C, typename F>
void chunk_rows(const Job<T>& job, const Chunk<C>& chunk, int64_t rows, const F& index) {
  using A = accumulate_t<T>;
  const int64_t classes = chunk.classes;
  parallel_ranges(rows, classes * 16, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t row = index(r);
      const int64_t label = job.labels ? job.labels[row] : -1;
      C* z = chunk.z.get() + r * chunk.ld_z;
      Probabilities<C> target;
      if constexpr (kind == Target::kSoft) {
        // Only read. Where the GEMMs' type is not T, narrow probabilities were made wide.
        if constexpr (std::is_same_v<T, C>) {
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
      if (!job.upstream) continue;
      const RowGradient<A> gradient = row_gradient(
          job.options, stats, label, job.upstream->of_loss(row), job.upstream->of_lse(row));
      block_gradient<kind>(job.options, gradient, z, z, 0, classes, target, Probabilities<C>{});
      std::fill(z + classes, z + chunk.ld_z, C(0));
    }
  });
}

// db: sums[v] += the column sums of the chunk, in order of the rows.
template <typename C, typename A>
void add_columns(const Chunk<C>& chunk, int64_t rows, A* sums) {
  const int64_t tasks = ceil_div(chunk.classes, kTileCols);
  parallel_ranges(tasks, rows * kTileCols, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t v0 = task * kTileCols, cols = std::min(kTileCols, chunk.classes - v0);
      for (int64_t r = 0; r < rows; ++r) {
        add_row(sums + v0, chunk.z.get() + r * chunk.ld_z + v0, cols);
      }
    }
  });
}

// logits = X W^T + b
template <typename T, typename C>
void chunk_logits(const Chunk<C>& chunk, const Linear& linear, int64_t rows) {
  using A = accumulate_t<T>;
  const T* w = linear.w.const_data_ptr<T>();
  const A* bias = linear.b.defined() ? linear.b.const_data_ptr<A>() : nullptr;
  const int64_t stride_v = linear.w.stride(0), stride_k = linear.w.stride(1);
  const int64_t depth = chunk.features;
  const int64_t tasks = ceil_div(chunk.classes, kTileCols);
  parallel_ranges(tasks, rows * kTileCols * depth, [&](int64_t begin, int64_t end) {
    const Buffer<C> panels(packed_size<C>(depth, kTileCols));
    const Buffer<A> tile(kTileRows * kTileCols);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t v0 = task * kTileCols, cols = std::min(kTileCols, chunk.classes - v0);
      pack_b<T, C>(w + v0 * stride_v, stride_k, stride_v, depth, cols, panels.get());
      for (int64_t r0 = 0; r0 < rows; r0 += kTileRows) {
        const int64_t count = std::min(kTileRows, rows - r0);
        tile_gemm<C>(count, cols, depth, chunk.x.get() + r0 * chunk.ld_x, chunk.ld_x, panels.get(),
                     tile.get(), kTileCols, false);
        for (int64_t r = 0; r < count; ++r) {
          A* line = tile.get() + r * kTileCols;
          if (bias) add_row(line, bias + v0, cols);
          store_row(chunk.z.get() + (r0 + r) * chunk.ld_z + v0, line, cols);
        }
      }
    }
  });
}

// The rows' dX = dlogits W, row r of the chunk going to row index(r) of grad_x.
template <typename T, typename C, typename F>
void chunk_grad_x(const Chunk<C>& chunk, const Linear& linear, int64_t rows, const F& index) {
  using A = accumulate_t<T>;
  const T* w = linear.w.const_data_ptr<T>();
  T* grad_x = linear.grad_x.mutable_data_ptr<T>();
  const int64_t stride_v = linear.w.stride(0), stride_k = linear.w.stride(1);
  const int64_t classes = chunk.classes, features = chunk.features;
  const int64_t col_blocks = ceil_div(features, kTileCols);
  const int64_t tasks = ceil_div(rows, kTileRows) * col_blocks;
  parallel_ranges(tasks, kTileRows * kTileCols * classes, [&](int64_t begin, int64_t end) {
    const Buffer<C> panels(packed_size<C>(kTileDeep, kTileCols));
    const Buffer<A> tile(kTileRows * kTileCols);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t r0 = task / col_blocks * kTileRows, count = std::min(kTileRows, rows - r0);
      const int64_t k0 = task % col_blocks * kTileCols;
      const int64_t cols = std::min(kTileCols, features - k0);
      for (int64_t v = 0; v < classes; v += kTileDeep) {
        const int64_t depth = std::min(kTileDeep, classes - v);
        pack_b<T, C>(w + v * stride_v + k0 * stride_k, stride_v, stride_k, depth, cols,
                     panels.get());
        tile_gemm<C>(count, cols, depth, chunk.z.get() + r0 * chunk.ld_z + v, chunk.ld_z,
                     panels.get(), tile.get(), kTileCols, v > 0);
      }
      for (int64_t r = 0; r < count; ++r) {
        store_row(grad_x + index(r0 + r) * features + k0, tile.get() + r * kTileCols, cols);
      }
    }
  });
}

// dW = (dW +) dlogits^T X; into grad_w where that is done in one go, else into `wide`.
template <typename T, typename C>
void chunk_grad_w(const Chunk<C>& chunk, const Linear& linear, accumulate_t<T>* wide, int64_t rows,
                  bool accumulate) {
  using A = accumulate_t<T>;
  const int64_t features = chunk.features, depth = pad_k<C>(rows);
  const Buffer<C> panels(packed_size<C>(rows, features));
  parallel_ranges(ceil_div(features, kPanel), rows * kPanel, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      pack_panel<C, C>(chunk.x.get(), chunk.ld_x, 1, rows, features, panel, panels.get());
    }
  });
  const int64_t tasks = ceil_div(chunk.classes, kTileClasses);
  parallel_ranges(tasks, rows * kTileClasses * features, [&](int64_t begin, int64_t end) {
    const int64_t ld = depth + 64 / sizeof(C);
    const Buffer<C> transposed(kTileClasses * ld);
    const Buffer<A> tile(wide ? 0 : kTileClasses * features);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t v0 = task * kTileClasses, count = std::min(kTileClasses, chunk.classes - v0);
      transpose(chunk.z.get() + v0, chunk.ld_z, transposed.get(), ld, rows, count);
      for (int64_t v = 0; v < count && depth > rows; ++v) transposed.get()[v * ld + rows] = C(0);
      A* out = wide ? wide + v0 * features : tile.get();
      tile_gemm<C>(count, features, rows, transposed.get(), ld, panels.get(), out, features,
                   accumulate);
      if (!wide)
        store_row(linear.grad_w.mutable_data_ptr<T>() + v0 * features, out, count * features);
    }
  });
}

// T is the input's dtype, C the one its tiles are multiplied in.
template <typename T, typename C>
void run(const Job<T>& job, Linear& linear, const std::vector<int64_t>& kept, bool all_kept,
         int64_t workspace_bytes) {
  using A = accumulate_t<T>;
  const int64_t features = linear.x.size(1), classes = linear.w.size(0);
  const int64_t rows = all_kept ? linear.x.size(0) : static_cast<int64_t>(kept.size());
  const int64_t step = rows_per_chunk(rows, classes, sizeof(C), workspace_bytes);
  // Rows that no product reaches.
  if (linear.grad_x.defined() && (!all_kept || linear.w.size(0) == 0)) linear.grad_x.zero_();
  // Over several chunks dW adds up in the accumulation type.
  at::Tensor wide;
  if (linear.grad_w.defined()) {
    if (std::is_same_v<T, A>) {
      wide = linear.grad_w;
    } else if (step < rows) {
      wide = empty_tensor(linear.grad_w.sizes(), linear.grad_w.options().dtype(kAccumulate<A>));
    }
    if (rows == 0) linear.grad_w.zero_();
  }
  const Chunk<C> chunk(rows ? step : 0, features, classes);
  const T* x = linear.x.const_data_ptr<T>();
  for (int64_t first = 0; first < rows; first += step) {
    const int64_t count = std::min(step, rows - first);
    const auto index = [&](int64_t r) { return all_kept ? first + r : kept[first + r]; };
    parallel_ranges(count, features, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        C* row = chunk.x.get() + r * chunk.ld_x;
        convert_row(x + index(r) * linear.x.stride(0), 1, features, row);
        std::fill(row + features, row + chunk.ld_x, C(0));
      }
    });
    chunk_logits<T, C>(chunk, linear, count);
    visit_kind(job.options.kind,
               [&](auto kind) { chunk_rows<kind.value, T, C>(job, chunk, count, index); });
    if (linear.grad_b.defined()) add_columns(chunk, count, linear.grad_b.mutable_data_ptr<A>());
    if (linear.grad_x.defined() && linear.w.size(0) > 0)
      chunk_grad_x<T, C>(chunk, linear, count, index);
    if (linear.grad_w.defined()) {
      chunk_grad_w<T, C>(chunk, linear, wide.defined() ? wide.mutable_data_ptr<A>() : nullptr,
                         count, first > 0);
    }
  }
  if (rows && wide.defined() && !wide.is_same(linear.grad_w)) linear.grad_w.copy_(wide);
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
    if (!forward) check_upstream(op, job.options.reduction, rows_shape, grad_loss, grad_lse);
    const at::Tensor unit = forward ? at::ones({}, accumulate_options) : grad_loss;
    upstream.emplace(job.options, unit, grad_lse, total);
    if (forward) upstream->loss_step = 0;
    job.upstream = &*upstream;
  }

  if (linear_bias.has_value()) linear.b = linear_bias->to(kAccumulate<A>).contiguous();
  const auto launch = [&](auto tile_type) {
    using C = decltype(tile_type);
    if (job.options.kind == Target::kSoft) {
      const bool narrow = std::is_same_v<T, C> && target.scalar_type() == input.scalar_type();
      target_holder = (narrow ? target : target.to(kAccumulate<A>)).contiguous();
      if (narrow) {
        job.narrow = target_holder.template const_data_ptr<T>();
      } else {
        job.wide = target_holder.template const_data_ptr<A>();
      }
    }
    run<T, C>(job, linear, kept, all_kept, workspace_bytes);
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
  // What of ATen is called below: no graph of its own, and no cast by autocast.
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

void scale_cpu(at::Tensor& tensor, const at::Tensor& scale) {
  const at::AutoDispatchBelowADInplaceOrView no_grad;
  if (scale.item<double>() != 1.0) tensor.mul_(scale);
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace fastnn

FASTNN_CPU_KERNELS(m) {
  m.impl("linear_cross_entropy_forward", fastnn::linear_cross_entropy_forward_cpu);
  m.impl("linear_cross_entropy_backward", fastnn::linear_cross_entropy_backward_cpu);
  m.impl("scale_", fastnn::scale_cpu);
}
