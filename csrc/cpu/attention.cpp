// Attention forward: O = dropout(softmax(S)) V and lse = log(sum(exp(S))) per row, for the scores S
// of attention.h, without holding S.
//   FlashAttention-2 (Dao 2023, algorithm 1): per block of query rows, one pass over the key blocks
//   with a running row maximum m and sum l; tiles outside of the band are skipped.
//   Work: one task per (batch, kv head), which packs that head's K and V and keeps them in cache;
//   where that leaves threads idle, packing is shared and each block of query rows is a task. A few
//   rows per kv head (decoding) read K and V in place instead, the keys split. Packed sequences are
//   shared out by varlen_attention.h.
//   Memory: the packed K and V in flight plus one tile per thread, linear in the sequence.
//   Numerics: scores, m, l and O in float (double for double); P is rounded to the type of the
//   GEMM. Floor: two GEMMs. Of (8,12,512,64) they take 73 % of the time in bfloat16, 86 % in float.
#include "attention_pack.h"
#include "attention_tile.h"
#include "registry.h"
#include "varlen_attention.h"

namespace fastnn {
inline namespace CPU_CAPABILITY {
namespace attention {

void check_attention(const char* op, const at::Tensor& query, const at::Tensor& key,
                     const at::Tensor& value, const Options& options) {
  FASTNN_CHECK(query.dim() == 4, op, "query", "of shape (B, H, Sq, D)", query.sizes());
  FASTNN_CHECK(key.dim() == 4, op, "key", "of shape (B, Hkv, Sk, D)", key.sizes());
  FASTNN_CHECK(value.dim() == 4, op, "value", "of shape (B, Hkv, Sk, Dv)", value.sizes());
  check_float(query, true, op, "query");
  check_dtype(key, query.scalar_type(), op, "key");
  check_dtype(value, query.scalar_type(), op, "value");
  const int64_t batch = query.size(0), heads = query.size(1), kv_heads = key.size(1);
  FASTNN_CHECK(kv_heads ? heads % kv_heads == 0 : heads == 0, op, "key",
               "of a head count that divides the query's", kv_heads);
  check_shape(key, {batch, kv_heads, key.size(2), query.size(3)}, op, "key");
  check_shape(value, {batch, kv_heads, key.size(2), value.size(3)}, op, "value");
  check_dropout(options.dropout_p, options.seed, op);
  FASTNN_CHECK(options.softcap >= 0, op, "softcap", "at least 0", options.softcap);
  if (options.mask.has_value()) {
    const at::Tensor& mask = *options.mask;
    const auto type = mask.scalar_type();
    FASTNN_CHECK(type == at::kBool || type == query.scalar_type() || type == at::kFloat, op,
                 "attn_mask", "bool, float32 or of the query's dtype", type);
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

namespace {

// Decoding: up to this many query rows per kv head, K and V are read once and in place.
constexpr int64_t kFewRows = 8;

template <typename A>
A sum_of(const Vectorized<A>& v) {
  return at::vec::vec_reduce_all<A>([](Vectorized<A> x, Vectorized<A> y) { return x + y; }, v);
}

// One row's step of the online softmax: the scores s (times factor) of the panels `seen`, which lie
// `stride` apart, become probabilities relative to the new maximum, side by side in `probs`, those
// without a bit in `keep` (or null) 0. Returns what earlier sums are to be multiplied by.
template <typename A, typename C>
A softmax_step(const A* s, int64_t stride, const Range& seen, A factor, A& m, A& l,
               const uint64_t* keep, C* probs) {
  using Vec = Vectorized<A>;
  constexpr int64_t kLane = Vec::size();
  Vec largest[2] = {Vec(-kInfinity<A>), Vec(-kInfinity<A>)};
  for (int64_t panel = seen.begin; panel < seen.end; ++panel) {
    for (int64_t c = 0; c < kPanel; c += 2 * kLane) {
      for (int i = 0; i < 2; ++i) {
        // clamp_min is one instruction; a NaN that it loses comes back through the sum.
        largest[i] = at::vec::clamp_min(Vec::loadu(s + panel * stride + c + i * kLane), largest[i]);
      }
    }
  }
  const A row =
      factor * at::vec::vec_reduce_all<A>([](Vec x, Vec y) { return at::vec::maximum(x, y); },
                                          at::vec::maximum(largest[0], largest[1]));
  const A next = row > m || row != row ? row : m;
  const A base = next == -kInfinity<A> ? A(0) : next;
  const Vec shift(-base), scale(factor);
  Vec sum(A(0));
  for (int64_t panel = seen.begin; panel < seen.end; ++panel) {
    for (int64_t c = 0; c < kPanel; c += 2 * kLane) {
      Vec value[2];
      for (int i = 0; i < 2; ++i) {
        const Vec x = Vec::loadu(s + panel * stride + c + i * kLane);
        value[i] = exp_below(at::vec::fmadd(x, scale, shift));
        sum = sum + value[i];
        if (keep) value[i] = keep_lanes(value[i], keep[panel] >> (c + i * kLane));
      }
      store_two<C>(probs + panel * kPanel + c, value[0], value[1]);
    }
  }
  const A alpha = next == m ? A(1) : std::exp(m - base);
  l = l * alpha + sum_of(sum);
  m = next;
  return alpha;
}

template <typename T>
struct Output {
  using A = accumulate_t<T>;
  const Problem<T>& p;
  View<T> out;
  A* lse;

  // The same of a part of the problem.
  Output of(const Problem<T>& part) const { return {part, out, lse}; }

  // Row (b, h, q) from its unnormalized sum o; a row that saw no key is 0, with lse -inf.
  void write(int64_t b, int64_t h, int64_t q, const A* o, A m, A l) const {
    using Vec = Vectorized<A>;
    const int64_t row = p.row_index(b, h, q);
    T* to = out.at(b, h, p.first_row + q);
    const bool empty = l == A(0) || m == -kInfinity<A>;
    const bool nan = l != l;
    // The scale of what dropout kept
    const A kept = p.dropout ? static_cast<A>(p.rate.scale) : A(1);
    const Vec inverse(empty && !nan ? A(0) : kept / l);
    for (int64_t d = 0; d < p.value_dim; d += Vec::size()) {
      store_vec<T>(to + d, Vec::loadu(o + d) * inverse, p.value_dim - d);
    }
    lse[row] = nan ? l : empty ? -kInfinity<A> : m + std::log(l);
  }
};

template <typename T, typename C>
class Forward {
 public:
  using A = accumulate_t<T>;
  using Vec = Vectorized<A>;

  explicit Forward(const Output<T>& output)
      : p_(output.p),
        output_(output),
        scores_(p_),
        depth_(pad_k<C>(p_.dim)),
        width_(round_up(p_.value_dim, Vec::size())),
        q_(kQueryBlock * depth_),
        s_(p_.key_block),
        probs_(kQueryBlock * p_.key_block),
        o_(kQueryBlock * width_),
        m_(kQueryBlock),
        l_(kQueryBlock) {}

  void run(int64_t b, int64_t h, int64_t i, const Keys<T, C>& keys, int64_t slot) {
    const int64_t rows = p_.rows_of(i);
    load_rows<T, C>(p_.query.at(b, h, p_.first_row + i * kQueryBlock), p_.query.row, p_.query.col,
                    rows, p_.dim, q_.get(), depth_);
    std::fill_n(o_.get(), rows * width_, A(0));
    // A sink is a key seen by every row, whose value is 0.
    std::fill_n(m_.get(), rows, p_.sinks ? p_.sinks[b * p_.heads + h] : -kInfinity<A>);
    std::fill_n(l_.get(), rows, p_.sinks ? A(1) : A(0));
    for (int64_t j = p_.first_block(i); j < p_.last_block(i); ++j) {
      if (!scores_.move_to(b, h, i, j)) continue;
      const int64_t at = slot * p_.key_blocks + j;
      tile_products<C>(scores_.tile(), p_.dim, q_.get(), depth_, keys.k.get() + at * keys.size_k,
                       s_.get());
      for (int64_t r = 0; r < rows; ++r) step(r);
      add_values(keys, at);
    }
    for (int64_t r = 0; r < rows; ++r) {
      output_.write(b, h, i * kQueryBlock + r, o_.get() + r * width_, m_.get()[r], l_.get()[r]);
    }
  }

 private:
  // Row r's probabilities of the tile, and its sums so far on their new base.
  void step(int64_t r) {
    const Tile& t = scores_.tile();
    const Range& seen = t.of_group[r / kGroup];
    if (seen.empty()) return;
    constexpr int64_t kStride = tile_offset(1, 0);
    A* s = s_.get() + tile_offset(0, r);
    scores_.finish_row(r, seen, s, kStride, nullptr);
    uint64_t keep[kKeepWords];
    if (p_.dropout) draw_keep(p_, t, r, seen, keep);
    const A alpha =
        softmax_step<A, C>(s, kStride, seen, p_.factor(), m_.get()[r], l_.get()[r],
                           p_.dropout ? keep : nullptr, probs_.get() + r * p_.key_block);
    if (alpha == A(1)) return;
    A* o = o_.get() + r * width_;
    for (int64_t d = 0; d < width_; d += Vec::size()) {
      (Vec::loadu(o + d) * Vec(alpha)).store(o + d);
    }
  }

  void add_values(const Keys<T, C>& keys, int64_t at) const {
    const Tile& t = scores_.tile();
    if (keys.v_finite.get()[at]) {
      return add_rows<C>(t, p_.value_dim, probs_.get(), p_.key_block,
                         keys.v.get() + at * keys.size_v, o_.get(), width_);
    }
    for (int64_t r = 0; r < t.rows; ++r) {
      const Range& seen = t.of_group[r / kGroup];
      const int64_t key = seen.begin * kPanel, count = std::min(seen.end * kPanel, t.cols) - key;
      accumulate_visible(1, p_.value_dim, count, probs_.get() + r * p_.key_block + key, 0, 1,
                         p_.value.at(t.b, t.h / p_.group, p_.first_key + t.k0 + key), p_.value.row,
                         p_.value.col, o_.get() + r * width_, 0, 1);
    }
  }

  const Problem<T>& p_;
  const Output<T>& output_;
  Scores<T> scores_;
  int64_t depth_, width_;
  Buffer<C> q_;
  TileBuffer<A> s_;
  Buffer<C> probs_;  // row by row
  Buffer<A> o_, m_, l_;
};

// All query rows of one kv head against keys and values that are read where they lie. The keys are
// split, whatever the threads, so that one long cache keeps all of them busy; the parts' sums, each
// on its own base, are then put together in order.
template <typename T>
class FewRows {
 public:
  using A = accumulate_t<T>;
  using Vec = Vectorized<A>;
  static constexpr int64_t kLane = Vec::size();
  static constexpr int64_t kSplit = 8;  // key blocks

  static bool serves(const Problem<T>& p) {
    return p.group * p.queries <= kFewRows && p.key.col == 1 && p.value.col == 1;
  }

  // The sums of every part of some heads: o, and m and l behind it.
  struct Parts {
    int64_t splits, rows, width;
    Buffer<A> sums;

    Parts(const Problem<T>& p, int64_t heads)
        : splits(std::max<int64_t>(1, ceil_div(p.key_blocks, kSplit))),
          rows(p.group * p.queries),
          width(round_up(p.value_dim, kLane)),
          sums(heads * splits * rows * (width + 2)) {}
    A* at(int64_t slot, int64_t split, int64_t r) const {
      return sums.get() + ((slot * splits + split) * rows + r) * (width + 2);
    }
  };

  FewRows(const Problem<T>& p, const Parts& parts)
      : p_(p),
        parts_(parts),
        scores_(p),
        depth_(round_up(p.dim, kLane)),
        q_(kFewRows * depth_),
        s_(kFewRows * p.key_block) {}

  // A part of kv head (b, kv), which is the slot-th of the heads held.
  void run(int64_t b, int64_t kv, int64_t slot, int64_t split) {
    const int64_t rows = parts_.rows, width = parts_.width, ld = p_.key_block;
    for (int64_t g = 0; g < p_.group; ++g) {
      const int64_t h = kv * p_.group + g;
      load_rows<T, A>(p_.query.at(b, h, p_.first_row), p_.query.row, p_.query.col, p_.queries,
                      p_.dim, q_.get() + g * p_.queries * depth_, depth_);
      const bool sink = p_.sinks && split == 0;
      for (int64_t q = 0; q < p_.queries; ++q) {
        A* o = parts_.at(slot, split, g * p_.queries + q);
        std::fill_n(o, width, A(0));
        o[width] = sink ? p_.sinks[b * p_.heads + h] : -kInfinity<A>;
        o[width + 1] = sink ? A(1) : A(0);
      }
    }
    const int64_t last = std::min(p_.last_block(0), (split + 1) * kSplit);
    for (int64_t j = std::max(p_.first_block(0), split * kSplit); j < last; ++j) {
      const int64_t k0 = p_.first_key + j * p_.key_block, cols = p_.cols_of(j);
      products(p_.key.at(b, kv, k0), rows, cols);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t h = kv * p_.group + r / p_.queries, q = r % p_.queries;
        if (q == 0) scores_.move_to(b, h, 0, j);
        const Tile& t = scores_.tile();
        if (t.panels.empty()) continue;
        A *s = s_.get() + r * ld, *o = parts_.at(slot, split, r);
        scores_.finish_row(q, t.panels, s, kPanel, nullptr);
        uint64_t keep[kKeepWords];
        if (p_.dropout) draw_keep(p_, t, q, t.panels, keep);
        const A alpha = softmax_step<A, A>(s, kPanel, t.panels, p_.factor(), o[width], o[width + 1],
                                           p_.dropout ? keep : nullptr, s);
        const int64_t from = t.panels.begin * kPanel;
        weigh(p_.value.at(b, kv, k0 + from), s + from, std::min(t.panels.end * kPanel, cols) - from,
              alpha, o);
      }
    }
  }

  // Puts the parts of a kv head together, in the first.
  static void finish(const Parts& parts, const Output<T>& output, int64_t b, int64_t kv,
                     int64_t slot) {
    const Problem<T>& p = output.p;
    const int64_t width = parts.width;
    for (int64_t r = 0; r < parts.rows; ++r) {
      A* o = parts.at(slot, 0, r);
      for (int64_t split = 1; split < parts.splits; ++split) {
        const A* part = parts.at(slot, split, r);
        const A m = o[width], other = part[width];
        const A next = other > m || other != other ? other : m;
        const A base = next == -kInfinity<A> ? A(0) : next;
        const A mine = std::exp(m - base), theirs = std::exp(other - base);
        for (int64_t d = 0; d < width; d += kLane) {
          (Vec::loadu(o + d) * Vec(mine) + Vec::loadu(part + d) * Vec(theirs)).store(o + d);
        }
        o[width] = next;
        o[width + 1] = o[width + 1] * mine + part[width + 1] * theirs;
      }
      output.write(b, kv * p.group + r / p.queries, r % p.queries, o, o[width], o[width + 1]);
    }
  }

 private:
  // s[r][c] = q_r k_c, four keys at a time.
  void products(const T* k, int64_t rows, int64_t cols) const {
    constexpr int kKeys = 4;
    for (int64_t c0 = 0; c0 < cols; c0 += kKeys) {
      const T* key[kKeys];
      for (int i = 0; i < kKeys; ++i) key[i] = k + std::min(c0 + i, cols - 1) * p_.key.row;
      for (int64_t r = 0; r < rows; ++r) {
        const A* q = q_.get() + r * depth_;
        Vec sum[kKeys] = {Vec(A(0)), Vec(A(0)), Vec(A(0)), Vec(A(0))};
        int64_t d = 0;
        for (; d + kLane <= p_.dim; d += kLane) {
          const Vec x = Vec::loadu(q + d);
          for (int i = 0; i < kKeys; ++i) sum[i] = at::vec::fmadd(x, load_vec(key[i] + d), sum[i]);
        }
        if (d < p_.dim) {
          const Vec x = Vec::loadu(q + d);
          for (int i = 0; i < kKeys; ++i) {
            sum[i] = at::vec::fmadd(x, load_vec(key[i] + d, p_.dim - d), sum[i]);
          }
        }
        for (int i = 0; i < kKeys && c0 + i < cols; ++i) {
          s_.get()[r * p_.key_block + c0 + i] =
              at::vec::vec_reduce_all<A>([](Vec x, Vec y) { return x + y; }, sum[i]);
        }
      }
    }
  }

  // o = alpha o + probs V; a hidden key's value is not read.
  void weigh(const T* v, const A* probs, int64_t cols, A alpha, A* o) const {
    constexpr int kVecs = 8;
    for (int64_t d0 = 0; d0 < p_.value_dim; d0 += kVecs * kLane) {
      const int64_t width = std::min(p_.value_dim - d0, kVecs * kLane);
      const int64_t vecs = width / kLane, rest = width % kLane;
      Vec sum[kVecs + 1];
      for (int64_t i = 0; i < ceil_div(width, kLane); ++i) {
        sum[i] = Vec::loadu(o + d0 + i * kLane) * Vec(alpha);
      }
      for (int64_t c = 0; c < cols; ++c) {
        if (probs[c] == A(0)) continue;
        const Vec weight(probs[c]);
        const T* row = v + c * p_.value.row + d0;
        if (vecs == kVecs) {
#pragma GCC unroll 8
          for (int i = 0; i < kVecs; ++i) {
            sum[i] = at::vec::fmadd(weight, load_vec(row + i * kLane), sum[i]);
          }
          continue;
        }
        for (int64_t i = 0; i < vecs; ++i) {
          sum[i] = at::vec::fmadd(weight, load_vec(row + i * kLane), sum[i]);
        }
        if (rest) sum[vecs] = at::vec::fmadd(weight, load_vec(row + vecs * kLane, rest), sum[vecs]);
      }
      for (int64_t i = 0; i < ceil_div(width, kLane); ++i) sum[i].store(o + d0 + i * kLane);
    }
  }

  const Problem<T>& p_;
  const Parts& parts_;
  Scores<T> scores_;
  int64_t depth_;
  Buffer<A> q_, s_;
};

// The query heads of one kv head.
template <typename T, typename C>
class HeadForward {
 public:
  explicit HeadForward(const Output<T>& output)
      : p_(output.p), output_(output), task_(output_), keys_(p_, 1) {}

  void run(int64_t b, int64_t kv) {
    if (FewRows<T>::serves(p_)) {
      const typename FewRows<T>::Parts parts(p_, 1);
      FewRows<T> few(p_, parts);
      for (int64_t split = 0; split < parts.splits; ++split) few.run(b, kv, 0, split);
      FewRows<T>::finish(parts, output_, b, kv, 0);
      return;
    }
    for (int64_t j = 0; j < p_.key_blocks; ++j) keys_.pack(b, kv, j, 0);
    for (int64_t n = 0; n < p_.group * p_.query_blocks; ++n) {
      task_.run(b, kv * p_.group + n / p_.query_blocks, n % p_.query_blocks, keys_, 0);
    }
  }

 private:
  const Problem<T>& p_;
  const Output<T> output_;
  Forward<T, C> task_;
  const Keys<T, C> keys_;
};

template <typename T>
void forward(const Output<T>& output) {
  const Problem<T>& p = output.p;
  const int64_t kv_heads = p.batch * p.kv_heads;
  const double work = static_cast<double>(p.queries) * p.keys * (p.dim + p.value_dim) * p.group;
  if (FewRows<T>::serves(p)) {
    const typename FewRows<T>::Parts parts(p, kv_heads);
    at::parallel_for(0, kv_heads * parts.splits, grain(work / parts.splits),
                     [&](int64_t begin, int64_t end) {
                       FewRows<T> task(p, parts);
                       for (int64_t t = begin; t < end; ++t) {
                         const int64_t head = t / parts.splits;
                         task.run(head / p.kv_heads, head % p.kv_heads, head, t % parts.splits);
                       }
                     });
    for (int64_t head = 0; head < kv_heads; ++head) {
      FewRows<T>::finish(parts, output, head / p.kv_heads, head % p.kv_heads, head);
    }
    return;
  }
  visit_tile_type<T>([&](auto tag) {
    using C = decltype(tag);
    if (whole_heads(kv_heads, 1.1)) {
      at::parallel_for(0, kv_heads, grain(work), [&](int64_t begin, int64_t end) {
        HeadForward<T, C> task(output);
        for (int64_t t = begin; t < end; ++t) task.run(t / p.kv_heads, t % p.kv_heads);
        release_tiles();
      });
      return;
    }
    const Keys<T, C> keys(p, kv_heads);
    at::parallel_for(0, kv_heads * p.key_blocks, 4, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t slot = t / p.key_blocks;
        keys.pack(slot / p.kv_heads, slot % p.kv_heads, t % p.key_blocks, slot);
      }
    });
    const int64_t tasks = p.batch * p.heads * p.query_blocks;
    at::parallel_for(
        0, tasks, grain(work / p.group / p.query_blocks), [&](int64_t begin, int64_t end) {
          Forward<T, C> task(output);
          for (int64_t t = begin; t < end; ++t) {
            const int64_t head = t / p.query_blocks, b = head / p.heads, h = head % p.heads;
            task.run(b, h, balanced(t % p.query_blocks, p.query_blocks), keys,
                     b * p.kv_heads + h / p.group);
          }
          release_tiles();
        });
  });
}

std::tuple<at::Tensor, at::Tensor> attention_forward_cpu(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const std::optional<at::Tensor>& attn_mask, const std::optional<at::Tensor>& alibi_slopes,
    const std::optional<at::Tensor>& sinks, const std::optional<at::Tensor>& seed, double dropout_p,
    double scale, double softcap, bool bottom_right, int64_t window_left, int64_t window_right) {
  const Options options{attn_mask, alibi_slopes, sinks,        seed,        dropout_p,
                        scale,     softcap,      bottom_right, window_left, window_right};
  check_attention("attention_forward", query, key, value, options);
  const auto type = query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  at::Tensor out =
      empty_tensor({query.size(0), query.size(1), query.size(2), value.size(3)}, query.options());
  at::Tensor lse =
      at::empty({query.size(0), query.size(1), query.size(2)}, query.options().dtype(type));
  if (lse.numel() == 0) return {out, lse};
  visit_float(query.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const Problem<T> problem(query, key, value, options);
    forward<T>({problem, View<T>(out.mutable_data_ptr<T>(), out),
                lse.mutable_data_ptr<accumulate_t<T>>()});
  });
  return {out, lse};
}

std::tuple<at::Tensor, at::Tensor> varlen_attention_forward_cpu(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& cu_seqlens_q, const at::Tensor& cu_seqlens_k, int64_t max_seqlen_q,
    int64_t max_seqlen_k, const std::optional<at::Tensor>& alibi_slopes,
    const std::optional<at::Tensor>& sinks, const std::optional<at::Tensor>& seed, double dropout_p,
    double scale, double softcap, bool bottom_right, int64_t window_left, int64_t window_right) {
  const std::optional<at::Tensor> mask;
  const Options options{mask,  alibi_slopes, sinks,        seed,        dropout_p,
                        scale, softcap,      bottom_right, window_left, window_right};
  const Sequences sequences("varlen_attention_forward", query, key, value, cu_seqlens_q,
                            cu_seqlens_k, max_seqlen_q, max_seqlen_k, options);
  const auto type = query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  at::Tensor out = empty_tensor({query.size(0), query.size(1), value.size(2)}, query.options());
  at::Tensor lse = at::empty({query.size(1), query.size(0)}, query.options().dtype(type));
  if (lse.numel() == 0) return {out, lse};
  visit_float(query.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const Problem<T> all = sequences.all<T>(query, key, value, options);
    const Output<T> output{all, View<T>(out.mutable_data_ptr<T>(), by_head(out)),
                           lse.mutable_data_ptr<accumulate_t<T>>()};
    visit_tile_type<T>([&](auto tile_tag) {
      using C = decltype(tile_tag);
      sequences.run(
          all, [&](const Problem<T>& p) { forward<T>(output.of(p)); },
          [&](const Problem<T>& p) { return HeadForward<T, C>(output.of(p)); });
    });
  });
  return {out, lse};
}

}  // namespace
}  // namespace attention
}  // namespace CPU_CAPABILITY
}  // namespace fastnn

FASTNN_CPU_KERNELS(m) {
  m.impl("attention_forward", fastnn::attention::attention_forward_cpu);
  m.impl("varlen_attention_forward", fastnn::attention::varlen_attention_forward_cpu);
}
