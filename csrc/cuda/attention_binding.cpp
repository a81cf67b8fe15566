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

// Sequences packed one behind the other.
struct Packing {
  const Tensor &query_starts, &key_starts;
  int64_t longest_query, longest_key;
};

// A (B, H, S, D) tensor, of packed sequences as one batch.
Tensor by_head(const Tensor& tensor, const Packing* packing) {
  return packing == nullptr ? tensor : tensor.transpose(0, 1).unsqueeze(0);
}

void check_dims(const char* op, const Tensor& query, const Tensor& key, const Tensor& value,
                const Packing* packing) {
  FASTNN_CHECK(query.is_cuda(), op, "query", "on a CUDA device", query.device());
  if (packing == nullptr) {
    FASTNN_CHECK(query.dim() == 4, op, "query", "of shape (B, H, Sq, D)", query.sizes());
    FASTNN_CHECK(key.dim() == 4, op, "key", "of shape (B, Hkv, Sk, D)", key.sizes());
    FASTNN_CHECK(value.dim() == 4, op, "value", "of shape (B, Hkv, Sk, Dv)", value.sizes());
    return;
  }
  FASTNN_CHECK(query.dim() == 3, op, "query", "of shape (Tq, H, D)", query.sizes());
  FASTNN_CHECK(key.dim() == 3, op, "key", "of shape (Tk, Hkv, D)", key.sizes());
  FASTNN_CHECK(value.dim() == 3, op, "value", "of shape (Tk, Hkv, Dv)", value.sizes());
  for (const auto& [starts, name] : {std::pair(&packing->query_starts, "cu_seqlens_q"),
                                     std::pair(&packing->key_starts, "cu_seqlens_k")}) {
    FASTNN_CHECK(starts->dim() == 1 && starts->numel() > 0, op, name, "of shape (N + 1,)",
                 starts->sizes());
    check_dtype(*starts, at::kInt, op, name);
    check_device(*starts, query, op, name);
  }
  FASTNN_CHECK(packing->key_starts.numel() == packing->query_starts.numel(), op, "cu_seqlens_k",
               "as long as cu_seqlens_q", packing->key_starts.numel());
  for (const auto& [longest, name] : {std::pair(packing->longest_query, "max_seqlen_q"),
                                      std::pair(packing->longest_key, "max_seqlen_k")}) {
    FASTNN_CHECK(longest >= 0 && longest < kMaxLength / 2, op, name, "from 0 to 2^28 - 1", longest);
  }
}

// Of by_head's tensors.
void check_arguments(const char* op, const Tensor& query, const Tensor& key, const Tensor& value,
                     const Options& options) {
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
  Tensor query, key, value, slopes, sinks, seed, query_starts, key_starts;

  // Contiguous columns.
  static Tensor with_unit_columns(const Tensor& tensor) {
    return tensor.stride(3) == 1 || tensor.size(3) <= 1 ? tensor : tensor.contiguous();
  }

  static AttentionOperand operand(const Tensor& tensor) {
    const int64_t batch = tensor.size(0) == 1 ? 0 : tensor.stride(0);
    return {tensor.const_data_ptr(), batch, tensor.stride(1), tensor.stride(2)};
  }

  // Of by_head's tensors.
  Arguments(AttentionProblem& p, const Tensor& query_, const Tensor& key_, const Tensor& value_,
            const Options& o, const Packing* packing)
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
    if (packing != nullptr) {
      query_starts = packing->query_starts.contiguous();
      key_starts = packing->key_starts.contiguous();
      p.query_starts = query_starts.const_data_ptr<int32_t>();
      p.key_starts = key_starts.const_data_ptr<int32_t>();
      p.query_rows = std::exchange(p.queries, packing->longest_query);
      p.key_rows = std::exchange(p.keys, packing->longest_key);
      p.batch = query_starts.numel() - 1;
      p.bottom_right = o.bottom_right;
      p.shift = 0;
    }
    if (o.mask.has_value()) p.mask = mask_of(*o.mask);
    p.slopes = per_head(p, o.slopes, slopes);
    p.sinks = per_head(p, o.sinks, sinks);
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
  const float* per_head(const AttentionProblem& p, const optional<Tensor>& values,
                        Tensor& kept) const {
    if (!values.has_value()) return nullptr;
    check_device(*values, query, "attention", "alibi_slopes and sinks");
    kept = values->to(at::kFloat).expand({p.batch, p.heads}).contiguous();
    return kept.const_data_ptr<float>();
  }
};

