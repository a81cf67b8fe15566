// What the forward and the backward of CPU attention share: the problem and how it is cut.
//   scores = softcap(scale q k^T) - slope |i + shift - j| + mask, -inf outside of the band
//   A tile is kQueryBlock rows of one head by kKeyBlock keys; both are constants of the shape, so
//   that no thread count changes a sum.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <optional>

#include "../check.h"
#include "common.h"
#include "dropout.h"

namespace fastnn {
inline namespace CPU_CAPABILITY {
namespace attention {

// Milliseconds of forward + backward on two cores with AVX512-BF16, by keys of a tile:
//                      float                        bfloat16
//   (B, H, S, D)         128   256   512              128    256    512
//   (8, 12, 512, 64)     141   141   152               76     75     82
//     causal              82    84    95               47     48     52
//   (1, 16, 1024, 128)   179   184   197               90     89    120
//     causal              93    99   122               56     50     68
//   (1, 8, 1024, 256)    192   200     -               96     84      -
//   (1, 16, 4096, 128)     -     -     -             1496   1420   1397
// 192 rows in place of 96 are within 7 % either way.
inline constexpr int64_t kGroup = 6;  // the micro-kernel's rows
inline constexpr int64_t kQueryBlock = 16 * kGroup;
inline constexpr int64_t kKeyBlock = 256;
inline constexpr int64_t kPanels = kKeyBlock / kPanel;

inline int64_t round_up(int64_t n, int64_t to) { return ceil_div(n, to) * to; }

inline int64_t key_block_of(int64_t keys) {
  return std::clamp(round_up(keys, kPanel), kPanel, kKeyBlock);
}

template <typename A>
inline constexpr A kInfinity = std::numeric_limits<A>::infinity();

// A (batch, head, row, column) tensor of any strides.
template <typename T>
struct View {
  T* data = nullptr;
  int64_t batch = 0, head = 0, row = 0, col = 0;

  View() = default;
  View(T* data, const at::Tensor& t)
      : data(data), batch(t.stride(0)), head(t.stride(1)), row(t.stride(2)), col(t.stride(3)) {}
  T* at(int64_t b, int64_t h, int64_t s) const { return data + b * batch + h * head + s * row; }
};

template <typename T>
View<const T> view(const at::Tensor& t) {
  return View<const T>(t.const_data_ptr<T>(), t);
}

struct Mask {
  const char* data = nullptr;
  at::ScalarType type;
  int64_t sizes[4], strides[4];  // in bytes, 0 where broadcast

  bool hides() const { return data && type == at::kBool; }
  bool adds() const { return data && type != at::kBool; }
  bool of_keys() const { return data && strides[2] == 0; }  // the same for all rows
  const char* at(int64_t b, int64_t h, int64_t q, int64_t k) const {
    return data + b * strides[0] + h * strides[1] + q * strides[2] + k * strides[3];
  }
};

inline Mask make_mask(const std::optional<at::Tensor>& tensor) {
  Mask mask;
  if (!tensor.has_value()) return mask;
  mask.data = static_cast<const char*>(tensor->const_data_ptr());
  mask.type = tensor->scalar_type();
  const int64_t missing = 4 - tensor->dim();
  for (int64_t i = 0; i < 4; ++i) {
    mask.sizes[i] = i < missing ? 1 : tensor->size(i - missing);
    mask.strides[i] = mask.sizes[i] == 1 ? 0 : tensor->stride(i - missing) * tensor->itemsize();
  }
  return mask;
}

// The keys [begin(q), end(q)) that the band lets row q see.
struct Band {
  int64_t keys, shift, left, right;

  int64_t begin(int64_t q) const {
    return left < 0 ? 0 : std::clamp<int64_t>(q + shift - left, 0, keys);
  }
  int64_t end(int64_t q) const {
    // The second: no sum of a huge window overflows.
    const bool all = right < 0 || right >= keys + std::abs(shift);
    return all ? keys : std::clamp<int64_t>(q + shift + right + 1, 0, keys);
  }
};

// Arguments that both directions take, as the schema has them.
struct Options {
  const std::optional<at::Tensor>&mask, &slopes, &sinks, &seed;
  double dropout_p, scale, softcap;
  bool bottom_right;
  int64_t window_left, window_right;
};

// (batch, heads) values of the accumulation type, or undefined.
inline at::Tensor per_head(const std::optional<at::Tensor>& values, const at::Tensor& query,
                           at::ScalarType type) {
  if (!values.has_value()) return {};
  return values->to(type).expand({query.size(0), query.size(1)}).contiguous();
}

template <typename T>
struct Problem {
  using A = accumulate_t<T>;

  int64_t batch, heads, kv_heads, group, dim, value_dim;
  int64_t queries, keys, query_blocks, key_block, key_blocks;
  // Of a sequence that lies packed among others: its first row and key, the rows of all of them,
  // and the columns of the dropout mask.
  int64_t first_row = 0, first_key = 0, packed_rows, dropout_cols;
  View<const T> query, key, value;
  Mask mask;
  at::Tensor slopes_tensor, sinks_tensor;
  const A *slopes, *sinks;
  Band band;
  bool bottom_right;
  A scale, softcap;
  // Nothing but a positive scale and hidden keys stand between q k^T and the softmax: the scale is
  // then folded into the exponential.
  bool plain;
  bool dropout;
  PhiloxState philox{};
  DropoutRate rate;

  Problem(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Options& o)
      : batch(q.size(0)),
        heads(q.size(1)),
        kv_heads(k.size(1)),
        group(kv_heads ? heads / kv_heads : 0),
        dim(q.size(3)),
        value_dim(v.size(3)),
        key_block(key_block_of(k.size(2))),
        packed_rows(q.size(2)),
        dropout_cols(k.size(2)),
        query(view<T>(q)),
        key(view<T>(k)),
        value(view<T>(v)),
        mask(make_mask(o.mask)),
        slopes_tensor(per_head(o.slopes, q, c10::CppTypeToScalarType<A>::value)),
        sinks_tensor(per_head(o.sinks, q, c10::CppTypeToScalarType<A>::value)),
        slopes(slopes_tensor.defined() ? slopes_tensor.const_data_ptr<A>() : nullptr),
        sinks(sinks_tensor.defined() ? sinks_tensor.const_data_ptr<A>() : nullptr),
        band{0, 0, o.window_left, o.window_right},
        bottom_right(o.bottom_right),
        scale(static_cast<A>(o.scale)),
        softcap(static_cast<A>(o.softcap)),
        plain(!softcap && !slopes && !mask.adds() && scale > 0),
        dropout(o.dropout_p > 0),
        rate(dropout_rate(o.dropout_p)) {
    if (dropout) philox = philox_state(*o.seed);
    set_lengths(q.size(2), k.size(2));
  }

  void set_lengths(int64_t new_queries, int64_t new_keys) {
    queries = new_queries;
    keys = new_keys;
    query_blocks = ceil_div(queries, kQueryBlock);
    key_blocks = ceil_div(keys, key_block);
    band.keys = keys;
    band.shift = bottom_right ? keys - queries : 0;
  }

  // What a finished score is still to be multiplied by.
  A factor() const { return plain ? scale : A(1); }
  int64_t rows_of(int64_t i) const { return std::min(kQueryBlock, queries - i * kQueryBlock); }
  int64_t cols_of(int64_t j) const { return std::min(key_block, keys - j * key_block); }
  // The key blocks [first, last) that some row of query block i may see.
  int64_t first_block(int64_t i) const { return band.begin(i * kQueryBlock) / key_block; }
  int64_t last_block(int64_t i) const {
    return ceil_div(band.end(i * kQueryBlock + rows_of(i) - 1), key_block);
  }
  int64_t row_index(int64_t b, int64_t h, int64_t q) const {
    return (b * heads + h) * packed_rows + first_row + q;
  }
};

// Tasks in an order in which any contiguous share of them is about the same work when the work
// grows (or falls) along the blocks, as it does under a causal mask: 0, n-1, 1, n-2, ...
inline int64_t balanced(int64_t t, int64_t n) { return t % 2 ? n - 1 - t / 2 : t / 2; }

// Multiplications that make a thread worth waking, and the tasks of `work` of them that do.
inline constexpr int64_t kWake = 1000000;

inline int64_t grain(double work) {
  return std::max<int64_t>(1, static_cast<int64_t>(kWake / std::max(work, 1.0)));
}

// Whether giving each thread whole heads keeps the threads as busy as splitting the heads would,
// where splitting costs `overhead` times the work.
inline bool whole_heads(int64_t heads, double overhead) {
  const int64_t threads = at::get_num_threads();
  return static_cast<double>(ceil_div(heads, threads) * threads) <= heads * overhead;
}

void check_attention(const char* op, const at::Tensor& query, const at::Tensor& key,
                     const at::Tensor& value, const Options& options);

}  // namespace attention
}  // namespace CPU_CAPABILITY
}  // namespace fastnn
