// Attention backward: for P = exp(S - lse) recomputed tile by tile, keep the replayed dropout mask,
//   dV = (P keep)^T dO,  dS = P (keep dO V^T - delta),  delta = rowsum(dO O) - grad_lse,
//   dQ = scale dS' K,  dK = scale dS'^T Q,  dmask = dS,
//   dsink = -sum(exp(sink - lse) delta)
//   with dS' = dS softcap'. FlashAttention-2 (Dao 2023, algorithm 2) without its atomics.
//   Work: one task per (batch, kv head), key blocks outside, query blocks inside, dQ in a float
//   buffer (five GEMMs a tile); where that leaves threads idle, key blocks are tasks for dK and dV,
//   then query blocks for dQ (seven). Both add in the same order: no bit depends on the threads.
//   The mask's gradient is a further pass over the mask's own tiles, summing what it is broadcast
//   to. Memory: packed operands in flight, linear in the sequence. dK, dV are held transposed.
//   Numerics: gradients accumulate in float (double for double); P and dS are rounded for the
//   GEMMs.
#include <ATen/ExpandUtils.h>
#include <ATen/ops/zeros.h>

#include "attention.h"
#include "registry.h"

namespace fastnn {
inline namespace CPU_CAPABILITY {
namespace attention {
namespace {

// Row-major rows x cols into GEMM panels; columns up to the end of the last panel are read.
template <typename A, typename C>
void pack_tile(const A* src, int64_t ld, int64_t rows, int64_t cols, C* packed) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<C, at::BFloat16>) {
    const int64_t depth = pad_k<C>(rows);
    const auto rounded = [](const float* p) {
      const __m512 x = _mm512_loadu_ps(p);
      const __m512i bits = _mm512_castps_si512(x);
      const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
      const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
      return _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), up,
                                     _mm512_set1_epi32(0x7FC00000));
    };
    for (int64_t r = 0; r < rows; r += 2) {
      const float* row = src + r * ld;
      for (int64_t c = 0; c < panels(cols) * kPanel; c += 16) {
        const __m512i low = _mm512_srli_epi32(rounded(row + c), 16);
        __m512i high = _mm512_setzero_si512();
        if (r + 1 < rows) {
          high = _mm512_and_si512(rounded(row + ld + c), _mm512_set1_epi32(0xFFFF0000));
        }
        _mm512_storeu_si512(packed + c / kPanel * kPanel * depth + r * kPanel + c % kPanel * 2,
                            _mm512_or_si512(low, high));
      }
    }
    return;
  }
#endif
  pack_b<A, C>(src, ld, 1, rows, cols, packed);
}

template <typename T>
struct Inputs {
  using A = accumulate_t<T>;
  const Problem<T>& p;
  View<const T> grad_out;
  const A* row_lse;  // +inf for a row that saw no key: all its P are then 0
  const A* delta;
  const A* grad_lse;  // or null
  A* row_dot;         // or null: gets rowsum(P keep dP), what delta is before O is rounded
};

// The GEMM operands of key blocks: K^T and V^T for the scores and dP, K for dQ.
template <typename T, typename C>
struct KeySide {
  const Problem<T>& p;
  int64_t size_kt, size_vt, size_k;
  Buffer<C> kt, vt, k;
  Buffer<uint8_t> k_finite;

  KeySide(const Problem<T>& p, int64_t count)
      : p(p),
        size_kt(packed_size<C>(p.dim, p.key_block)),
        size_vt(packed_size<C>(p.value_dim, p.key_block)),
        size_k(packed_size<C>(p.key_block, p.dim)),
        kt(count * size_kt),
        vt(count * size_vt),
        k(count * size_k),
        k_finite(count) {}

  void pack(int64_t b, int64_t kv, int64_t j, int64_t slot) const {
    const int64_t k0 = j * p.key_block, cols = p.cols_of(j);
    const T* key = p.key.at(b, kv, k0);
    pack_b<T, C>(key, p.key.col, p.key.row, p.dim, cols, kt.get() + slot * size_kt);
    pack_b<T, C>(p.value.at(b, kv, k0), p.value.col, p.value.row, p.value_dim, cols,
                 vt.get() + slot * size_vt);
    C* packed = k.get() + slot * size_k;
    pack_b<T, C>(key, p.key.row, p.key.col, cols, p.dim, packed);
    k_finite.get()[slot] = all_finite(packed, packed_size<C>(cols, p.dim));
  }
};

