// Attention backward for every device from sm_80: for P = exp(S - lse) recomputed tile by tile,
//   dV = (P keep)^T dO,  dS = P (keep dO V^T - delta),  delta = rowsum(dO O) - grad_lse,
//   dQ = scale dS' K,  dK = scale dS'^T Q,  dmask = dS,  dsink = -sum(exp(sink - lse) delta)
//   with dS' = dS softcap'. FlashAttention-2 (Dao 2023, algorithm 2) without its atomics.
// Work: one kernel twice: tiles of keys that walk the queries of their group for dK and dV, and
//   tiles of queries that walk the keys for dQ. Each warp owns 16 rows, so that P and dS go from
//   the accumulators of one product to the operands of the next. The mask's gradient has its own
//   pass.
// Memory: both operands of the rows, and one tile each of the columns', filled by cp.async.
// Numerics: float sums in an order of the shape alone; P and dS are rounded for the products. Past
//   128 columns a block makes dK or dV: the registers do not hold both.
// Floor: seven products' operations over the tensor cores' rate. Reached: not measured yet.
#include "cuda/attention_backward.cuh"

namespace fastnn {

using namespace attention;

namespace {

template <typename T, int kDim, bool kKeys, bool kFull>
__global__ void __launch_bounds__(BackwardShape<T, kDim, kKeys, kFull>::kThreads, 1)
    attention_backward_kernel(AttentionBackward p, Aligned aligned) {
  using Shape = BackwardShape<T, kDim, kKeys, kFull>;
  using In = Tile<T, kDim>;
  constexpr int kThreads = Shape::kThreads, kRows = Shape::kRows, kCols = Shape::kCols;
  T* const x1 = reinterpret_cast<T*>(dynamic_shared());
  T* const x2 = x1 + kRows * kDim;
  T* const y1 = x2 + kRows * kDim;
  T* const y2 = y1 + kCols * kDim;
  auto* const nonfinite = reinterpret_cast<uint64_t*>(y2 + kCols * kDim);
  auto* const col_stats = reinterpret_cast<float*>(nonfinite + kDim);

  const AttentionOperand& rows1 = kKeys ? p.key : p.query;
  const AttentionOperand& rows2 = kKeys ? p.value : p.grad_out;
  const AttentionOperand& cols1 = kKeys ? p.query : p.key;
  const AttentionOperand& cols2 = kKeys ? p.grad_out : p.value;
  const int longest = static_cast<int>(kKeys ? p.keys : p.queries);
  const int row_heads = static_cast<int>(kKeys ? p.kv_heads : p.heads);
  const int group = static_cast<int>(p.heads / p.kv_heads);
  const int tiles = (longest + kRows - 1) / kRows;
  int tile = static_cast<int>(blockIdx.x) % tiles;
  const int part = static_cast<int>(blockIdx.x) / tiles % Shape::kParts;
  const int plane = static_cast<int>(blockIdx.x) / tiles / Shape::kParts;
  if (Shape::kParts == 2 && (part == 0 ? p.grad_key : p.grad_value) == nullptr) return;
  if ((kKeys ? p.left : p.right) >= 0) tile = tiles - 1 - tile;  // the longest first
  const int b = plane / row_heads, row_head = plane % row_heads, row0 = tile * kRows;
  const Sequence sequence = sequence_of<kFull>(p, b);
  const Band band = make_band<kFull>(p, sequence, kKeys);
  const int row_count = kKeys ? sequence.keys : sequence.queries;
  if (kFull && row0 >= row_count) return;
  const int64_t first_of_rows = kKeys ? sequence.first_key : sequence.first_query;
  const int64_t first_of_cols = kKeys ? sequence.first_query : sequence.first_key;
  const int warp_row = threadIdx.x / 32 * 16, g = threadIdx.x % 32 / 4;

  // The columns [begin, end) that the tile's rows see, and those that all of them see.
  const int last = min(row0 + kRows, row_count) - 1;
  const int begin = band.begin(row0) / kCols * kCols, end = band.end(last);
  const int all_begin = band.begin(last), all_end = band.end(row0);
  const int col_tiles = begin < end ? (end - begin + kCols - 1) / kCols : 0;
  const int steps = col_tiles * (kKeys ? group : 1);
  const auto query_head = [&](int step) {
    return kKeys ? row_head * group + step / col_tiles : row_head;
  };

  const int dim = static_cast<int>(p.dim), value_dim = static_cast<int>(p.value_dim);
  const auto load_rows = [&](T* to, const AttentionOperand& operand, int width, bool is_aligned) {
    const T* const base = row_of<T>(operand, b, row_head, first_of_rows + row0);
    const int left = row_count - row0;
    In::template load<kRows, kThreads>(to, operand.data, width, is_aligned, [&](int row) {
      return row < left ? base + row * operand.row : nullptr;
    });
  };
  // A group is committed every step, empty or not, so that the count of pending ones is constant.
  const auto load_cols = [&](T* to, const AttentionOperand& operand, int width, bool is_aligned,
                             int step) {
    if (step < steps) {
      const int col0 = begin + step % col_tiles * kCols, left = band.size - col0;
      const int head = kKeys ? query_head(step) : row_head / group;
      const T* const base = row_of<T>(operand, b, head, first_of_cols + col0);
      In::template load<kCols, kThreads>(to, operand.data, width, is_aligned, [&](int row) {
        return row < left ? base + row * operand.row : nullptr;
      });
    }
    cp_async_commit();
  };
  const auto load_first = [&](int step) {
    if (kKeys && step < steps) {
      for (int n = threadIdx.x; n < 2 * kCols; n += kThreads) {
        col_stats[n] = row_stat<kFull>(
            p, n / kCols, first_row<kFull>(p, sequence, b * p.heads + query_head(step)),
            sequence.queries, begin + step % col_tiles * kCols + n % kCols);
      }
    }
    load_cols(y1, cols1, dim, kKeys ? aligned.query : aligned.key, step);
  };
  const auto load_second = [&](int step) {
    load_cols(y2, cols2, value_dim, kKeys ? aligned.grad_out : aligned.value, step);
  };
  if (steps > 0) {
    load_rows(x1, rows1, dim, kKeys ? aligned.key : aligned.query);
    load_rows(x2, rows2, value_dim, kKeys ? aligned.value : aligned.grad_out);
  }
  load_first(0);
  load_second(0);

  float stats[2][2];  // lse and delta of the lines
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const int row = row0 + warp_row + 8 * (n % 2) + g;
    stats[n / 2][n % 2] = kKeys ? 0.f
                                : row_stat<kFull>(p, n / 2, first_row<kFull>(p, sequence, plane),
                                                  sequence.queries, row);
  }
  const int64_t mask_stride = kKeys ? p.mask.row : p.mask.col;
  // The gradients of the rows' operands; with two parts, of one of them.
  Fragment<1, kDim> grad1 = {};
  Fragment<1, Shape::kParts == 1 && kKeys ? kDim : 8> grad2 = {};

