// The ATen side of attention*.cu: checks, views, outputs and scratch, the current stream,
// registration.

#include <ATen/ExpandUtils.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <tuple>
#include <utility>

#include "check.h"
#include "cuda/attention.h"
#include "cuda/binding.h"
#include "philox.h"

namespace fastnn {

namespace {

using at::Tensor;
using std::optional;

// What visit_width of attention_tile.cuh serves.
constexpr int64_t kMaxHeadDim = 256, kMaxLength = int64_t{1} << 29;

// Whether Hopper's kernels serve a problem, as kAttentionPaths says: what they leave goes to the
// portable ones.
bool on_hopper(const Device& device, bool served) {
  return served && device.capability == 90 && attention_sm90_built();
}

// Arguments that both directions take, as the schema has them.
struct Options {
  const optional<Tensor>&mask, &slopes, &sinks, &seed;
  double dropout_p, scale, softcap;
  bool bottom_right;
  int64_t window_left, window_right;
};

void check_arguments(const char* op, const Tensor& query, const Tensor& key, const Tensor& value,
                     const Options& options) {
  FASTNN_CHECK(query.is_cuda(), op, "query", "on a CUDA device", query.device());
  FASTNN_CHECK(query.dim() == 4, op, "query", "of shape (B, H, Sq, D)", query.sizes());
  FASTNN_CHECK(key.dim() == 4, op, "key", "of shape (B, Hkv, Sk, D)", key.sizes());
  FASTNN_CHECK(value.dim() == 4, op, "value", "of shape (B, Hkv, Sk, Dv)", value.sizes());
  check_float(query, false, op, "query");
  for (const auto& [tensor, name] : {std::pair(&key, "key"), std::pair(&value, "value")}) {
    check_dtype(*tensor, query.scalar_type(), op, name);
    check_device(*tensor, query, op, name);
  }
  const int64_t batch = query.size(0), heads = query.size(1), kv_heads = key.size(1);
  FASTNN_CHECK(kv_heads ? heads % kv_heads == 0 : heads == 0, op, "key",
               "of a head count that divides the query's", kv_heads);
  check_shape(key, {batch, kv_heads, key.size(2), query.size(3)}, op, "key");
  check_shape(value, {batch, kv_heads, key.size(2), value.size(3)}, op, "value");
  FASTNN_CHECK(query.size(3) <= kMaxHeadDim, op, "query", "of a head dimension up to 256",
               query.size(3));
  FASTNN_CHECK(value.size(3) <= kMaxHeadDim, op, "value", "of a head dimension up to 256",
               value.size(3));
  FASTNN_CHECK(query.size(2) + key.size(2) < kMaxLength, op, "query and key",
               "of fewer than 2^29 rows together", query.size(2) + key.size(2));
  check_dropout(options.dropout_p, options.seed, op);
  FASTNN_CHECK(options.softcap >= 0, op, "softcap", "at least 0", options.softcap);
  if (options.mask.has_value()) {
    const Tensor& mask = *options.mask;
    const auto type = mask.scalar_type();
    FASTNN_CHECK(type == at::kBool || type == query.scalar_type() || type == at::kFloat, op,
                 "attn_mask", "bool, float32 or of the query's dtype", type);
    check_device(mask, query, op, "attn_mask");
    const int64_t full[4] = {batch, heads, query.size(2), key.size(2)};
    bool fits = mask.dim() <= 4;
    for (int64_t i = 0; fits && i < mask.dim(); ++i) {
      const int64_t size = mask.size(mask.dim() - 1 - i);
      fits = size == 1 || size == full[3 - i];
    }
    TORCH_CHECK(fits, op, ": attn_mask must be broadcastable to ", at::IntArrayRef(full, 4),
                ", got ", mask.sizes());
  }
}

// The problem in the launchers' form; it keeps the tensors alive that it makes.
struct Arguments {
  Tensor query, key, value, slopes, sinks, seed;

  // Contiguous columns.
  static Tensor with_unit_columns(const Tensor& tensor) {
    return tensor.stride(3) == 1 || tensor.size(3) <= 1 ? tensor : tensor.contiguous();
  }

  static AttentionOperand operand(const Tensor& tensor) {
    return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
  }

