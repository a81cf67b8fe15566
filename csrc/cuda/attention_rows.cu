// What the attention backward makes beside dQ, dK and dV: the rows' lse and delta, which it starts
// with, and the gradients of the sinks and of the mask (attention_backward.cu has the maths).
// Work: a warp a row; per tile of the mask a block that walks all it is broadcast to, and where
// that
//   leaves blocks idle, several that share the walk and a kernel that adds their sums up in order;
//   the same pass for the rows' sums that the sinks need, and a block per sink.
// Memory: a tile each of Q, dO, K and V; a float per element of the mask and block that shares it.
// Numerics: float sums in an order of the shape alone.
// Floor: the mask's pass has two products. Reached: not measured yet.
#include "cuda/attention_backward.cuh"

namespace fastnn {

using namespace attention;

namespace {

template <typename T>
__global__ void __launch_bounds__(128) attention_rows_kernel(AttentionBackward p) {
  const int64_t rows = all_rows(p);
  const int64_t row = int64_t{blockIdx.x} * 4 + threadIdx.x / 32;
  if (row >= rows) return;
  // Packed rows are as those of one batch.
  const int64_t length = p.query_starts == nullptr ? p.queries : p.query_rows;
  const int64_t plane = row / length, query = row % length;
  const int64_t b = plane / p.heads, h = plane % p.heads;
  const T* const grad = row_of<T>(p.grad_out, b, h, query);
  const T* const out = row_of<T>(p.out, b, h, query);
  float delta = 0.f;
  for (int64_t d = threadIdx.x % 32; d < p.value_dim; d += 32) {
    delta = fmaf(to_float(grad[d]), to_float(out[d]), delta);
  }
  delta = warp_reduce(delta, [](float x, float y) { return x + y; });
  if (threadIdx.x % 32 != 0) return;
  const float lse = p.lse[row];
  // Of a NaN, exp(S - lse) would be one for the keys too that are hidden from the row, whose S is
  // -inf: in place of it a number by which what the row sees becomes infinite, and that stays 0.
  constexpr float kForNan = -1e30f;
  p.rows[row] = lse == -INFINITY ? INFINITY : lse != lse ? kForNan : lse * kLog2e;
  p.rows[rows + row] = p.grad_lse != nullptr ? delta - p.grad_lse[row] : delta;
}

// -sum of P delta over a head's rows, P the sink's. O, rounded, would make delta too coarse for a
// sum in which nothing cancels: it is made again from sink_rows, which has each row's sum of dS.
__global__ void __launch_bounds__(128) attention_sinks_kernel(AttentionBackward p) {
  __shared__ float shared[4];
  const int64_t plane = blockIdx.x;
  const Sequence sequence = sequence_of<true>(p, plane / p.heads);
  const int64_t first = first_row<true>(p, sequence, plane);
  const float sink = p.sinks[plane] * kLog2e;
  float sum = 0.f;
  for (int query = threadIdx.x; query < sequence.queries; query += 128) {
    const int64_t row = first + query;
    const float prob = exp2_approx(sink - p.rows[row]);
    const float delta = p.rows[all_rows(p) + row];
    const float dot = p.sink_rows[row] + delta * (1.f - prob);
    sum -= prob * (p.grad_lse != nullptr ? dot - p.grad_lse[row] : dot);
  }
  sum = block_reduce(sum, shared, 0.f, [](float x, float y) { return x + y; });
  if (threadIdx.x == 0) p.grad_sinks[plane] = sum;
}

// How the mask's gradient is cut: into tiles of the mask, and each one's walk over what it is
// broadcast to.
struct MaskPlan {
  int64_t row_tiles, col_tiles, tiles;           // of the mask
  int64_t batches, heads, walk_rows, walk_cols;  // steps of the walk along each
  int64_t elements;