  for (int step = 0; step < steps; ++step) {
    const int col0 = begin + step % col_tiles * kCols, h = query_head(step);
    Line lines[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = row0 + warp_row + 8 * r + g;
      lines[r] = make_line(p, band, row < row_count, row, b, h,
                           first_row<kFull>(p, sequence, b * p.heads + h), kKeys ? 0 : row,
                           kKeys ? row : 0);
    }
    cp_async_wait<1>();
    __syncthreads();
    Fragment<1, kCols> s, ds;
    multiply<T, kDim>(s, x1, warp_row, y1);
    cp_async_wait<0>();
    __syncthreads();
    multiply<T, kDim>(ds, x2, warp_row, y2);

    const bool whole = col0 >= all_begin && col0 + kCols <= all_end;
    const bool some_hidden = !whole || (kFull && p.mask.data != nullptr);
    finish_tile<T, kFull>(
        p, lines, col0, mask_stride, whole, false,
        [&](uint32_t (&keep)[1]) {
          if constexpr (kKeys) {
            const int64_t first = first_row<kFull>(p, sequence, b * p.heads + h);
            draw_along_rows<1, kCols / 8>(p, row0 + warp_row, first + col0, keep);
          } else {
            draw_along_columns<1, kCols / 8>(p, lines, col0, keep);
          }
        },
        [&](int line, int col) { return kKeys ? col_stats[col] : stats[0][line]; },
        [&](int line, int col) { return kKeys ? col_stats[kCols + col] : stats[1][line]; }, s, ds);

    if constexpr (Shape::kParts == 2) {
      if (part == 1) {
        for_each(s, [&](int i, int j, int e, int, int) { ds[i][j][e] = s[i][j][e]; });
      }
      accumulate_seen<T, kDim, kThreads>(grad1, ds, part == 0 ? y1 : y2, some_hidden, nonfinite);
      __syncthreads();
      load_first(step + 1);
    } else {
      accumulate_seen<T, kDim, kThreads>(grad1, ds, y1, some_hidden, nonfinite);
      __syncthreads();
      load_first(step + 1);
      if constexpr (kKeys) {
        accumulate_seen<T, kDim, kThreads>(grad2, s, y2, some_hidden, nonfinite);
        __syncthreads();
      }
    }
    load_second(step + 1);
  }