// The GEMM operands of query blocks: Q and dO, and their transposes for dK and dV.
template <typename T, typename C>
struct QuerySide {
  const Inputs<T>& in;
  int64_t block, depth, value_depth;
  Buffer<C> q, go, qt, got;
  Buffer<uint8_t> q_finite, go_finite;

  QuerySide(const Inputs<T>& in, int64_t count)
      : in(in),
        block(pad_k<C>(std::min(in.p.queries, kQueryBlock))),
        depth(pad_k<C>(in.p.dim)),
        value_depth(pad_k<C>(in.p.value_dim)),
        q(count * block * depth),
        go(count * block * value_depth),
        qt(count * block * in.p.dim),
        got(count * block * in.p.value_dim),
        q_finite(count),
        go_finite(count) {}

  void load(int64_t b, int64_t h, int64_t i, int64_t slot) const {
    const auto& p = in.p;
    const int64_t rows = p.rows_of(i), padded = pad_k<C>(rows);
    C* q_rows = q.get() + slot * block * depth;
    C* go_rows = go.get() + slot * block * value_depth;
    load_rows<T, C>(p.query.at(b, h, i * kQueryBlock), p.query.row, p.query.col, rows, p.dim,
                    q_rows, depth);
    load_rows<T, C>(in.grad_out.at(b, h, i * kQueryBlock), in.grad_out.row, in.grad_out.col, rows,
                    p.value_dim, go_rows, value_depth);
    transpose<C, C>(q_rows, depth, 1, rows, p.dim, qt.get() + slot * block * p.dim, block, padded);
    transpose<C, C>(go_rows, value_depth, 1, rows, p.value_dim,
                    got.get() + slot * block * p.value_dim, block, padded);
    q_finite.get()[slot] = all_finite(q_rows, rows * depth);
    go_finite.get()[slot] = all_finite(go_rows, rows * value_depth);
  }
};

// One thread's tile of P and dS, and what is added up from it.
template <typename T, typename C>
class Backward {
 public:
  using A = accumulate_t<T>;
  using Vec = Vectorized<A>;

  Backward(const Inputs<T>& in, const KeySide<T, C>& keys, const QuerySide<T, C>& queries)
      : in_(in),
        p_(in.p),
        keys_(keys),
        queries_(queries),
        ld_(p_.key_block),
        p_tile_(tile_size()),
        ds_tile_(tile_size()),
        ds_rounded_(tile_size()),
        packed_(tile_size()),
        capped_(p_.softcap ? tile_size() : 0),
        bias_(ld_),
        keep_(ld_) {}

