// Sequences packed one behind the other in (T, H, D) tensors: rows [q[n], q[n + 1]) attend to the
// keys [k[n], k[n + 1]). Each is a Problem that reads and writes its rows where they lie.
//   A sequence that gives all threads work, and of which one kv head would be too large a share of
//   a single one's, is cut as attention itself is; the others share one parallel region, whose
//   tasks are kv heads of sequences. Neither changes a bit of the result. The dropout mask is that
//   of a matrix of H Tq rows, head by head, and max_seqlen_k columns.
#pragma once

#include <algorithm>
#include <vector>

#include "attention.h"

namespace fastnn {
inline namespace CPU_CAPABILITY {
namespace attention {

// A packed tensor as (1, H, T, D)
inline at::Tensor by_head(const at::Tensor& packed) { return packed.transpose(0, 1).unsqueeze(0); }

class Sequences {
 public:
  Sequences(const char* op, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
            const at::Tensor& starts_q, const at::Tensor& starts_k, int64_t longest_q,
            int64_t longest_k, const Options& options)
      : columns_(longest_k) {
    FASTNN_CHECK(query.dim() == 3, op, "query", "of shape (Tq, H, D)", query.sizes());
    FASTNN_CHECK(key.dim() == 3, op, "key", "of shape (Tk, Hkv, D)", key.sizes());
    FASTNN_CHECK(value.dim() == 3, op, "value", "of shape (Tk, Hkv, Dv)", value.sizes());
    check_attention(op, by_head(query), by_head(key), by_head(value), options);
    q_tensor_ = checked(op, "q", starts_q, query.size(0), longest_q);
    k_tensor_ = checked(op, "k", starts_k, key.size(0), longest_k);
    FASTNN_CHECK(k_tensor_.numel() == q_tensor_.numel(), op, "cu_seqlens_k",
                 "as long as cu_seqlens_q", k_tensor_.numel());
    count_ = q_tensor_.numel() - 1;
    q_ = q_tensor_.const_data_ptr<int32_t>();
    k_ = k_tensor_.const_data_ptr<int32_t>();
  }

  // All rows and keys, cut into tiles that suit the longest sequence.
  template <typename T>
  Problem<T> all(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                 const Options& options) const {
    Problem<T> all(by_head(query), by_head(key), by_head(value), options);
    int64_t longest = 0;
    for (int64_t n = 0; n < count_; ++n) longest = std::max<int64_t>(longest, k_[n + 1] - k_[n]);
    all.key_block = key_block_of(longest);
    all.dropout_cols = columns_;
    all.set_lengths(all.queries, all.keys);
    return all;
  }

  // Calls alone(problem) for the sequences that are cut on their own, and run(0, kv head) of what
  // make(problem) returned to a thread for the others: it is made for the longest of them, and its
  // problem is then that of one after the other.
  template <typename T, typename Alone, typename Make>
  void run(const Problem<T>& all, const Alone& alone, const Make& make) const {
    const int64_t heads = all.kv_heads, threads = at::get_num_threads();
    std::vector<int64_t> work(count_), first(count_ + 1, 0);
    Problem<T> p = all;
    double total = 0;
    for (int64_t n = 0; n < count_; ++n) {
      narrow(p, n);
      total += work[n] = head_work(p);
    }
    int64_t rows = 0, keys = 0;
    for (int64_t n = 0; n < count_; ++n) {
      narrow(p, n);
      const double each = static_cast<double>(work[n]) * threads;
      const bool large = threads > 1 && each * kShare > total * heads &&
                         static_cast<double>(work[n]) * heads > threads * kWake;
      if (large) alone(p);
      rows = std::max(rows, large ? 0 : p.queries);
      keys = std::max(keys, large ? 0 : p.keys);
      first[n + 1] = first[n] + (large ? 0 : work[n] * heads);
    }
    at::parallel_for(0, first[count_], kWake, [&](int64_t begin, int64_t end) {
      Problem<T> part = all;
      part.set_lengths(rows, keys);
      auto task = make(part);
      // A task belongs to the range in which its work begins.
      int64_t n = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
      for (; n < count_ && first[n] < end; ++n) {
        if (first[n] == first[n + 1]) continue;
        narrow(part, n);
        for (int64_t kv = 0; kv < heads; ++kv) {
          const int64_t at = first[n] + kv * work[n];
          if (at >= begin && at < end) task.run(0, kv);
        }
      }
      release_tiles();
    });
  }

 private:
  static constexpr int64_t kShare = 10;  // tasks that a thread should have at the least

  static at::Tensor checked(const char* op, const std::string& side, const at::Tensor& starts,
                            int64_t total, int64_t longest) {
    const std::string name = "cu_seqlens_" + side;
    FASTNN_CHECK(starts.dim() == 1 && starts.numel() > 0, op, name, "of shape (N + 1,)",
                 starts.sizes());
    check_dtype(starts, at::kInt, op, name.c_str());
    const at::Tensor checked = starts.contiguous();
    const int32_t* start = checked.const_data_ptr<int32_t>();
    const int64_t count = starts.numel() - 1;
    FASTNN_CHECK(start[0] == 0, op, name, "0 at first", start[0]);
    for (int64_t n = 0; n < count; ++n) {
      const int64_t length = static_cast<int64_t>(start[n + 1]) - start[n];
      FASTNN_CHECK(length >= 0, op, name, "ascending", c10::str(start[n + 1], " after ", start[n]));
      FASTNN_CHECK(length <= longest, op, "max_seqlen_" + side,
                   c10::str("at least the length ", length, " of sequence ", n), longest);
    }
    FASTNN_CHECK(start[count] == total, op, name, c10::str(total, " at last, as the rows are"),
                 start[count]);
    return checked;
  }

  template <typename T>
  void narrow(Problem<T>& p, int64_t n) const {
    p.first_row = q_[n];
    p.first_key = k_[n];
    p.set_lengths(q_[n + 1] - q_[n], k_[n + 1] - k_[n]);
  }

  // Multiplications of a kv head's forward and, so that nothing is free, of loading its operands.
  template <typename T>
  static int64_t head_work(const Problem<T>& p) {
    int64_t seen = 0;
    for (int64_t i = 0; i < p.query_blocks; ++i) {
      const int64_t blocks = std::max<int64_t>(0, p.last_block(i) - p.first_block(i));
      seen += p.rows_of(i) * std::min(p.keys, blocks * p.key_block);
    }
    return (p.group * (seen + p.queries) + p.keys) * (p.dim + p.value_dim) + 1;
  }

  at::Tensor q_tensor_, k_tensor_;
  const int32_t *q_, *k_;
  int64_t count_, columns_;
};

}  // namespace attention
}  // namespace CPU_CAPABILITY
}  // namespace fastnn