  const auto store = [&](void* to, int width, float factor, const auto& grad) {
    if (to == nullptr) return;
    const Place place = place_of<kFull>(p, plane, row_heads, longest, first_of_rows);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = row0 + warp_row + 8 * r + g;
      if (row >= row_count) continue;
      store_line(static_cast<T*>(to) + (place.first + row * place.step) * width, width, factor,
                 grad[0], r);
    }
  };
  const float keep_scale = p.seed != nullptr ? p.keep_scale : 1.f;
  if constexpr (!kKeys) {
    store(p.grad_query, dim, p.scale, grad1);
  } else if constexpr (Shape::kParts == 1) {
    store(p.grad_key, dim, p.scale, grad1);
    store(p.grad_value, value_dim, keep_scale, grad2);
  } else {
    store(part == 0 ? p.grad_key : p.grad_value, part == 0 ? dim : value_dim,
          part == 0 ? p.scale : keep_scale, grad1);
  }
}

template <typename T, int kDim, bool kKeys, bool kFull>
cudaError_t launch_backward(const AttentionBackward& p, cudaStream_t stream) {
  using Shape = BackwardShape<T, kDim, kKeys, kFull>;
  const int64_t planes = p.batch * (kKeys ? p.kv_heads : p.heads);
  const int64_t tiles = tiles_of(kKeys ? p.keys : p.queries, Shape::kRows);
  return launch(attention_backward_kernel<T, kDim, kKeys, kFull>, planes * tiles * Shape::kParts,
                Shape::kThreads, Shape::kShared, stream, p, Aligned(p));
}

bool is_plain(const AttentionProblem& p) {
  return p.scale > 0.f && p.softcap == 0.f && p.slopes == nullptr && p.mask.data == nullptr &&
         p.seed == nullptr && p.query_starts == nullptr;
}

}  // namespace

cudaError_t attention_backward_portable_cuda(const AttentionBackward& p, cudaStream_t stream) {
  if (p.batch * p.heads * p.queries * p.keys == 0) return cudaSuccess;
  return visit_width(p, [&](auto value, auto width) {
    using T = decltype(value);
    constexpr int kDim = decltype(width)::value;
    const auto run = [&](auto keys) {
      constexpr bool kKeys = decltype(keys)::value;
      if constexpr (sizeof(T) == 2) {
        if (is_plain(p)) return launch_backward<T, kDim, kKeys, false>(p, stream);
      }
      return launch_backward<T, kDim, kKeys, true>(p, stream);
    };
    cudaError_t error = cudaSuccess;
    if (p.grad_key != nullptr || p.grad_value != nullptr) error = run(std::true_type());
    if (error == cudaSuccess && p.grad_query != nullptr) error = run(std::false_type());
    return error;
  });
}

}  // namespace fastnn