  // P keep and dS of a tile; dS is the gradient of the scores before the mask was added if
  // `at_mask`, else that of scale q k^T.
  void run(const Tile& t, int64_t key_slot, int64_t query_slot, bool at_mask) {
    tile_ = t;
    key_slot_ = key_slot;
    query_slot_ = query_slot;
    A* s = p_tile_.get();
    A* ds = ds_tile_.get();
    tile_gemm<C>(t.rows, t.cols, p_.dim,
                 queries_.q.get() + query_slot * queries_.block * queries_.depth, queries_.depth,
                 keys_.kt.get() + key_slot * keys_.size_kt, s, ld_, false);
    tile_gemm<C>(t.rows, t.cols, p_.value_dim,
                 queries_.go.get() + query_slot * queries_.block * queries_.value_depth,
                 queries_.value_depth, keys_.vt.get() + key_slot * keys_.size_vt, ds, ld_, false);
    finish_scores<T>(p_, t, s, ld_, bias_.get(), p_.softcap ? capped_.get() : nullptr);
    const int64_t width = round_up(t.cols, kRowPad);
    const int64_t i = t.q0 / kQueryBlock;
    const bool whole = p_.first_block(i) + 1 == p_.last_block(i);
    const bool through_cap = p_.softcap && !at_mask;
    const Vec factor(p_.factor()), zero(A(0)), one(A(1));
    const Vec inverse_cap(through_cap ? 1 / p_.softcap : A(0));
    for (int64_t r = 0; r < t.rows; ++r) {
      const int64_t row = p_.row_index(t.b, t.h, t.q0 + r);
      if (p_.dropout) {
        dropout_row(p_.philox, p_.rate, row, p_.keys, t.k0, width, keep_.get());
      }
      const Vec lse(-in_.row_lse[row]);
      Vec dot(A(0)), sum(A(0));
      A* probs = keep_.get();  // each takes the place of the mask's element that it was made with
      for (int64_t c = 0; c < width; c += Vec::size()) {
        const int64_t at = r * ld_ + c;
        const Vec prob = exp_below(at::vec::fmadd(Vec::loadu(s + at), factor, lse));
        Vec grad = Vec::loadu(ds + at);
        Vec kept = prob;
        if (p_.dropout) {
          const Vec keep = Vec::loadu(probs + c);
          grad = grad * keep;
          kept = prob * keep;
        }
        // A hidden key's dP may be NaN: its gradient is 0 all the same.
        dot = dot + Vec::blendv(prob * grad, zero, prob == zero);
        sum = sum + prob;
        prob.store(probs + c);
        kept.store(s + at);
        grad.store(ds + at);
      }
      const auto add = [](const Vec& x, const Vec& y) { return x + y; };
      row_dot_[r] = at::vec::vec_reduce_all<A>(add, dot);
      // Where the tile holds all that the row sees, its own sums give delta without the rounding of
      // O and lse, which would not cancel in rows of a few keys.
      A own = in_.delta[row];
      if (whole) {
        A total = at::vec::vec_reduce_all<A>(add, sum);
        if (p_.sinks) total += std::exp(p_.sinks[t.b * p_.heads + t.h] - in_.row_lse[row]);
        own = total == A(0) ? A(0) : row_dot_[r] / total;
        if (in_.grad_lse) own -= in_.grad_lse[row];
      }
      const Vec delta(own);
      for (int64_t c = 0; c < width; c += Vec::size()) {
        const int64_t at = r * ld_ + c;
        const Vec prob = Vec::loadu(probs + c);
        Vec grad = Vec::blendv(prob * (Vec::loadu(ds + at) - delta), zero, prob == zero);
        if (through_cap) {
          const Vec tanh = Vec::loadu(capped_.get() + at) * inverse_cap;
          grad = grad * (one - tanh * tanh);
        }
        grad.store(ds + at);
        if constexpr (!std::is_same_v<A, C>) store_vec<C>(ds_rounded_.get() + at, grad);
      }
    }
  }

  // dq (rows x dim, or null) += dS K, and the rows' dots
  void add_dq(A* dq) const {
    const Tile& t = tile_;
    if (in_.row_dot) {
      A* dot = in_.row_dot + p_.row_index(t.b, t.h, t.q0);
      for (int64_t r = 0; r < t.rows; ++r) dot[r] += row_dot_[r];
    }
    if (!dq) return;
    if (keys_.k_finite.get()[key_slot_]) {
      gemm_first_rows<C>(t.rows, p_.dim, t.cols, rounded(), ld_,
                         keys_.k.get() + key_slot_ * keys_.size_k, p_.cols_of(t.k0 / ld_), dq,
                         p_.dim);
    } else {
      accumulate_visible(t.rows, p_.dim, t.cols, ds_tile_.get(), ld_, 1,
                         p_.key.at(t.b, t.h / p_.group, t.k0), p_.key.row, p_.key.col, dq, p_.dim,
                         1);
    }
  }