// The query's sizes but the last.
at::DimVector rows_of(const Tensor& query) {
  return at::DimVector(query.sizes().begin(), query.sizes().end() - 1);
}

// Of the result, and of lse.
at::DimVector out_sizes(const Tensor& query, const Tensor& value) {
  at::DimVector sizes = rows_of(query);
  sizes.push_back(value.size(-1));
  return sizes;
}
at::DimVector lse_sizes(const Tensor& query, const Packing* packing) {
  at::DimVector sizes = rows_of(query);
  if (packing != nullptr) std::swap(sizes[0], sizes[1]);
  return sizes;
}

std::tuple<Tensor, Tensor> forward(const char* op, const Tensor& query, const Tensor& key,
                                   const Tensor& value, const Options& options,
                                   const Packing* packing) {
  const at::AutoDispatchBelowADInplaceOrView no_grad;
  check_dims(op, query, key, value, packing);
  const Tensor queries = by_head(query, packing), keys = by_head(key, packing),
               values = by_head(value, packing);
  check_arguments(op, queries, keys, values, options);
  const c10::cuda::CUDAGuard device(query.device());
  AttentionForward p = {};
  const Arguments arguments(p, queries, keys, values, options, packing);
  Tensor out = at::empty(out_sizes(query, value), query.options());
  Tensor lse = at::empty(lse_sizes(query, packing), query.options().dtype(at::kFloat));
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

// Wanted: the gradients of query, key, value, mask and sinks.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const char* op, const Tensor& grad_out, const optional<Tensor>& grad_lse, const Tensor& query,
    const Tensor& key, const Tensor& value, const Options& options, const Packing* packing,
    const Tensor& out, const Tensor& lse, const std::array<bool, 5>& output_mask) {
  const at::AutoDispatchBelowADInplaceOrView no_grad;
  const optional<Tensor>&attn_mask = options.mask, &sinks = options.sinks;
  check_dims(op, query, key, value, packing);
  const Tensor queries = by_head(query, packing), keys = by_head(key, packing),
               values = by_head(value, packing);
  check_arguments(op, queries, keys, values, options);
  const c10::cuda::CUDAGuard device(query.device());
  AttentionBackward p = {};
  const Arguments arguments(p, queries, keys, values, options, packing);
  for (const auto& [tensor, name] : {std::pair(&grad_out, "grad_out"), std::pair(&out, "out")}) {
    check_shape(*tensor, out_sizes(query, value), op, name);
    check_dtype(*tensor, query.scalar_type(), op, name);
    check_device(*tensor, query, op, name);
  }
  check_shape(lse, lse_sizes(query, packing), op, "lse");
  check_device(lse, query, op, "lse");
  if (grad_lse.has_value()) {
    check_shape(*grad_lse, lse.sizes(), op, "grad_lse");
    check_device(*grad_lse, query, op, "grad_lse");
  }
  FASTNN_CHECK(!output_mask[3] || attn_mask.has_value(), op, "output_mask[3]",
               "false without attn_mask", true);
  FASTNN_CHECK(!output_mask[4] || sinks.has_value(), op, "output_mask[4]", "false without sinks",
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

  const Tensor upstream = Arguments::with_unit_columns(by_head(grad_out, packing));
  const Tensor saved = Arguments::with_unit_columns(by_head(out, packing));
  const Tensor lse_rows = lse.to(at::kFloat).contiguous();
  const Tensor grad_lse_rows = grad_lse.has_value() ? grad_lse->to(at::kFloat).contiguous() : lse;
  const Tensor rows = at::empty({2, lse.numel()}, floats);
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

// --- the operators

std::tuple<Tensor, Tensor> attention_forward(const Tensor& query, const Tensor& key,
                                             const Tensor& value, const optional<Tensor>& attn_mask,
                                             const optional<Tensor>& alibi_slopes,
                                             const optional<Tensor>& sinks,
                                             const optional<Tensor>& seed, double dropout_p,
                                             double scale, double softcap, bool bottom_right,
                                             int64_t window_left, int64_t window_right) {
  const Options options{attn_mask, alibi_slopes, sinks,        seed,        dropout_p,
                        scale,     softcap,      bottom_right, window_left, window_right};
  return forward("attention_forward", query, key, value, options, nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_out, const optional<Tensor>& grad_lse, const Tensor& query,
    const Tensor& key, const Tensor& value, const optional<Tensor>& attn_mask,
    const optional<Tensor>& alibi_slopes, const optional<Tensor>& sinks,
    const optional<Tensor>& seed, const Tensor& out, const Tensor& lse, double dropout_p,
    double scale, double softcap, bool bottom_right, int64_t window_left, int64_t window_right,
    std::array<bool, 5> output_mask) {
  const Options options{attn_mask, alibi_slopes, sinks,        seed,        dropout_p,
                        scale,     softcap,      bottom_right, window_left, window_right};
  return backward("attention_backward", grad_out, grad_lse, query, key, value, options, nullptr,
                  out, lse, output_mask);
}

std::tuple<Tensor, Tensor> varlen_attention_forward(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cu_seqlens_q,
    const Tensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
    const optional<Tensor>& alibi_slopes, const optional<Tensor>& sinks,
    const optional<Tensor>& seed, double dropout_p, double scale, double softcap, bool bottom_right,
    int64_t window_left, int64_t window_right) {
  const Packing packing{cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k};
  const optional<Tensor> none;
  const Options options{none,  alibi_slopes, sinks,        seed,        dropout_p,
                        scale, softcap,      bottom_right, window_left, window_right};
  return forward("varlen_attention_forward", query, key, value, options, &packing);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> varlen_attention_backward(
    const Tensor& grad_out, const optional<Tensor>& grad_lse, const Tensor& query,
    const Tensor& key, const Tensor& value, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
    int64_t max_seqlen_q, int64_t max_seqlen_k, const optional<Tensor>& alibi_slopes,
    const optional<Tensor>& sinks, const optional<Tensor>& seed, const Tensor& out,
    const Tensor& lse, double dropout_p, double scale, double softcap, bool bottom_right,
    int64_t window_left, int64_t window_right, std::array<bool, 4> output_mask) {
  const Packing packing{cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k};
  const optional<Tensor> none;
  const Options options{none,  alibi_slopes, sinks,        seed,        dropout_p,
                        scale, softcap,      bottom_right, window_left, window_right};
  auto [grad_query, grad_key, grad_value, grad_mask, grad_sinks] = backward(
      "varlen_attention_backward", grad_out, grad_lse, query, key, value, options, &packing, out,
      lse, {output_mask[0], output_mask[1], output_mask[2], false, output_mask[3]});
  return {grad_query, grad_key, grad_value, grad_sinks};
}

}  // namespace

}  // namespace fastnn

TORCH_LIBRARY_IMPL(fastnn, CUDA, m) {
  m.impl("attention_forward", fastnn::attention_forward);
  m.impl("attention_backward", fastnn::attention_backward);
  m.impl("varlen_attention_forward", fastnn::varlen_attention_forward);
  m.impl("varlen_attention_backward", fastnn::varlen_attention_backward);
}
