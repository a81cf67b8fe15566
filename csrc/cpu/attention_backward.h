// The tile of attention's backward: its packed operands, P and dS, and what is added up from them.
#pragma once

#include <array>

#include "attention_pack.h"
#include "attention_tile.h"

namespace fastnn {
inline namespace CPU_CAPABILITY {
namespace attention {

template <typename T>
struct Inputs {
  using A = accumulate_t<T>;
  const Problem<T>& p;
  View<const T> grad_out;
  const A* row_lse;  // +inf for a row that saw no key: all its P are then 0
  const A* delta;
  const A* grad_lse;  // or null
  A* row_dot;         // or null: gets rowsum(P keep dP), what delta is before O is rounded

  // The same of a part of the problem.
  Inputs of(const Problem<T>& part) const {
    return {part, grad_out, row_lse, delta, grad_lse, row_dot};
  }
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
    const int64_t k0 = p.first_key + j * p.key_block, cols = p.cols_of(j);
    const T* key = p.key.at(b, kv, k0);
    pack_b<T, C>(key, p.key.col, p.key.row, p.dim, cols, kt.get() + slot * size_kt);
    pack_b<T, C>(p.value.at(b, kv, k0), p.value.col, p.value.row, p.value_dim, cols,
                 vt.get() + slot * size_vt);
    C* packed = k.get() + slot * size_k;
    pack_lines<T, C>(key, p.key.row, p.key.col, cols, p.dim, packed);
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
    const int64_t rows = p.rows_of(i), row = p.first_row + i * kQueryBlock;
    C* q_rows = q.get() + slot * block * depth;
    C* go_rows = go.get() + slot * block * value_depth;
    load_rows<T, C>(p.query.at(b, h, row), p.query.row, p.query.col, rows, p.dim, q_rows, depth);
    load_rows<T, C>(in.grad_out.at(b, h, row), in.grad_out.row, in.grad_out.col, rows, p.value_dim,
                    go_rows, value_depth);
    turn(q_rows, depth, rows, p.dim, qt.get() + slot * block * p.dim);
    turn(go_rows, value_depth, rows, p.value_dim, got.get() + slot * block * p.value_dim);
    q_finite.get()[slot] = all_finite(q_rows, rows * depth);
    go_finite.get()[slot] = all_finite(go_rows, rows * value_depth);
  }

 private:
  // cols x rows, zeros up to pad_k(rows)
  void turn(const C* src, int64_t ld, int64_t rows, int64_t cols, C* dst) const {
    transpose(src, ld, dst, block, rows, cols);
    for (int64_t c = 0; c < cols && rows < pad_k<C>(rows); ++c) dst[c * block + rows] = C(0);
  }
};

// Rounded to bfloat16 for the GEMMs, P and dS bring sqrt(2) times the error of gradients that only
// the result is rounded of, on any length. From this many rows or keys on, each is the sum of two
// bfloat16, which brings 1.02 times that error for 1.35 times the time of forward + backward.
inline constexpr int64_t kSplitFrom = 4097;

// One thread's tile of P and dS, and what is added up from it.
template <typename T, typename C>
class BackwardTile {
 public:
  using A = accumulate_t<T>;
  using Vec = Vectorized<A>;

  BackwardTile(const Inputs<T>& in, const KeySide<T, C>& keys, const QuerySide<T, C>& queries)
      : in_(in),
        p_(in.p),
        keys_(keys),
        queries_(queries),
        scores_(p_),
        ld_(p_.key_block),
        parts_(parts_of(p_)),
        p_tile_(ld_),
        ds_tile_(ld_),
        p_packed_{TileBuffer<C>(kInPlace ? 0 : ld_), TileBuffer<C>(parts_ < 2 ? 0 : ld_)},
        ds_packed_{TileBuffer<C>(kInPlace ? 0 : ld_), TileBuffer<C>(parts_ < 2 ? 0 : ld_)},
        ds_rows_{Buffer<C>(kQueryBlock * ld_), Buffer<C>(parts_ < 2 ? 0 : kQueryBlock * ld_)},
        capped_(p_.softcap ? ld_ : 0) {}

  // P keep (less its scale) and dS of query block i of head h against key block j; dS is the
  // gradient of the scores before the mask was added if `at_mask`, else that of scale q k^T.
  // Whether any of the tile is seen.
  bool run(int64_t b, int64_t h, int64_t i, int64_t j, int64_t key_slot, int64_t query_slot,
           bool at_mask) {
    if (!scores_.move_to(b, h, i, j)) return false;
    const Tile& t = scores_.tile();
    parts_ = parts_of(p_);
    key_slot_ = key_slot;
    query_slot_ = query_slot;
    tile_products<C>(t, p_.dim, queries_.q.get() + query_slot * queries_.block * queries_.depth,
                     queries_.depth, keys_.kt.get() + key_slot * keys_.size_kt, p_tile_.get());
    tile_products<C>(
        t, p_.value_dim, queries_.go.get() + query_slot * queries_.block * queries_.value_depth,
        queries_.value_depth, keys_.vt.get() + key_slot * keys_.size_vt, ds_tile_.get());
    whole_ = p_.first_block(i) + 1 == p_.last_block(i);
    through_cap_ = p_.softcap && !at_mask;
    floats_ = at_mask || !keys_.k_finite.get()[key_slot] || !queries_.q_finite.get()[query_slot] ||
              !queries_.go_finite.get()[query_slot];
    for (int64_t r = 0; r < t.rows; r += kRows) {
      const Range& seen = t.of_group[r / kGroup];
      if (seen.empty()) {
        std::fill_n(row_dot_ + r, kRows, A(0));
      } else {
        finish_rows(r, seen);
      }
    }
    return true;
  }

  // dq (rows x dim, or null) += dS K, and the rows' dots
  void add_dq(A* dq) const {
    const Tile& t = scores_.tile();
    if (in_.row_dot) {
      A* dot = in_.row_dot + p_.row_index(t.b, t.h, t.q0);
      for (int64_t r = 0; r < t.rows; ++r) dot[r] += row_dot_[r];
    }
    if (!dq) return;
    if (keys_.k_finite.get()[key_slot_]) {
      for (int part = 0; part < parts_; ++part) {
        add_rows<C>(t, p_.dim, ds_rows_[part].get(), ld_, keys_.k.get() + key_slot_ * keys_.size_k,
                    dq, p_.dim);
      }
      return;
    }
    for (int64_t panel = t.panels.begin; panel < t.panels.end; ++panel) {
      const Range& rows = t.of_panel[panel];
      const int64_t key = panel * kPanel;
      accumulate_visible(rows.size(), p_.dim, std::min(kPanel, t.cols - key),
                         ds_tile_.get() + tile_offset(panel, rows.begin), kPanel, 1,
                         p_.key.at(t.b, t.h / p_.group, p_.first_key + t.k0 + key), p_.key.row,
                         p_.key.col, dq + rows.begin * p_.dim, p_.dim, 1);
    }
  }

  // dkt (dim x keys) += Q^T dS and dvt (value_dim x keys) += dO^T (P keep)
  void add_dkv(A* dkt, A* dvt) const {
    const int64_t block = queries_.block;
    if (dkt) {
      add_columns(p_.dim, queries_.qt.get() + query_slot_ * block * p_.dim,
                  queries_.q_finite.get()[query_slot_], p_.query, ds_tile_.get(), ds_packed_, dkt);
    }
    if (dvt) {
      add_columns(p_.value_dim, queries_.got.get() + query_slot_ * block * p_.value_dim,
                  queries_.go_finite.get()[query_slot_], in_.grad_out, p_tile_.get(), p_packed_,
                  dvt);
    }
  }

  // sum += dS, over rows or columns where the mask is broadcast along them
  void add_mask(A* sum, bool one_row, bool one_col) const {
    const Tile& t = scores_.tile();
    for (int64_t r = 0; r < t.rows; ++r) {
      const Range& seen = t.of_group[r / kGroup];
      for (int64_t panel = seen.begin; panel < seen.end; ++panel) {
        const A* ds = ds_tile_.get() + tile_offset(panel, r);
        A* to = sum + (one_row ? 0 : r * ld_) + (one_col ? 0 : panel * kPanel);
        const int64_t cols = std::min(kPanel, t.cols - panel * kPanel);
        for (int64_t c = 0; c < cols; ++c) to[one_col ? 0 : c] += ds[c];
      }
    }
  }

 private:
  // A packed operand of floats is the tile itself; of bfloat16, lines are pairs of rows.
  static constexpr bool kInPlace = std::is_same_v<A, C>;
  static constexpr int64_t kRows = kInPlace ? 1 : 2;
  static constexpr int64_t kLane = Vec::size();

  static int parts_of(const Problem<T>& p) {
    return kInPlace || std::max(p.queries, p.keys) < kSplitFrom ? 1 : 2;
  }

  // Rows [r, r + kRows) from products to P and dS; a row past the last is all 0.
  void finish_rows(int64_t r, const Range& seen) {
    const Tile& t = scores_.tile();
    constexpr int64_t kStride = tile_offset(1, 0);
    const bool dropout = p_.dropout, cap = through_cap_, floats = floats_;
    Vec lse[kRows], delta[kRows];
    uint64_t keep[kRows][kKeepWords];
    for (int64_t i = 0; i < kRows; ++i) {
      A* s = p_tile_.get() + tile_offset(0, r + i);
      if (r + i == t.rows) {
        for (int64_t panel = seen.begin; panel < seen.end; ++panel) {
          std::fill_n(s + panel * kStride, kPanel, -kInfinity<A>);
        }
        lse[i] = delta[i] = Vec(A(0));
        continue;
      }
      scores_.finish_row(r + i, seen, s, kStride,
                         p_.softcap ? capped_.get() + tile_offset(0, r + i) : nullptr);
      if (dropout) draw_keep(p_, t, r + i, seen, keep[i]);
      const int64_t row = p_.row_index(t.b, t.h, t.q0 + r + i);
      A row_lse = in_.row_lse[row];
      delta[i] = Vec(whole_ || in_.row_dot ? own_delta(r + i, seen, keep[i]) : in_.delta[row]);
      if (std::isnan(row_lse)) {
        spread_nan(s, seen);
        row_lse = 0;
      }
      lse[i] = Vec(-row_lse);
    }
    const Vec factor(p_.factor()), one(A(1));
    const Vec kept_scale(dropout ? static_cast<A>(p_.rate.scale) : A(1));
    const Vec inverse_cap(cap ? 1 / p_.softcap : A(0));
    for (int64_t panel = seen.begin; panel < seen.end; ++panel) {
      const int64_t line = tile_offset(panel, r);
      for (int64_t c = 0; c < kPanel; c += kLane) {
        Vec prob[kRows], grad[kRows];
        for (int64_t i = 0; i < kRows; ++i) {
          const int64_t at = line + i * kPanel + c;
          const Vec x = exp_below(at::vec::fmadd(Vec::loadu(p_tile_.get() + at), factor, lse[i]));
          prob[i] = x;
          grad[i] = Vec::loadu(ds_tile_.get() + at);
          if (dropout) {
            prob[i] = keep_lanes(x, keep[i][panel] >> c);
            grad[i] = keep_lanes(grad[i], keep[i][panel] >> c);
          }
          grad[i] = x * at::vec::fmsub(grad[i], kept_scale, delta[i]);
          if (cap) {
            const Vec tanh = Vec::loadu(capped_.get() + at) * inverse_cap;
            grad[i] = grad[i] * (one - tanh * tanh);
          }
          grad[i] = where_seen(x, grad[i]);
          if (kInPlace || floats) {
            prob[i].store(p_tile_.get() + at);
            grad[i].store(ds_tile_.get() + at);
          }
        }
        store_rows(r, panel * kPanel + c, line + c * kRows, prob, grad);
      }
    }
  }

#if defined(CPU_CAPABILITY_AVX512)
  // What two vectors lost when they were rounded to bfloat16.
  static __m512i rounded_off(const Vec* x, const __m512i& rounded) {
    const auto wide = [](const __m256i& half) {
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    };
    return to_bf16(_mm512_sub_ps(x[0], wide(_mm512_castsi512_si256(rounded))),
                   _mm512_sub_ps(x[1], wide(_mm512_extracti64x4_epi64(rounded, 1))));
  }
#endif

  // P and dS as the GEMMs take them: columns from c on of rows from r on, `at` in their panel.
  void store_rows(int64_t r, int64_t c, int64_t at, const Vec* prob, const Vec* grad) const {
    if constexpr (kInPlace) {
      grad[0].store(ds_rows_[0].get() + r * ld_ + c);
    } else {
#if defined(CPU_CAPABILITY_AVX512)
      alignas(64) static constexpr auto kPairs = [] {
        std::array<uint16_t, 32> order{};
        for (int i = 0; i < 32; ++i) order[i] = i / 2 + i % 2 * 16;
        return order;
      }();
      const __m512i pairs = _mm512_load_si512(kPairs.data());
      __m512i p = to_bf16(prob[0], prob[1]), ds = to_bf16(grad[0], grad[1]);
      for (int part = 0; part < parts_; ++part) {
        if (part) {
          p = rounded_off(prob, p);
          ds = rounded_off(grad, ds);
        }
        _mm512_storeu_si512(p_packed_[part].get() + at, _mm512_permutexvar_epi16(pairs, p));
        _mm512_storeu_si512(ds_packed_[part].get() + at, _mm512_permutexvar_epi16(pairs, ds));
        C* rows = ds_rows_[part].get() + r * ld_ + c;
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(rows), _mm512_castsi512_si256(ds));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(rows + ld_),
                            _mm512_extracti64x4_epi64(ds, 1));
      }
#endif
    }
  }