  // dkt (dim x keys) += Q^T dS and dvt (value_dim x keys) += dO^T (P keep)
  void add_dkv(A* dkt, A* dvt) const {
    const Tile& t = tile_;
    const int64_t block = queries_.block;
    if (dkt && queries_.q_finite.get()[query_slot_]) {
      pack_tile<A, C>(ds_tile_.get(), ld_, t.rows, t.cols, packed_.get());
      tile_gemm<C>(p_.dim, t.cols, t.rows, queries_.qt.get() + query_slot_ * block * p_.dim, block,
                   packed_.get(), dkt, ld_, true);
    } else if (dkt) {
      accumulate_visible(t.cols, p_.dim, t.rows, ds_tile_.get(), 1, ld_,
                         p_.query.at(t.b, t.h, t.q0), p_.query.row, p_.query.col, dkt, 1, ld_);
    }
    if (dvt && queries_.go_finite.get()[query_slot_]) {
      pack_tile<A, C>(p_tile_.get(), ld_, t.rows, t.cols, packed_.get());
      tile_gemm<C>(p_.value_dim, t.cols, t.rows,
                   queries_.got.get() + query_slot_ * block * p_.value_dim, block, packed_.get(),
                   dvt, ld_, true);
    } else if (dvt) {
      accumulate_visible(t.cols, p_.value_dim, t.rows, p_tile_.get(), 1, ld_,
                         in_.grad_out.at(t.b, t.h, t.q0), in_.grad_out.row, in_.grad_out.col, dvt,
                         1, ld_);
    }
  }

  // sum += dS, over rows or columns where the mask is broadcast along them
  void add_mask(A* sum, bool one_row, bool one_col) const {
    for (int64_t r = 0; r < tile_.rows; ++r) {
      const A* ds = ds_tile_.get() + r * ld_;
      A* to = sum + (one_row ? 0 : r * ld_);
      if (one_col) {
        A total = 0;
        for (int64_t c = 0; c < tile_.cols; ++c) total += ds[c];
        *to += total;
      } else {
        for (int64_t c = 0; c < tile_.cols; ++c) to[c] += ds[c];
      }
    }
  }

 private:
  int64_t tile_size() const { return (kQueryBlock + 1) * ld_; }
  const C* rounded() const {
    if constexpr (std::is_same_v<A, C>) {
      return ds_tile_.get();
    } else {
      return ds_rounded_.get();
    }
  }

  const Inputs<T>& in_;
  const Problem<T>& p_;
  const KeySide<T, C>& keys_;
  const QuerySide<T, C>& queries_;
  int64_t ld_;
  Buffer<A> p_tile_, ds_tile_;
  Buffer<C> ds_rounded_, packed_;
  Buffer<A> capped_, bias_, keep_;
  A row_dot_[kQueryBlock];
  Tile tile_{};
  int64_t key_slot_ = 0, query_slot_ = 0;
};

// Gradients asked for; null where not.
template <typename T>
struct Gradients {
  T *query, *key, *value;
};

template <typename T>
void scale_row(T* out, const accumulate_t<T>* in, accumulate_t<T> scale, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(in[i] * scale);
}

template <typename T>
void write_dq(const Problem<T>& p, const Gradients<T>& grads, int64_t b, int64_t h, int64_t i,
              const accumulate_t<T>* dq) {
  const int64_t row = p.row_index(b, h, i * kQueryBlock);
  scale_row<T>(grads.query + row * p.dim, dq, p.scale, p.rows_of(i) * p.dim);
}

// dK and dV of key block j of a kv head, added up over the group's query blocks.
template <typename T, typename C>
class KeyGradients {
 public:
  using A = accumulate_t<T>;

  KeyGradients(const Problem<T>& p, const Gradients<T>& grads)
      : p_(p), grads_(grads), dkt_(p.dim * p.key_block), dvt_(p.value_dim * p.key_block) {}