  Arguments(AttentionProblem& p, const Tensor& query_, const Tensor& key_, const Tensor& value_,
            const Options& o)
      : query(with_unit_columns(query_)),
        key(with_unit_columns(key_)),
        value(with_unit_columns(value_)) {
    p.storage = storage_of(query);
    p.batch = query.size(0);
    p.heads = query.size(1);
    p.kv_heads = key.size(1);
    p.queries = query.size(2);
    p.keys = key.size(2);
    p.dim = query.size(3);
    p.value_dim = value.size(3);
    p.query = operand(query);
    p.key = operand(key);
    p.value = operand(value);
    p.scale = static_cast<float>(o.scale);
    p.softcap = static_cast<float>(o.softcap);
    p.shift = o.bottom_right ? p.keys - p.queries : 0;
    p.left = o.window_left;
    p.right = o.window_right;
    if (o.mask.has_value()) p.mask = mask_of(*o.mask);
    p.slopes = per_head(o.slopes, slopes);
    p.sinks = per_head(o.sinks, sinks);
    if (o.dropout_p > 0) {
      check_device(*o.seed, query, "attention", "seed");
      seed = o.seed->contiguous();
      const DropoutRate rate = dropout_rate(o.dropout_p);
      p.seed = seed.const_data_ptr<int64_t>();
      p.threshold = rate.threshold;
      p.keep_scale = rate.scale;
    }
  }

 private:
  static AttentionMask mask_of(const Tensor& tensor) {
    AttentionMask mask = {};
    mask.data = tensor.const_data_ptr();
    mask.boolean = tensor.scalar_type() == at::kBool;
    mask.storage = storage_of(tensor);
    int64_t* const strides[4] = {&mask.batch, &mask.head, &mask.row, &mask.col};
    for (int64_t i = 1; i <= tensor.dim(); ++i) {
      *strides[4 - i] = tensor.size(-i) == 1 ? 0 : tensor.stride(-i);
    }
    return mask;
  }