  // A row whose lse is NaN has NaN for the probabilities of the keys it sees, and of no others.
  static void spread_nan(A* s, const Range& seen) {
    const Vec nan(std::numeric_limits<A>::quiet_NaN()), hidden(-kInfinity<A>);
    for (int64_t panel = seen.begin; panel < seen.end; ++panel) {
      for (int64_t c = 0; c < kPanel; c += kLane) {
        A* at = s + tile_offset(panel, 0) + c;
        const Vec x = Vec::loadu(at);
        Vec::blendv(nan, x, x == hidden).store(at);
      }
    }
  }

  // Row r's rowsum(P keep dP). Where the tile holds all that the row sees, its own sums give delta
  // without the rounding of O and lse, which would not cancel in rows of a few keys.
  A own_delta(int64_t r, const Range& seen, const uint64_t* keep) {
    const Tile& t = scores_.tile();
    const int64_t row = p_.row_index(t.b, t.h, t.q0 + r);
    const Vec factor(p_.factor()), lse(-in_.row_lse[row]);
    Vec dots(A(0)), sums(A(0));
    for (int64_t panel = seen.begin; panel < seen.end; ++panel) {
      for (int64_t c = 0; c < kPanel; c += kLane) {
        const int64_t at = tile_offset(panel, r) + c;
        const Vec prob = exp_below(at::vec::fmadd(Vec::loadu(p_tile_.get() + at), factor, lse));
        Vec grad = where_seen(prob, prob * Vec::loadu(ds_tile_.get() + at));
        if (p_.dropout) grad = keep_lanes(grad, keep[panel] >> c);
        dots = dots + grad;
        sums = sums + prob;
      }
    }
    const auto add = [](const Vec& x, const Vec& y) { return x + y; };
    A dot = at::vec::vec_reduce_all<A>(add, dots);
    if (p_.dropout) dot *= static_cast<A>(p_.rate.scale);
    row_dot_[r] = dot;
    if (!whole_) return in_.delta[row];
    A total = at::vec::vec_reduce_all<A>(add, sums);
    if (p_.sinks) total += std::exp(p_.sinks[t.b * p_.heads + t.h] - in_.row_lse[row]);
    const A own = total == A(0) ? A(0) : dot / total;
    return in_.grad_lse ? own - in_.grad_lse[row] : own;
  }