  A* dkt() const { return grads_.key ? dkt_.get() : nullptr; }
  A* dvt() const { return grads_.value ? dvt_.get() : nullptr; }
  void clear() const {
    std::fill_n(dkt_.get(), p_.dim * p_.key_block, A(0));
    std::fill_n(dvt_.get(), p_.value_dim * p_.key_block, A(0));
  }
  void write(int64_t b, int64_t kv, int64_t j) const {
    const int64_t row = (b * p_.kv_heads + kv) * p_.keys + j * p_.key_block, ld = p_.key_block;
    if (grads_.key) {
      scale_row<A>(dkt_.get(), dkt_.get(), p_.scale, p_.dim * ld);
      transpose<A, T>(dkt_.get(), ld, 1, p_.dim, p_.cols_of(j), grads_.key + row * p_.dim, p_.dim,
                      p_.dim);
    }
    if (grads_.value) {
      transpose<A, T>(dvt_.get(), ld, 1, p_.value_dim, p_.cols_of(j),
                      grads_.value + row * p_.value_dim, p_.value_dim, p_.value_dim);
    }
  }

 private:
  const Problem<T>& p_;
  const Gradients<T>& grads_;
  Buffer<A> dkt_, dvt_;
};

template <typename T>
bool meet(const Problem<T>& p, int64_t i, int64_t j) {
  return j >= p.first_block(i) && j < p.last_block(i);
}

// One task per kv head: each tile is computed once.
template <typename T, typename C>
void backward_by_head(const Inputs<T>& in, const Gradients<T>& grads, double work) {
  using A = accumulate_t<T>;
  const auto& p = in.p;
  at::parallel_for(0, p.batch * p.kv_heads, grain(work), [&](int64_t begin, int64_t end) {
    const int64_t count = p.group * p.query_blocks, dq_block = kQueryBlock * p.dim;
    const KeySide<T, C> keys(p, 1);
    const QuerySide<T, C> queries(in, count);
    const KeyGradients<T, C> key_grads(p, grads);
    Backward<T, C> task(in, keys, queries);
    const Buffer<A> dq(grads.query ? count * dq_block : 0);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t b = t / p.kv_heads, kv = t % p.kv_heads, first_head = kv * p.group;
      for (int64_t n = 0; n < count; ++n) {
        queries.load(b, first_head + n / p.query_blocks, n % p.query_blocks, n);
      }
      if (grads.query) std::fill_n(dq.get(), count * dq_block, A(0));
      for (int64_t j = 0; j < p.key_blocks; ++j) {
        keys.pack(b, kv, j, 0);
        key_grads.clear();
        for (int64_t n = 0; n < count; ++n) {
          const int64_t h = first_head + n / p.query_blocks, i = n % p.query_blocks;
          if (!meet(p, i, j)) continue;
          task.run(tile_at(p, b, h, i, j), 0, n, false);
          task.add_dkv(key_grads.dkt(), key_grads.dvt());
          task.add_dq(grads.query ? dq.get() + n * dq_block : nullptr);
        }
        key_grads.write(b, kv, j);
      }
      for (int64_t n = 0; grads.query && n < count; ++n) {
        write_dq(p, grads, b, first_head + n / p.query_blocks, n % p.query_blocks,
                 dq.get() + n * dq_block);
      }
    }
    release_tiles();
  });
}