  // (batch, heads) floats, or null.
  const float* per_head(const optional<Tensor>& values, Tensor& kept) const {
    if (!values.has_value()) return nullptr;
    check_device(*values, query, "attention", "alibi_slopes and sinks");
    kept = values->to(at::kFloat).expand({query.size(0), query.size(1)}).contiguous();
    return kept.const_data_ptr<float>();
  }
};

std::tuple<Tensor, Tensor> attention_forward(const Tensor& query, const Tensor& key,
                                             const Tensor& value, const optional<Tensor>& attn_mask,
                                             const optional<Tensor>& alibi_slopes,
                                             const optional<Tensor>& sinks,
                                             const optional<Tensor>& seed, double dropout_p,
                                             double scale, double softcap, bool bottom_right,
                                             int64_t window_left, int64_t window_right) {
  const at::AutoDispatchBelowADInplaceOrView no_grad;
  const Options options{attn_mask, alibi_slopes, sinks,        seed,        dropout_p,
                        scale,     softcap,      bottom_right, window_left, window_right};
  check_arguments("attention_forward", query, key, value, options);
  const c10::cuda::CUDAGuard device(query.device());
  AttentionForward p = {};
  const Arguments arguments(p, query, key, value, options);
  Tensor out = at::empty({p.batch, p.heads, p.queries, p.value_dim}, query.options());
  Tensor lse = at::empty({p.batch, p.heads, p.queries}, query.options().dtype(at::kFloat));
  if (lse.numel() == 0) return {out, lse};
  p.out = out.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr<float>();
  const Device gpu = current_device();
  p.splits = attention_splits(p, gpu.multiprocessors);
  Tensor partial;
  if (p.splits > 1) {
    partial = at::empty({attention_split_scratch(p, p.splits)}, lse.options());
    p.partial = partial.mutable_data_ptr<float>();
  }
  const auto stream = c10::cuda::getCurrentCUDAStream();
  C10_CUDA_CHECK(on_hopper(gpu, attention_forward_sm90_serves(p))
                     ? attention_forward_sm90_cuda(p, gpu.multiprocessors, stream)
                     : attention_forward_portable_cuda(p, stream));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_out, const optional<Tensor>& grad_lse, const Tensor& query,
    const Tensor& key, const Tensor& value, const optional<Tensor>& attn_mask,
    const optional<Tensor>& alibi_slopes, const optional<Tensor>& sinks,
    const optional<Tensor>& seed, const Tensor& out, const Tensor& lse, double dropout_p,
    double scale, double softcap, bool bottom_right, int64_t window_left, int64_t window_right,
    std::array<bool, 5> output_mask) {
  constexpr const char* kOp = "attention_backward";
  const at::AutoDispatchBelowADInplaceOrView no_grad;
  const Options options{attn_mask, alibi_slopes, sinks,        seed,        dropout_p,
                        scale,     softcap,      bottom_right, window_left, window_right};
  check_arguments(kOp, query, key, value, options);
  const c10::cuda::CUDAGuard device(query.device());
  AttentionBackward p = {};
  const Arguments arguments(p, query, key, value, options);
  for (const auto& [tensor, name] : {std::pair(&grad_out, "grad_out"), std::pair(&out, "out")}) {
    check_shape(*tensor, {p.batch, p.heads, p.queries, p.value_dim}, kOp, name);
    check_dtype(*tensor, query.scalar_type(), kOp, name);
    check_device(*tensor, query, kOp, name);
  }
  check_shape(lse, {p.batch, p.heads, p.queries}, kOp, "lse");
  check_device(lse, query, kOp, "lse");
  if (grad_lse.has_value()) {
    check_shape(*grad_lse, lse.sizes(), kOp, "grad_lse");
    check_device(*grad_lse, query, kOp, "grad_lse");
  }
  FASTNN_CHECK(!output_mask[3] || attn_mask.has_value(), kOp, "output_mask[3]",
               "false without attn_mask", true);
  FASTNN_CHECK(!output_mask[4] || sinks.has_value(), kOp, "output_mask[4]", "false without sinks",
               true);

  const auto floats = query.options().dtype(at::kFloat);
  const bool empty = p.batch * p.heads * p.queries * p.keys == 0;
  const auto gradient = [&](bool wanted, const Tensor& like) {
    if (!wanted) return at::empty({0}, like.options());
    return empty ? at::zeros(like.sizes(), like.options())
                 : at::empty(like.sizes(), like.options());
  };
  Tensor grad_query = gradient(output_mask[0], query);
  Tensor grad_key = gradient(output_mask[1], key);
  Tensor grad_value = gradient(output_mask[2], value);
  Tensor grad_mask = gradient(output_mask[3], attn_mask.value_or(query));
  Tensor grad_sinks = at::empty({0}, sinks.value_or(query).options());

  const Tensor upstream = Arguments::with_unit_columns(grad_out);
  const Tensor saved = Arguments::with_unit_columns(out);
  const Tensor lse_rows = lse.to(at::kFloat).contiguous();
  const Tensor grad_lse_rows = grad_lse.has_value() ? grad_lse->to(at::kFloat).contiguous() : lse;
  const Tensor rows = at::empty({2, p.batch, p.heads, p.queries}, floats);
  p.grad_out = Arguments::operand(upstream);
  p.out = Arguments::operand(saved);
  p.lse = lse_rows.const_data_ptr<float>();
  p.grad_lse = grad_lse.has_value() ? grad_lse_rows.const_data_ptr<float>() : nullptr;
  p.rows = rows.mutable_data_ptr<float>();
  const auto pointer = [](Tensor& tensor) {
    return tensor.numel() > 0 ? tensor.mutable_data_ptr() : nullptr;
  };
  p.grad_query = pointer(grad_query);
  p.grad_key = pointer(grad_key);
  p.grad_value = pointer(grad_value);
  Tensor sink_sums, sink_rows;
  if (output_mask[4]) {
    sink_rows = at::empty(lse.sizes(), floats);
    p.sink_rows = sink_rows.mutable_data_ptr<float>();
    sink_sums = at::zeros({p.batch, p.heads}, floats);
    p.grad_sinks = sink_sums.mutable_data_ptr<float>();
  }

  const auto stream = c10::cuda::getCurrentCUDAStream();
  C10_CUDA_CHECK(attention_rows_cuda(p, stream));
  const Device gpu = current_device();
  C10_CUDA_CHECK(on_hopper(gpu, attention_backward_sm90_serves(p))
                     ? attention_backward_sm90_cuda(p, gpu.multiprocessors, stream)
                     : attention_backward_portable_cuda(p, stream));
  if (output_mask[4]) C10_CUDA_CHECK(attention_sinks_gradient_cuda(p, stream));
  Tensor mask_sums, mask_partial;
  if (output_mask[3] && !empty) {
    for (int64_t i = 0; i < 4; ++i) {
      const int64_t from_end = 4 - i;
      p.mask_sizes[i] = from_end <= attn_mask->dim() ? attn_mask->size(-from_end) : 1;
    }
    mask_sums = at::empty(attn_mask->sizes(), floats);
    p.grad_mask = mask_sums.mutable_data_ptr<float>();
    p.mask_parts = attention_mask_parts(p);
    if (p.mask_parts > 1) {
      mask_partial = at::empty({p.mask_parts, mask_sums.numel()}, floats);
      p.mask_partial = mask_partial.mutable_data_ptr<float>();
    }
    C10_CUDA_CHECK(attention_mask_gradient_cuda(p, stream));
    grad_mask = mask_sums.to(attn_mask->scalar_type());
  }
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  if (output_mask[4]) {
    grad_sinks = at::sum_to(sink_sums, sinks->sizes()).to(sinks->scalar_type()).contiguous();
  }
  return {grad_query, grad_key, grad_value, grad_mask, grad_sinks};
}

}  // namespace

}  // namespace fastnn

TORCH_LIBRARY_IMPL(fastnn, CUDA, m) {
  m.impl("attention_forward", fastnn::attention_forward);
  m.impl("attention_backward", fastnn::attention_backward);
}