  // sum (n x keys) += B^T X for X = P or dS as floats and packed, where b (rows x n) holds B and bt
  // its transpose.
  void add_columns(int64_t n, const C* bt, bool finite, const View<const T>& b, const A* x,
                   const TileBuffer<C>* packed, A* sum) const {
    const Tile& t = scores_.tile();
    for (int64_t panel = t.panels.begin; panel < t.panels.end; ++panel) {
      const Range& rows = t.of_panel[panel];
      const int64_t at = tile_offset(panel, rows.begin), col = panel * kPanel;
      if (rows.empty()) continue;
      if (finite) {
        if constexpr (kInPlace) {
          tile_gemm<C>(n, t.width_of(panel), rows.size(), bt + rows.begin, queries_.block, x + at,
                       sum + col, ld_, true);
        } else {
          for (int part = 0; part < parts_; ++part) {
            tile_gemm<C>(n, t.width_of(panel), rows.size(), bt + rows.begin, queries_.block,
                         packed[part].get() + at, sum + col, ld_, true);
          }
        }
      } else {
        accumulate_visible(std::min(kPanel, t.cols - col), n, rows.size(), x + at, 1, kPanel,
                           b.at(t.b, t.h, p_.first_row + t.q0 + rows.begin), b.row, b.col,
                           sum + col, 1, ld_);
      }
    }
  }

  const Inputs<T>& in_;
  const Problem<T>& p_;
  const KeySide<T, C>& keys_;
  const QuerySide<T, C>& queries_;
  Scores<T> scores_;
  int64_t ld_;
  int parts_;
  TileBuffer<A> p_tile_, ds_tile_;
  TileBuffer<C> p_packed_[2], ds_packed_[2];
  Buffer<C> ds_rows_[2];  // row by row
  TileBuffer<A> capped_;
  A row_dot_[kQueryBlock + 1];
  bool whole_ = false, through_cap_ = false, floats_ = false;
  int64_t key_slot_ = 0, query_slot_ = 0;
};

}  // namespace attention
}  // namespace CPU_CAPABILITY
}  // namespace fastnn