// Operands packed for all heads, then one pass per kind of gradient, each over its own blocks.
template <typename T, typename C>
void backward_by_block(const Inputs<T>& in, const Gradients<T>& grads, accumulate_t<T>* grad_mask,
                       double work) {
  using A = accumulate_t<T>;
  const auto& p = in.p;
  const int64_t all_keys = p.batch * p.kv_heads * p.key_blocks;
  const int64_t all_queries = p.batch * p.heads * p.query_blocks;
  const KeySide<T, C> keys(p, all_keys);
  const QuerySide<T, C> queries(in, all_queries);
  at::parallel_for(0, all_keys, 4, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t head = t / p.key_blocks;
      keys.pack(head / p.kv_heads, head % p.kv_heads, t % p.key_blocks, t);
    }
  });
  at::parallel_for(0, all_queries, 8, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t head = t / p.query_blocks;
      queries.load(head / p.heads, head % p.heads, t % p.query_blocks, t);
    }
  });
  const auto key_slot = [&](int64_t b, int64_t h, int64_t j) {
    return (b * p.kv_heads + h / p.group) * p.key_blocks + j;
  };
  const auto query_slot = [&](int64_t b, int64_t h, int64_t i) {
    return (b * p.heads + h) * p.query_blocks + i;
  };
  if (grads.key || grads.value) {
    at::parallel_for(0, all_keys, grain(work / p.key_blocks), [&](int64_t begin, int64_t end) {
      const KeyGradients<T, C> key_grads(p, grads);
      Backward<T, C> task(in, keys, queries);
      for (int64_t t = begin; t < end; ++t) {
        const int64_t head = t / p.key_blocks, b = head / p.kv_heads, kv = head % p.kv_heads;
        const int64_t j = balanced(t % p.key_blocks, p.key_blocks);
        key_grads.clear();
        for (int64_t n = 0; n < p.group * p.query_blocks; ++n) {
          const int64_t h = kv * p.group + n / p.query_blocks, i = n % p.query_blocks;
          if (!meet(p, i, j)) continue;
          task.run(tile_at(p, b, h, i, j), key_slot(b, h, j), query_slot(b, h, i), false);
          task.add_dkv(key_grads.dkt(), key_grads.dvt());
        }
        key_grads.write(b, kv, j);
      }
      release_tiles();
    });
  }
  if (grads.query || in.row_dot) {
    const double each = work / p.group / p.query_blocks;
    at::parallel_for(0, all_queries, grain(each), [&](int64_t begin, int64_t end) {
      Backward<T, C> task(in, keys, queries);
      const Buffer<A> dq(kQueryBlock * p.dim);
      for (int64_t t = begin; t < end; ++t) {
        const int64_t head = t / p.query_blocks, b = head / p.heads, h = head % p.heads;
        const int64_t i = balanced(t % p.query_blocks, p.query_blocks);
        std::fill_n(dq.get(), kQueryBlock * p.dim, A(0));
        for (int64_t j = p.first_block(i); j < p.last_block(i); ++j) {
          task.run(tile_at(p, b, h, i, j), key_slot(b, h, j), query_slot(b, h, i), false);
          task.add_dq(grads.query ? dq.get() : nullptr);
        }
        if (grads.query) write_dq(p, grads, b, h, i, dq.get());
      }
      release_tiles();
    });
  }
  if (!grad_mask) return;
  // A task is a tile of the mask: it alone sums over what the mask is broadcast to.
  const bool one_row = p.mask.sizes[2] == 1, one_col = p.mask.sizes[3] == 1;
  const int64_t row_tasks = one_row ? 1 : p.query_blocks, col_tasks = one_col ? 1 : p.key_blocks;
  const int64_t batches = p.mask.sizes[0], heads = p.mask.sizes[1];
  const int64_t tasks = batches * heads * row_tasks * col_tasks;
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    Backward<T, C> task(in, keys, queries);
    const int64_t ld = p.key_block;
    const Buffer<A> sum(kQueryBlock * ld);
    for (int64_t t = begin; t < end; ++t) {
      const int64_t j0 = t % col_tasks, i0 = t / col_tasks % row_tasks;
      const int64_t h0 = t / col_tasks / row_tasks % heads, b0 = t / col_tasks / row_tasks / heads;
      std::fill_n(sum.get(), kQueryBlock * ld, A(0));
      for (int64_t b = b0; b < p.batch; b += batches) {
        for (int64_t h = h0; h < p.heads; h += heads) {
          for (int64_t i = i0; i < p.query_blocks; i += row_tasks) {
            for (int64_t j = j0; j < p.key_blocks; j += col_tasks) {
              if (!meet(p, i, j)) continue;
              task.run(tile_at(p, b, h, i, j), key_slot(b, h, j), query_slot(b, h, i), true);
              task.add_mask(sum.get(), one_row, one_col);
            }
          }
        }
      }
      const int64_t rows = one_row ? 1 : p.rows_of(i0), cols = one_col ? 1 : p.cols_of(j0);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t row = (b0 * heads + h0) * p.mask.sizes[2] + i0 * kQueryBlock + r;
        std::copy_n(sum.get() + r * ld, cols, grad_mask + row * p.mask.sizes[3] + j0 * ld);
      }
    }
    release_tiles();
  });
}