  __host__ __device__ MaskPlan(const AttentionBackward& p, int64_t rows, int64_t cols)
      : row_tiles(p.mask_sizes[2] == 1 ? 1 : (p.queries + rows - 1) / rows),
        col_tiles(p.mask_sizes[3] == 1 ? 1 : (p.keys + cols - 1) / cols),
        tiles(p.mask_sizes[0] * p.mask_sizes[1] * row_tiles * col_tiles),
        batches(p.mask_sizes[0] == 1 ? p.batch : 1),
        heads(p.mask_sizes[1] == 1 ? p.heads : 1),
        walk_rows(p.mask_sizes[2] == 1 ? (p.queries + rows - 1) / rows : 1),
        walk_cols(p.mask_sizes[3] == 1 ? (p.keys + cols - 1) / cols : 1),
        elements(p.mask_sizes[0] * p.mask_sizes[1] * p.mask_sizes[2] * p.mask_sizes[3]) {}
  __host__ __device__ int64_t steps() const { return batches * heads * walk_rows * walk_cols; }
};

template <typename T, int kDim>
using MaskShape = BackwardShape<T, kDim, false, true>;

template <typename T, int kDim>
__global__ void __launch_bounds__(MaskShape<T, kDim>::kThreads, 1)
    attention_mask_kernel(AttentionBackward p, Aligned aligned) {
  using Shape = MaskShape<T, kDim>;
  using In = Tile<T, kDim>;
  constexpr int kThreads = Shape::kThreads, kRows = Shape::kRows, kCols = Shape::kCols;
  T* const q_tile = reinterpret_cast<T*>(dynamic_shared());
  T* const grad_tile = q_tile + kRows * kDim;
  T* const k_tile = grad_tile + kRows * kDim;
  T* const v_tile = k_tile + kCols * kDim;

  const MaskPlan plan(p, kRows, kCols);
  const int64_t task = blockIdx.x % plan.tiles, part = blockIdx.x / plan.tiles;
  const int64_t col_tile = task % plan.col_tiles, row_tile = task / plan.col_tiles % plan.row_tiles;
  const int64_t head = task / plan.col_tiles / plan.row_tiles % p.mask_sizes[1];
  const int64_t batch = task / plan.col_tiles / plan.row_tiles / p.mask_sizes[1];
  const int warp_row = threadIdx.x / 32 * 16, g = threadIdx.x % 32 / 4;

  Fragment<1, kCols> sum = {};
  const int64_t steps = plan.steps();
  for (int64_t step = part * steps / p.mask_parts; step < (part + 1) * steps / p.mask_parts;
       ++step) {
    // Along a dimension that the mask has, the walk has one step.
    const auto row0 = static_cast<int>((row_tile + step / plan.walk_cols % plan.walk_rows) * kRows);
    const auto col0 = static_cast<int>((col_tile + step % plan.walk_cols) * kCols);
    const int64_t rest = step / plan.walk_cols / plan.walk_rows;
    const int64_t h = head + rest % plan.heads, b = batch + rest / plan.heads;
    const int64_t kv = h / (p.heads / p.kv_heads);
    const Sequence sequence = sequence_of<true>(p, b);
    const Band band = make_band<true>(p, sequence, false);
    const int rows = sequence.queries - row0, cols = sequence.keys - col0;
    const int last = row0 + min(kRows, rows) - 1;
    if (rows <= 0 || band.end(last) <= col0 || band.begin(row0) >= col0 + kCols) continue;
    const int64_t first_stat = first_row<true>(p, sequence, b * p.heads + h);
    const auto load = [&](T* to, auto count, const AttentionOperand& operand, int64_t width,
                          bool is_aligned, int64_t head, int64_t first, int left) {
      const T* const base = row_of<T>(operand, b, head, first);
      In::template load<decltype(count)::value, kThreads>(
          to, operand.data, static_cast<int>(width), is_aligned,
          [&](int row) { return row < left ? base + row * operand.row : nullptr; });
    };
    const std::integral_constant<int, kRows> row_tile_size;
    const std::integral_constant<int, kCols> col_tile_size;
    const int64_t query = sequence.first_query + row0, key = sequence.first_key + col0;
    load(q_tile, row_tile_size, p.query, p.dim, aligned.query, h, query, rows);
    load(grad_tile, row_tile_size, p.grad_out, p.value_dim, aligned.grad_out, h, query, rows);
    load(k_tile, col_tile_size, p.key, p.dim, aligned.key, kv, key, cols);
    load(v_tile, col_tile_size, p.value, p.value_dim, aligned.value, kv, key, cols);
    cp_async_commit();
    Line lines[2];
    float stats[2][2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = row0 + warp_row + 8 * r + g;
      lines[r] = make_line(p, band, row < sequence.queries, row, b, h, first_stat, row, 0);
      stats[0][r] = row_stat<true>(p, 0, first_stat, sequence.queries, row);
      stats[1][r] = row_stat<true>(p, 1, first_stat, sequence.queries, row);
    }
    cp_async_wait<0>();
    __syncthreads();
    Fragment<1, kCols> s, ds;
    multiply<T, kDim>(s, q_tile, warp_row, k_tile);
    multiply<T, kDim>(ds, grad_tile, warp_row, v_tile);
    finish_tile<T, true>(
        p, lines, col0, p.mask.col, false, true,
        [&](uint32_t (&keep)[1]) { draw_along_columns<1, kCols / 8>(p, lines, col0, keep); },
        [&](int line, int) { return stats[0][line]; },
        [&](int line, int) { return stats[1][line]; }, s, ds);
    for_each(sum, [&](int i, int j, int e, int, int) { sum[i][j][e] += ds[i][j][e]; });
    __syncthreads();
  }

  // The sums through shared memory, where rows and columns are added up that the mask has not.
  float* const sums = reinterpret_cast<float*>(dynamic_shared());
  for_each(sum, [&](int i, int j, int e, int line, int col) {
    sums[(warp_row + 8 * line + g) * kCols + col] = sum[i][j][e];
  });
  __syncthreads();
  float* const out = p.mask_parts == 1 ? p.grad_mask : p.mask_partial + part * plan.elements;
  const bool one_row = p.mask_sizes[2] == 1, one_col = p.mask_sizes[3] == 1;
  const int rows = one_row ? 1 : kRows, cols = one_col ? 1 : kCols;
  for (int index = threadIdx.x; index < rows * cols; index += kThreads) {
    const int row = index / cols, col = index % cols;
    const int64_t to_row = row_tile * kRows + row, to_col = col_tile * kCols + col;
    if (to_row >= p.mask_sizes[2] || to_col >= p.mask_sizes[3]) continue;
    float total = 0.f;
    for (int r = row; r < (one_row ? kRows : row + 1); ++r) {
      for (int c = col; c < (one_col ? kCols : col + 1); ++c) total += sums[r * kCols + c];
    }
    if (p.query_starts != nullptr) {  // the sinks' sums alone, where lse has the row
      const Sequence sequence = sequence_of<true>(p, batch);
      if (to_row < sequence.queries)
        out[first_row<true>(p, sequence, batch * p.heads + head) + to_row] = total;
      continue;
    }
    const int64_t plane = batch * p.mask_sizes[1] + head;
    out[(plane * p.mask_sizes[2] + to_row) * p.mask_sizes[3] + to_col] = total;
  }
}

__global__ void __launch_bounds__(128)
    attention_mask_sum_kernel(AttentionBackward p, int64_t elements) {
  const int64_t at = int64_t{blockIdx.x} * 128 + threadIdx.x;
  if (at >= elements) return;
  float total = 0.f;
  for (int64_t part = 0; part < p.mask_parts; ++part) total += p.mask_partial[part * elements + at];
  p.grad_mask[at] = total;
}

// f(T, kDim, the plan) of the problem's mask.
template <typename F>
cudaError_t visit_mask(const AttentionBackward& p, const F& f) {
  return visit_width(p, [&](auto value, auto width) {
    using Shape = MaskShape<decltype(value), decltype(width)::value>;
    return f(value, width, MaskPlan(p, Shape::kRows, Shape::kCols));
  });
}

cudaError_t launch_mask(const AttentionBackward& p, cudaStream_t stream) {
  return visit_mask(p, [&](auto value, auto width, const MaskPlan& plan) {
    using T = decltype(value);
    constexpr int kDim = decltype(width)::value;
    using Shape = MaskShape<T, kDim>;
    const cudaError_t error = launch(attention_mask_kernel<T, kDim>, plan.tiles * p.mask_parts,
                                     Shape::kThreads, Shape::kShared, stream, p, Aligned(p));
    if (error != cudaSuccess || p.mask_parts == 1) return error;
    return launch(attention_mask_sum_kernel, tiles_of(plan.elements, 128), 128, 0, stream, p,
                  plan.elements);
  });
}

}  // namespace

cudaError_t attention_rows_cuda(const AttentionBackward& p, cudaStream_t stream) {
  const int64_t rows = all_rows(p);
  if (rows == 0) return cudaSuccess;
  return visit_width(p, [&](auto value, auto) {
    return launch(attention_rows_kernel<decltype(value)>, tiles_of(rows, 4), 128, 0, stream, p);
  });
}

cudaError_t attention_sinks_gradient_cuda(const AttentionBackward& p, cudaStream_t stream) {
  if (p.batch * p.heads * p.queries == 0) return cudaSuccess;
  // A row's sum of dS is the gradient of a mask of one column.
  AttentionBackward rows = p;
  const int64_t sizes[4] = {p.batch, p.heads, p.queries, 1};
  for (int i = 0; i < 4; ++i) rows.mask_sizes[i] = sizes[i];
  rows.grad_mask = p.sink_rows;
  rows.mask_parts = 1;
  const cudaError_t error = launch_mask(rows, stream);
  if (error != cudaSuccess) return error;
  return launch(attention_sinks_kernel, p.batch * p.heads, 128, 0, stream, p);
}

int64_t attention_mask_parts(const AttentionBackward& p) {
  constexpr int64_t kBlocks = 512;  // enough for any device
  int64_t parts = 1;
  visit_mask(p, [&](auto, auto, const MaskPlan& plan) {
    parts = max(int64_t{1}, min(plan.steps(), kBlocks / max(plan.tiles, int64_t{1})));
    return cudaSuccess;
  });
  return parts;
}

cudaError_t attention_mask_gradient_cuda(const AttentionBackward& p, cudaStream_t stream) {
  if (p.batch * p.heads * p.queries * p.keys == 0) return cudaSuccess;
  return launch_mask(p, stream);
}

}  // namespace fastnn
