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
//   GEMMs. Floor: five GEMMs. Of (8,12,512,64) they take 75 % of the time in bfloat16, 86 % in
//   float.
#include "attention_backward.h"

#include <ATen/ExpandUtils.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include "registry.h"
#include "varlen_attention.h"

namespace fastnn {
inline namespace CPU_CAPABILITY {
namespace attention {
namespace {

// Gradients asked for; null where not.
template <typename T>
struct Gradients {
  View<T> query, key, value;
};

// Rows of a gradient, whose columns lie side by side.
template <typename T, typename A>
void write_rows(const View<T>& out, int64_t b, int64_t h, int64_t first, int64_t rows, int64_t cols,
                const A* in, A scale) {
  for (int64_t r = 0; r < rows; ++r, in += cols) {
    T* row = out.at(b, h, first + r);
    for (int64_t i = 0; i < cols; ++i) row[i] = static_cast<T>(in[i] * scale);
  }
}

template <typename T>
void write_dq(const Problem<T>& p, const Gradients<T>& grads, int64_t b, int64_t h, int64_t i,
              const accumulate_t<T>* dq) {
  write_rows(grads.query, b, h, p.first_row + i * kQueryBlock, p.rows_of(i), p.dim, dq, p.scale);
}

// dK and dV of key block j of a kv head, added up over the group's query blocks.
template <typename T, typename C>
class KeyGradients {
 public:
  using A = accumulate_t<T>;

  KeyGradients(const Problem<T>& p, const Gradients<T>& grads)
      : p_(p),
        grads_(grads),
        dkt_(p.dim * p.key_block),
        dvt_(p.value_dim * p.key_block),
        turned_(std::max(p.dim, p.value_dim) * p.key_block) {}

  A* dkt() const { return grads_.key.data ? dkt_.get() : nullptr; }
  A* dvt() const { return grads_.value.data ? dvt_.get() : nullptr; }
  void clear() const {
    std::fill_n(dkt_.get(), p_.dim * p_.key_block, A(0));
    std::fill_n(dvt_.get(), p_.value_dim * p_.key_block, A(0));
  }
  void write(int64_t b, int64_t kv, int64_t j) const {
    const A kept = p_.dropout ? static_cast<A>(p_.rate.scale) : A(1);
    if (grads_.key.data) write(dkt_.get(), p_.dim, b, kv, j, p_.scale, grads_.key);
    if (grads_.value.data) write(dvt_.get(), p_.value_dim, b, kv, j, kept, grads_.value);
  }

 private:
  void write(const A* sum, int64_t n, int64_t b, int64_t kv, int64_t j, A scale,
             const View<T>& out) const {
    transpose(sum, p_.key_block, turned_.get(), n, n, p_.cols_of(j));
    write_rows(out, b, kv, p_.first_key + j * p_.key_block, p_.cols_of(j), n, turned_.get(), scale);
  }

  const Problem<T>& p_;
  const Gradients<T>& grads_;
  Buffer<A> dkt_, dvt_, turned_;
};

template <typename T>
bool meet(const Problem<T>& p, int64_t i, int64_t j) {
  return j >= p.first_block(i) && j < p.last_block(i);
}

// All gradients of one kv head and its query heads: each tile is computed once.
template <typename T, typename C>
class HeadBackward {
 public:
  using A = accumulate_t<T>;

  HeadBackward(const Inputs<T>& in, const Gradients<T>& grads)
      : in_(in),
        p_(in.p),
        grads_(grads),
        keys_(p_, 1),
        queries_(in_, p_.group * p_.query_blocks),
        key_grads_(p_, grads),
        tile_(in_, keys_, queries_),
        dq_block_(kQueryBlock * p_.dim),
        dq_(grads.query.data ? p_.group * p_.query_blocks * dq_block_ : 0) {}

  void run(int64_t b, int64_t kv) {
    const int64_t count = p_.group * p_.query_blocks, first_head = kv * p_.group;
    for (int64_t n = 0; n < count; ++n) {
      queries_.load(b, first_head + n / p_.query_blocks, n % p_.query_blocks, n);
    }
    if (dq_) std::fill_n(dq_.get(), count * dq_block_, A(0));
    for (int64_t j = 0; j < p_.key_blocks; ++j) {
      keys_.pack(b, kv, j, 0);
      key_grads_.clear();
      for (int64_t n = 0; n < count; ++n) {
        const int64_t h = first_head + n / p_.query_blocks, i = n % p_.query_blocks;
        if (!meet(p_, i, j)) continue;
        if (!tile_.run(b, h, i, j, 0, n, false)) continue;
        tile_.add_dkv(key_grads_.dkt(), key_grads_.dvt());
        tile_.add_dq(dq_ ? dq_.get() + n * dq_block_ : nullptr);
      }
      key_grads_.write(b, kv, j);
    }
    for (int64_t n = 0; dq_ && n < count; ++n) {
      write_dq(p_, grads_, b, first_head + n / p_.query_blocks, n % p_.query_blocks,
               dq_.get() + n * dq_block_);
    }
  }

 private:
  const Inputs<T> in_;
  const Problem<T>& p_;
  const Gradients<T>& grads_;
  const KeySide<T, C> keys_;
  const QuerySide<T, C> queries_;
  const KeyGradients<T, C> key_grads_;
  BackwardTile<T, C> tile_;
  const int64_t dq_block_;
  const Buffer<A> dq_;
};

template <typename T, typename C>
void backward_by_head(const Inputs<T>& in, const Gradients<T>& grads, double work) {
  const auto& p = in.p;
  at::parallel_for(0, p.batch * p.kv_heads, grain(work), [&](int64_t begin, int64_t end) {
    HeadBackward<T, C> task(in, grads);
    for (int64_t t = begin; t < end; ++t) task.run(t / p.kv_heads, t % p.kv_heads);
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
  if (grads.key.data || grads.value.data) {
    at::parallel_for(0, all_keys, grain(work / p.key_blocks), [&](int64_t begin, int64_t end) {
      const KeyGradients<T, C> key_grads(p, grads);
      BackwardTile<T, C> task(in, keys, queries);
      for (int64_t t = begin; t < end; ++t) {
        const int64_t head = t / p.key_blocks, b = head / p.kv_heads, kv = head % p.kv_heads;
        const int64_t j = balanced(t % p.key_blocks, p.key_blocks);
        key_grads.clear();
        for (int64_t n = 0; n < p.group * p.query_blocks; ++n) {
          const int64_t h = kv * p.group + n / p.query_blocks, i = n % p.query_blocks;
          if (!meet(p, i, j)) continue;
          if (!task.run(b, h, i, j, key_slot(b, h, j), query_slot(b, h, i), false)) continue;
          task.add_dkv(key_grads.dkt(), key_grads.dvt());
        }
        key_grads.write(b, kv, j);
      }
      release_tiles();
    });
  }
  if (grads.query.data || in.row_dot) {
    const double each = work / p.group / p.query_blocks;
    at::parallel_for(0, all_queries, grain(each), [&](int64_t begin, int64_t end) {
      BackwardTile<T, C> task(in, keys, queries);
      const Buffer<A> dq(kQueryBlock * p.dim);
      for (int64_t t = begin; t < end; ++t) {
        const int64_t head = t / p.query_blocks, b = head / p.heads, h = head % p.heads;
        const int64_t i = balanced(t % p.query_blocks, p.query_blocks);
        std::fill_n(dq.get(), kQueryBlock * p.dim, A(0));
        for (int64_t j = p.first_block(i); j < p.last_block(i); ++j) {
          if (!task.run(b, h, i, j, key_slot(b, h, j), query_slot(b, h, i), false)) continue;
          task.add_dq(grads.query.data ? dq.get() : nullptr);
        }
        if (grads.query.data) write_dq(p, grads, b, h, i, dq.get());
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
    BackwardTile<T, C> task(in, keys, queries);
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
              if (!task.run(b, h, i, j, key_slot(b, h, j), query_slot(b, h, i), true)) continue;
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

template <typename T>
void backward(const Inputs<T>& in, const Gradients<T>& grads, accumulate_t<T>* grad_mask) {
  const auto& p = in.p;
  const double work =
      2.5 * p.queries * p.keys * (p.dim + p.value_dim) * std::max<int64_t>(p.group, 1);
  visit_tile_type<T>([&](auto tag) {
    using C = decltype(tag);
    if (grad_mask || !whole_heads(p.batch * p.kv_heads, 1.4)) {
      backward_by_block<T, C>(in, grads, grad_mask, work);
    } else {
      backward_by_head<T, C>(in, grads, work);
    }
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

// The numbers of each row that the tiles take, and what the sinks' gradient takes from them.
template <typename T>
struct Rows {
  using A = accumulate_t<T>;

  at::Tensor lse, grad_lse, row_lse, delta, row_dot;

  Rows(const Problem<T>& p, const at::Tensor& grad_out, const at::Tensor& out,
       const at::Tensor& lse_given, const std::optional<at::Tensor>& grad_lse_given, bool sinks)
      : lse(wide(lse_given)),
        grad_lse(grad_lse_given.has_value() ? wide(*grad_lse_given) : at::Tensor()),
        row_lse(at::empty_like(lse)),
        delta(at::empty_like(lse)),
        row_dot(sinks ? at::zeros_like(lse) : at::Tensor()) {
    prepare_rows<T>(p, view<T>(grad_out), view<T>(out), lse, grad_lse,
                    row_lse.mutable_data_ptr<A>(), delta.mutable_data_ptr<A>());
  }

  Inputs<T> inputs(const Problem<T>& p, const at::Tensor& grad_out) const {
    return {p,
            view<T>(grad_out),
            row_lse.const_data_ptr<A>(),
            delta.const_data_ptr<A>(),
            grad_lse.defined() ? grad_lse.const_data_ptr<A>() : nullptr,
            row_dot.defined() ? row_dot.mutable_data_ptr<A>() : nullptr};
  }

  at::Tensor grad_sinks(const Problem<T>& p, const at::Tensor& sinks) const {
    const at::Tensor parts = at::empty({p.batch, p.heads}, lse.options());
    sink_gradients<T>(p, row_lse.const_data_ptr<A>(), row_dot.const_data_ptr<A>(), grad_lse,
                      parts.mutable_data_ptr<A>());
    return at::sum_to(parts, sinks.sizes()).to(sinks.scalar_type()).contiguous();
  }

 private:
  static at::Tensor wide(const at::Tensor& rows) {
    return rows.to(c10::CppTypeToScalarType<A>::value).contiguous();
  }
};

template <typename T>
View<T> gradient_view(const at::Tensor& grad, bool wanted) {
  return wanted ? View<T>(grad.mutable_data_ptr<T>(), grad) : View<T>();
}

void check_rows(const char* op, const at::Tensor& grad_out, const at::Tensor& out,
                const at::Tensor& lse, const std::optional<at::Tensor>& grad_lse,
                const at::Tensor& query, at::IntArrayRef out_shape, at::IntArrayRef lse_shape) {
  for (const auto& [tensor, name] : {std::pair(&grad_out, "grad_out"), std::pair(&out, "out")}) {
    check_shape(*tensor, out_shape, op, name);
    check_dtype(*tensor, query.scalar_type(), op, name);
  }
  check_shape(lse, lse_shape, op, "lse");
  if (grad_lse.has_value()) check_shape(*grad_lse, lse_shape, op, "grad_lse");
}

at::Tensor empty_gradient(bool wanted, bool zero, const at::Tensor& like) {
  if (!wanted) return at::empty({0}, like.options());
  return zero ? at::zeros(like.sizes(), like.options())
              : empty_tensor(like.sizes(), like.options());
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
  check_rows(op, grad_out, out, lse, grad_lse, query, {batch, heads, queries, value.size(3)},
             {batch, heads, queries});
  FASTNN_CHECK(!output_mask[3] || attn_mask.has_value(), op, "output_mask[3]",
               "false without attn_mask", true);
  FASTNN_CHECK(!output_mask[4] || sinks.has_value(), op, "output_mask[4]", "false without sinks",
               true);
  const bool empty = batch * heads * queries * key.size(2) == 0;
  at::Tensor grad_query = empty_gradient(output_mask[0], empty, query);
  at::Tensor grad_key = empty_gradient(output_mask[1], empty, key);
  at::Tensor grad_value = empty_gradient(output_mask[2], empty, value);
  at::Tensor grad_mask =
      at::empty({0}, attn_mask.has_value() ? attn_mask->options() : query.options());
  at::Tensor grad_sinks = at::empty({0}, sinks.has_value() ? sinks->options() : query.options());
  visit_float(query.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = accumulate_t<T>;
    const Problem<T> p(query, key, value, options);
    const Rows<T> rows(p, grad_out, out, lse, grad_lse, output_mask[4]);
    const Gradients<T> grads{gradient_view<T>(grad_query, output_mask[0]),
                             gradient_view<T>(grad_key, output_mask[1]),
                             gradient_view<T>(grad_value, output_mask[2])};
    if (output_mask[3]) grad_mask = at::zeros(attn_mask->sizes(), rows.lse.options());
    const bool wanted = output_mask[0] || output_mask[1] || output_mask[2];
    if (!empty && (wanted || output_mask[3] || output_mask[4])) {
      backward<T>(rows.inputs(p, grad_out), grads,
                  output_mask[3] ? grad_mask.mutable_data_ptr<A>() : nullptr);
    }
    if (output_mask[4]) grad_sinks = rows.grad_sinks(p, *sinks);
  });
  if (output_mask[3]) grad_mask = grad_mask.to(attn_mask->scalar_type());
  return {grad_query, grad_key, grad_value, grad_mask, grad_sinks};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> varlen_attention_backward_cpu(
    const at::Tensor& grad_out, const std::optional<at::Tensor>& grad_lse, const at::Tensor& query,
    const at::Tensor& key, const at::Tensor& value, const at::Tensor& cu_seqlens_q,
    const at::Tensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
    const std::optional<at::Tensor>& alibi_slopes, const std::optional<at::Tensor>& sinks,
    const std::optional<at::Tensor>& seed, const at::Tensor& out, const at::Tensor& lse,
    double dropout_p, double scale, double softcap, bool bottom_right, int64_t window_left,
    int64_t window_right, std::array<bool, 4> output_mask) {
  constexpr const char* op = "varlen_attention_backward";
  const std::optional<at::Tensor> mask;
  const Options options{mask,  alibi_slopes, sinks,        seed,        dropout_p,
                        scale, softcap,      bottom_right, window_left, window_right};
  const Sequences sequences(op, query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                            max_seqlen_k, options);
  check_rows(op, grad_out, out, lse, grad_lse, query, {query.size(0), query.size(1), value.size(2)},
             {query.size(1), query.size(0)});
  FASTNN_CHECK(!output_mask[3] || sinks.has_value(), op, "output_mask[3]", "false without sinks",
               true);
  const bool empty = query.size(1) == 0 || query.size(0) + key.size(0) == 0;
  at::Tensor grad_query = empty_gradient(output_mask[0], empty, query);
  at::Tensor grad_key = empty_gradient(output_mask[1], empty, key);
  at::Tensor grad_value = empty_gradient(output_mask[2], empty, value);
  at::Tensor grad_sinks = at::empty({0}, sinks.has_value() ? sinks->options() : query.options());
  visit_float(query.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const Problem<T> all = sequences.all<T>(query, key, value, options);
    const at::Tensor go = by_head(grad_out);
    const Rows<T> rows(all, go, by_head(out), lse.unsqueeze(0),
                       grad_lse.has_value() ? std::optional(grad_lse->unsqueeze(0)) : std::nullopt,
                       output_mask[3]);
    const auto gradient = [](const at::Tensor& grad, bool wanted) {
      return gradient_view<T>(wanted ? by_head(grad) : grad, wanted);
    };
    const Gradients<T> grads{gradient(grad_query, output_mask[0]),
                             gradient(grad_key, output_mask[1]),
                             gradient(grad_value, output_mask[2])};
    const Inputs<T> in = rows.inputs(all, go);
    const bool wanted = output_mask[0] || output_mask[1] || output_mask[2];
    if (!empty && (wanted || output_mask[3])) {
      visit_tile_type<T>([&](auto tile_tag) {
        using C = decltype(tile_tag);
        sequences.run(
            all, [&](const Problem<T>& p) { backward<T>(in.of(p), grads, nullptr); },
            [&](const Problem<T>& p) { return HeadBackward<T, C>(in.of(p), grads); });
      });
    }
    if (output_mask[3]) grad_sinks = rows.grad_sinks(all, *sinks);
  });
  return {grad_query, grad_key, grad_value, grad_sinks};
}

}  // namespace
}  // namespace attention
}  // namespace CPU_CAPABILITY
}  // namespace fastnn

FASTNN_CPU_KERNELS(m) {
  m.impl("attention_backward", &fastnn::attention::attention_backward_cpu);
  m.impl("varlen_attention_backward", &fastnn::attention::varlen_attention_backward_cpu);
}