// delta and the row's lse as the tiles take them.
template <typename T>
void prepare_rows(const Problem<T>& p, const View<const T>& grad_out, const View<const T>& out,
                  const at::Tensor& lse, const at::Tensor& grad_lse, accumulate_t<T>* row_lse,
                  accumulate_t<T>* delta) {
  using A = accumulate_t<T>;
  const A* lse_data = lse.const_data_ptr<A>();
  const A* grad_lse_data = grad_lse.defined() ? grad_lse.const_data_ptr<A>() : nullptr;
  const int64_t heads = p.batch * p.heads;
  at::parallel_for(0, heads, grain(p.queries * p.value_dim), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t q = 0; q < p.queries; ++q) {
        const T* g = grad_out.at(t / p.heads, t % p.heads, q);
        const T* o = out.at(t / p.heads, t % p.heads, q);
        const int64_t row = t * p.queries + q;
        A sum = 0;
        int64_t d = 0;
        if (grad_out.col == 1 && out.col == 1) {
          AccVec<T> lanes(A(0));
          for (; d + kLanes<T> <= p.value_dim; d += kLanes<T>) {
            lanes = at::vec::fmadd(load_vec(g + d), load_vec(o + d), lanes);
          }
          sum = at::vec::vec_reduce_all<A>(
              [](const AccVec<T>& x, const AccVec<T>& y) { return x + y; }, lanes);
        }
        for (; d < p.value_dim; ++d) {
          sum += static_cast<A>(g[d * grad_out.col]) * static_cast<A>(o[d * out.col]);
        }
        delta[row] = grad_lse_data ? sum - grad_lse_data[row] : sum;
        row_lse[row] = lse_data[row] == -kInfinity<A> ? kInfinity<A> : lse_data[row];
      }
    }
  });
}

// Each head's sink: a key of probability exp(sink - lse) whose dP is 0.
template <typename T>
void sink_gradients(const Problem<T>& p, const accumulate_t<T>* row_lse,
                    const accumulate_t<T>* row_dot, const at::Tensor& grad_lse,
                    accumulate_t<T>* grads) {
  using A = accumulate_t<T>;
  const A* grad_lse_data = grad_lse.defined() ? grad_lse.const_data_ptr<A>() : nullptr;
  for (int64_t t = 0; t < p.batch * p.heads; ++t) {
    A sum = 0;
    for (int64_t row = t * p.queries; row < (t + 1) * p.queries; ++row) {
      const A dot = grad_lse_data ? row_dot[row] - grad_lse_data[row] : row_dot[row];
      sum -= std::exp(p.sinks[t] - row_lse[row]) * dot;
    }
    grads[t] = sum;
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> attention_backward_cpu(
    const at::Tensor& grad_out, const std::optional<at::Tensor>& grad_lse, const at::Tensor& query,
    const at::Tensor& key, const at::Tensor& value, const std::optional<at::Tensor>& attn_mask,
    const std::optional<at::Tensor>& alibi_slopes, const std::optional<at::Tensor>& sinks,
    const std::optional<at::Tensor>& seed, const at::Tensor& out, const at::Tensor& lse,
    double dropout_p, double scale, double softcap, bool bottom_right, int64_t window_left,
    int64_t window_right, std::array<bool, 5> output_mask) {
  constexpr const char* op = "attention_backward";
  const Options options{attn_mask, alibi_slopes, sinks,        seed,        dropout_p,
                        scale,     softcap,      bottom_right, window_left, window_right};
  check_attention(op, query, key, value, options);
  const int64_t batch = query.size(0), heads = query.size(1), queries = query.size(2);
  for (const auto& [tensor, name] : {std::pair(&grad_out, "grad_out"), std::pair(&out, "out")}) {
    check_shape(*tensor, {batch, heads, queries, value.size(3)}, op, name);
    check_dtype(*tensor, query.scalar_type(), op, name);
  }
  check_shape(lse, {batch, heads, queries}, op, "lse");
  if (grad_lse.has_value()) check_shape(*grad_lse, lse.sizes(), op, "grad_lse");
  FASTNN_CHECK(!output_mask[3] || attn_mask.has_value(), op, "output_mask[3]",
               "false without attn_mask", true);
  FASTNN_CHECK(!output_mask[4] || sinks.has_value(), op, "output_mask[4]", "false without sinks",
               true);
  const auto wide =
      query.options().dtype(query.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  const bool empty = batch * heads * queries * key.size(2) == 0;
  const auto gradient = [&](bool wanted, const at::Tensor& like) {
    if (!wanted) return at::empty({0}, like.options());
    return empty ? at::zeros(like.sizes(), like.options())
                 : empty_tensor(like.sizes(), like.options());
  };
  at::Tensor grad_query = gradient(output_mask[0], query);
  at::Tensor grad_key = gradient(output_mask[1], key);
  at::Tensor grad_value = gradient(output_mask[2], value);
  at::Tensor grad_mask =
      at::empty({0}, attn_mask.has_value() ? attn_mask->options() : query.options());
  at::Tensor grad_sinks = at::empty({0}, sinks.has_value() ? sinks->options() : query.options());
  const at::Tensor row_lse = at::empty({batch, heads, queries}, wide);
  const at::Tensor delta = at::empty({batch, heads, queries}, wide);
  const at::Tensor row_dot =
      output_mask[4] ? at::zeros({batch, heads, queries}, wide) : at::Tensor();
  visit_float(query.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = accumulate_t<T>;
    const Problem<T> p(query, key, value, options);
    const at::Tensor lse_rows = lse.to(wide).contiguous();
    const at::Tensor grad_lse_rows =
        grad_lse.has_value() ? grad_lse->to(wide).contiguous() : at::Tensor();
    const Inputs<T> in{p,
                       view<T>(grad_out),
                       row_lse.const_data_ptr<A>(),
                       delta.const_data_ptr<A>(),
                       grad_lse_rows.defined() ? grad_lse_rows.const_data_ptr<A>() : nullptr,
                       output_mask[4] ? row_dot.mutable_data_ptr<A>() : nullptr};
    prepare_rows<T>(p, in.grad_out, view<T>(out), lse_rows, grad_lse_rows,
                    row_lse.mutable_data_ptr<A>(), delta.mutable_data_ptr<A>());
    if (output_mask[3]) {
      grad_mask = at::zeros(attn_mask->sizes(), wide);
    }
    const bool inputs = output_mask[0] || output_mask[1] || output_mask[2];
    if (!empty && (inputs || output_mask[3] || output_mask[4])) {
      const Gradients<T> grads{output_mask[0] ? grad_query.mutable_data_ptr<T>() : nullptr,
                               output_mask[1] ? grad_key.mutable_data_ptr<T>() : nullptr,
                               output_mask[2] ? grad_value.mutable_data_ptr<T>() : nullptr};
      const double work =
          2.5 * queries * p.keys * (p.dim + p.value_dim) * std::max<int64_t>(p.group, 1);
      visit_tile_type<T>([&](auto tile_tag) {
        using C = decltype(tile_tag);
        if (output_mask[3] || !whole_heads(batch * p.kv_heads, 1.4)) {
          backward_by_block<T, C>(in, grads,
                                  output_mask[3] ? grad_mask.mutable_data_ptr<A>() : nullptr, work);
        } else {
          backward_by_head<T, C>(in, grads, work);
        }
      });
    }
    if (output_mask[4]) {
      const at::Tensor parts = at::empty({batch, heads}, wide);
      sink_gradients<T>(p, in.row_lse, row_dot.const_data_ptr<A>(), grad_lse_rows,
                        parts.mutable_data_ptr<A>());
      grad_sinks = at::sum_to(parts, sinks->sizes()).to(sinks->scalar_type()).contiguous();
    }
  });
  if (output_mask[3]) grad_mask = grad_mask.to(attn_mask->scalar_type());
  return {grad_query, grad_key, grad_value, grad_mask, grad_sinks};
}

}  // namespace
}  // namespace attention
}  // namespace CPU_CAPABILITY
}  // namespace fastnn

FASTNN_CPU_KERNELS(m) { m.impl("attention_backward", &fastnn::attention::attention_backward_cpu); }
