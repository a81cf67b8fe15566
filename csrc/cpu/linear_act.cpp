// out = residual + dropout(act(x W^T + b)), x [M, K], W [N, K]; gated: act(gate) * up of N / 2.
//   Backward: dP = act'(saved) * mask * grad_out;  dX = dP W,  dW = dP^T X,  db = sum_m dP.
// Forward: tiles of 48 (bfloat16: 96) rows x 128 columns; a task is a column of them, for which it
//   packs W, or where W stays in cache or that makes too few tasks a tile, of a W packed once a
//   call. The epilogue takes each row of the float tile through registers once, while it is in
//   cache. Few rows (decoding) read W in place.
// Backward: such a block of rows of dP is made once, multiplied by W while in cache, and left
//   transposed for dW, whose tiles are shared out after it. db adds up per block, then over the
//   blocks in order: no result depends on the number of threads.
// Numerics: float accumulation and epilogue (double for double); the pre-activation is rounded to
//   the input's type only where it is saved. Dropout: csrc/philox.h.
// Floor: the GEMMs at the peak of the FMAs (gemm.h). gelu 2048x768->3072 on two Zen 5 cores, the
//   operators alone in a quiet run, forward and forward+backward: bfloat16 10.8 ms of 8.9 and 32 ms
//   of 27, float 22.5 of 18.4 and 68 of 55; the rest is gelu (1.1 ms each way), packing,
//   transposing, fresh pages and the threads' end. Zen 4: 26 of 21 and 76 of 63, 49 of 42 and 147
//   of 126.
#include <array>
#include <atomic>
#include <string_view>
#include <vector>

#include "../check.h"
#include "common.h"
#include "dropout.h"
#include "gemm.h"
#include "registry.h"
// After vec.h, whose act_* overloads it is written in.
#include "../activation.h"

namespace fastnn {
inline namespace CPU_CAPABILITY {
namespace {

// Rows of a task: as many as keep a backward's block of dP in L2.
template <typename C>
constexpr int64_t kBlockRows = std::is_same_v<C, at::BFloat16> ? 96 : 48;
constexpr int64_t kBlockCols = 2 * kPanel;
// Rows of the input up to which the forward reads the weight in place. 4096 -> 4096, 1, 8 and 16
// rows: float 2.3, 3.6 and 4.4 ms, bfloat16 1.5, 2.4 and 3.9; packed first, 12 ms or more in float
// and 7 or more in bfloat16.
constexpr int64_t kFewRows = 16;
// Blocks of columns for each thread from which the forward's tasks are whole columns. 4096 -> 4096,
// times faster than eager at 32, 64, 128 and 512 rows: float 1.3, 1.7, 1.7 and 1.3, bfloat16 1.0,
// 1.0, 1.0 and 1.0; with all of W packed first 0.8, 0.9, 1.2 and 1.2, and 0.5, 0.4, 0.7 and 0.9.
constexpr int64_t kColumnTasks = 6;
// But not where there are at least so many rows, and W is so small that it stays in L3: then a row
// of tiles is finished before the next, and written side by side. Columns over rows, gelu and the
// pre-activation saved, at 768, 1536, 3072 and 6144 rows: bfloat16 640 -> 2560 0.99, 1.06, 1.14 and
// 1.18, 1024 -> 4096 (8 MB) 0.98, 1.01, 1.01 and 1.07; float 768 -> 2304 0.99, 1.00, 1.05 and 1.09,
// 1024 -> 3072 (12 MB) 0.95, 0.91, 0.95 and 1.02.
constexpr int64_t kManyRows = 1024, kWeightInCache = int64_t{8} << 20;
// There tiles are twice as wide, for longer runs of fresh memory: bfloat16 768 -> 3072, 2048 rows,
// 11.3 -> 10.8 ms on Zen 5, 1024 -> 4096 and 512 -> 2048 within 3 %, float even.
constexpr int64_t kWideCols = 2 * kBlockCols;
// Bytes of a block of the input's columns from which dW's tiles that share it follow each other,
// not those that share rows of dP. Rows' time over columns' at 1024, 2048 and 4096 rows: float 512
// -> 2048 0.99, 1.02 and 1.07, 768 -> 3072 0.98, 1.02 and 1.06; bfloat16 the same to 2 %.
constexpr int64_t kLargeColumns = int64_t{1} << 20;

// Calls f with the activation's struct and whether it is gated, as an std::bool_constant.
template <typename F>
auto visit_activation(std::string_view name, const char* op, const F& f) {
#define FASTNN_CASE(label, Act, gated) \
  if (name == label) return f(Act{}, std::bool_constant<gated>{});
  FASTNN_ACTIVATIONS(FASTNN_CASE)
#undef FASTNN_CASE
#define FASTNN_NAME(label, Act, gated) " " label
  FASTNN_CHECK(false, op, "activation", "one of" FASTNN_ACTIVATIONS(FASTNN_NAME), name);
#undef FASTNN_NAME
}

void check_activation(std::string_view name, bool gated, const char* op) {
  const bool is_gated = visit_activation(name, op, [](auto, auto known) { return known.value; });
  FASTNN_CHECK(is_gated == gated, op, "gated", "as the activation is", gated);
}

// A view of rows of T with any strides; rows of C are read in place where they can be.
template <typename T>
struct Rows {
  const T* data;
  int64_t stride_row, stride_col, cols;

  Rows(const at::Tensor& matrix)
      : data(matrix.const_data_ptr<T>()),
        stride_row(matrix.stride(0)),
        stride_col(matrix.stride(1)),
        cols(matrix.size(1)) {}

  template <typename C>
  bool usable() const {
    return std::is_same_v<T, C> && stride_col == 1 && pad_k<C>(cols) == cols;
  }

  // Rows [begin, begin + n) as C with pad_k columns; `buffer` is used where they must be converted.
  template <typename C>
  std::pair<const C*, int64_t> as(int64_t begin, int64_t n, C* buffer) const {
    if (usable<C>()) return {reinterpret_cast<const C*>(data + begin * stride_row), stride_row};
    const int64_t width = pad_k<C>(cols);
    for (int64_t i = 0; i < n; ++i) {
      const T* row = data + (begin + i) * stride_row;
      C* out = buffer + i * width;
      convert_row(row, stride_col, cols, out);
      for (int64_t j = cols; j < width; ++j) out[j] = C(0);
    }
    return {buffer, width};
  }
};

template <typename T, typename C>
Buffer<C> packed(const Rows<T>& b, int64_t k, bool transposed, int64_t n) {
  auto out = Buffer<C>(packed_size<C>(k, n));
  const int64_t stride_k = transposed ? b.stride_col : b.stride_row;
  const int64_t stride_n = transposed ? b.stride_row : b.stride_col;
  parallel_tasks(panels(n), k * kPanel * 4, [&](int64_t panel) {
    pack_panel<T, C>(b.data, stride_k, stride_n, k, n, panel, out.get());
  });
  return out;
}

struct Dropout {
  bool on;
  PhiloxState state{};
  DropoutRate rate{};

  Dropout(double p, const std::optional<at::Tensor>& seed) : on(p > 0.0) {
    if (!on) return;
    state = philox_state(*seed);
    rate = dropout_rate(p);
  }
};

// Calls f(task) for every task. A thread runs through a range of its own, so that no two of them
// touch the same fresh pages, and then takes what is left of the others'.
template <typename F>
void share_tasks(int64_t tasks, int64_t work_each, const F& f) {
  struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t end;
  };
  const int64_t worth = ceil_div(tasks * std::max<int64_t>(1, work_each), kGrain);
  const int64_t threads = std::min<int64_t>({at::get_num_threads(), tasks, worth});
  if (threads <= 1) return parallel_tasks(tasks, 0, f);
  std::vector<Range> ranges(threads);
  for (int64_t i = 0; i < threads; ++i) {
    ranges[i].next = tasks * i / threads;
    ranges[i].end = tasks * (i + 1) / threads;
  }
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t j = 0; j < threads; ++j) {
        Range& range = ranges[(i + j) % threads];
        for (int64_t task; (task = range.next.fetch_add(1)) < range.end;) f(task);
      }
    }
    release_tiles();
  });
}

// Calls f(i, width) for the vectors of T in n columns; width is a constant but for the last one.
template <typename T, typename F>
C10_ALWAYS_INLINE void over_row(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) f(i, std::integral_constant<int64_t, kLanes<T>>{});
  if (i < n) f(i, n - i);
}

// What the epilogue of one row reads and writes; null where the call has none of it. Of pairs, the
// second is the up projection of a gated activation.
template <typename T>
struct ForwardRow {
  const accumulate_t<T>* sums[2];
  const T* bias[2];
  T* preact[2];
  const uint16_t* kept;
  accumulate_t<T> scale;
  const T* residual;
  T* out;
};

template <typename T, typename Act, bool kGated>
void forward_row(const ForwardRow<T>& row, int64_t n) {
  using Vec = AccVec<T>;
  over_row<T>(n, [row](int64_t i, auto width) __attribute__((always_inline)) {
    const auto preact = [&](int part) __attribute__((always_inline)) {
      Vec x = load_vec(row.sums[part] + i, width);
      if (row.bias[part]) x = x + load_vec(row.bias[part] + i, width);
      if (row.preact[part]) store_vec(row.preact[part] + i, x, width);
      return x;
    };
    Vec y = Act::value(preact(0));
    if constexpr (kGated) y = y * preact(1);
    if (row.kept) y = keep_lanes(y * Vec(row.scale), bits_at(row.kept, i));
    if (row.residual) y = y + load_vec(row.residual + i, width);
    store_vec(row.out + i, y, width);
  });
}

template <typename T>
void forward(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias,
             const at::Tensor& residual, const Dropout& dropout, std::string_view activation,
             bool gated, at::Tensor& out, at::Tensor& preact) {
  using A = accumulate_t<T>;
  const int64_t m = input.size(0), k = input.size(1), n = weight.size(0);
  const int64_t parts = gated ? 2 : 1, width = n / parts;
  const Rows<T> x(input), w(weight);
  const T* bias_data = bias.defined() ? bias.const_data_ptr<T>() : nullptr;
  const T* residual_data = residual.defined() ? residual.const_data_ptr<T>() : nullptr;
  const int64_t residual_stride = residual.defined() ? residual.stride(0) : 0;
  T* out_data = out.mutable_data_ptr<T>();
  T* preact_data = preact.numel() ? preact.mutable_data_ptr<T>() : nullptr;
  const auto finish = visit_activation(activation, "linear_act_forward", [](auto act, auto gated) {
    return &forward_row<T, decltype(act), gated.value>;
  });

  visit_tile_type<T>([&](auto tag) {
    using C = decltype(tag);
    const bool few = m <= kFewRows && w.stride_col == 1;
    const bool by_row = m >= kManyRows && n * k * int64_t{sizeof(C)} <= kWeightInCache;
    const int64_t block_cols = by_row ? kWideCols : kBlockCols;
    const int64_t col_blocks = ceil_div(width, block_cols);
    const bool by_column = !few && !by_row && col_blocks >= kColumnTasks * at::get_num_threads();
    std::array<Buffer<C>, 2> packed_weight;
    for (int64_t part = 0; part < (few || by_column ? 0 : parts); ++part) {
      Rows<T> rows = w;
      rows.data += part * width * w.stride_row;
      packed_weight[part] = packed<T, C>(rows, k, /*transposed=*/true, width);
    }
    // The tile of a block of rows and a block of columns, of which `b` are the packed operands.
    const auto run_tile = [&](int64_t row0, int64_t col0, const std::array<const C*, 2>& b) {
      const int64_t rows = std::min(kBlockRows<C>, m - row0),
                    cols = std::min(block_cols, width - col0);
      alignas(64) A tile[2][kBlockRows<C> * kWideCols];
      uint16_t kept[kWideCols / 16];
      const auto multiply = [&](auto tag, const auto& product) {
        using E = decltype(tag);
        Buffer<E> converted;
        if (!x.template usable<E>()) converted = Buffer<E>(rows * pad_k<E>(k));
        const auto [a, lda] = x.template as<E>(row0, rows, converted.get());
        for (int64_t part = 0; part < parts; ++part) product(part, a, lda);
      };
      if (few) {
        multiply(A{}, [&](int64_t part, const A* a, int64_t lda) {
          const T* rows_of_w = w.data + (part * width + col0) * w.stride_row;
          few_rows_gemm(rows, cols, k, a, lda, rows_of_w, w.stride_row, tile[part], kWideCols);
        });
      } else {
        multiply(C{}, [&](int64_t part, const C* a, int64_t lda) {
          tile_gemm<C>(rows, cols, k, a, lda, b[part], tile[part], kWideCols, false);
        });
      }
      for (int64_t i = 0; i < rows; ++i) {
        ForwardRow<T> row{};
        for (int64_t part = 0; part < parts; ++part) {
          const int64_t offset = part * width + col0;
          row.sums[part] = tile[part] + i * kWideCols;
          if (bias_data) row.bias[part] = bias_data + offset;
          if (preact_data) row.preact[part] = preact_data + (row0 + i) * n + offset;
        }
        if (dropout.on) {
          dropout_bits(dropout.state, dropout.rate, row0 + i, width, col0, cols, kept);
          row.kept = kept;
          row.scale = dropout.rate.scale;
        }
        if (residual_data) row.residual = residual_data + (row0 + i) * residual_stride + col0;
        row.out = out_data + (row0 + i) * width + col0;
        finish(row, cols);
      }
    };
    const int64_t work = std::min(m, kBlockRows<C>) * std::min(n, block_cols) * k;
    if (by_column) {
      share_tasks(col_blocks, work * ceil_div(m, kBlockRows<C>), [&](int64_t task) {
        const int64_t col0 = task * block_cols, cols = std::min(block_cols, width - col0);
        const int64_t size = packed_size<C>(k, cols);
        const Buffer<C> own(parts * size);
        for (int64_t part = 0; part < parts; ++part) {
          pack_b<T, C>(w.data + (part * width + col0) * w.stride_row, w.stride_col, w.stride_row, k,
                       cols, own.get() + part * size);
        }
        for (int64_t row0 = 0; row0 < m; row0 += kBlockRows<C>) {
          run_tile(row0, col0, {own.get(), own.get() + size});
        }
      });
      return;
    }
    share_tasks(ceil_div(m, kBlockRows<C>) * col_blocks, work, [&](int64_t task) {
      const int64_t col0 = task % col_blocks * block_cols;
      std::array<const C*, 2> b{};
      for (int64_t part = 0; part < 2; ++part) {
        if (packed_weight[part]) b[part] = packed_weight[part].get() + col0 * pad_k<C>(k);
      }
      run_tile(task / col_blocks * kBlockRows<C>, col0, b);
    });
  });
}

// One row of dP = act'(saved) * mask * grad, rounded to C, and its share of the bias's gradient.
// Pairs and nulls as in the forward.
template <typename T, typename C>
struct BackwardRow {
  const T* grad;
  const T* saved[2];
  const uint16_t* kept;
  accumulate_t<T> scale;
  accumulate_t<T>* bias_sum[2];
  C* out[2];
};

template <typename T, typename C, typename Act, bool kGated>
void backward_row(const BackwardRow<T, C>& row, int64_t n) {
  using Vec = AccVec<T>;
  over_row<T>(n, [&](int64_t i, int64_t width) {
    const auto finish = [&](int part, const Vec& v) {
      if (row.bias_sum[part]) {
        store_vec(row.bias_sum[part] + i, load_vec(row.bias_sum[part] + i, width) + v, width);
      }
      store_vec(row.out[part] + i, v, width);
    };
    Vec grad = load_vec(row.grad + i, width);
    if (row.kept) grad = keep_lanes(grad * Vec(row.scale), bits_at(row.kept, i));
    if constexpr (std::is_same_v<Act, Identity>) {
      finish(0, grad);
    } else {
      const Vec x = load_vec(row.saved[0] + i, width);
      if constexpr (kGated) {
        finish(0, grad * load_vec(row.saved[1] + i, width) * Act::grad(x));
        finish(1, grad * Act::value(x));
      } else {
        finish(0, grad * Act::grad(x));
      }
    }
  });
}

template <typename T>
void backward(const at::Tensor& grad_out, const at::Tensor& input, const at::Tensor& weight,
              const at::Tensor& saved, const Dropout& dropout, std::string_view activation,
              bool gated, at::Tensor& grad_input, at::Tensor& grad_weight, at::Tensor& grad_bias) {
  using A = accumulate_t<T>;
  const int64_t m = input.size(0), k = input.size(1), n = weight.size(0);
  const int64_t parts = gated ? 2 : 1, width = n / parts;
  const bool wants_input = grad_input.numel() > 0, wants_weight = grad_weight.numel() > 0;
  const bool wants_bias = grad_bias.numel() > 0;
  const Rows<T> x(input), w(weight);
  const T* grad_data = grad_out.const_data_ptr<T>();
  const T* saved_data = saved.numel() ? saved.const_data_ptr<T>() : nullptr;

  visit_tile_type<T>([&](auto tag) {
    using C = decltype(tag);
    const auto make_row = visit_activation(
        activation, "linear_act_backward",
        [](auto act, auto gated) { return &backward_row<T, C, decltype(act), gated.value>; });
    const int64_t blocks = ceil_div(m, kBlockRows<C>);
    const auto partial_bias = Buffer<A>(wants_bias ? blocks * n : 0);
    const int64_t deep_m = pad_k<C>(m), deep_n = pad_k<C>(n);
    // A line more a row: rows a power of two apart would all fall into one set of the cache.
    constexpr int64_t kLine = 64 / sizeof(C);
    const int64_t ld_m = deep_m + kLine, ld_n = deep_n + kLine;
    const auto packed_weight =
        wants_input ? packed<T, C>(w, n, /*transposed=*/false, k) : Buffer<C>();
    const auto transposed = Buffer<C>(wants_weight ? n * ld_m : 0);
    const auto packed_input = Buffer<C>(wants_weight ? packed_size<C>(m, k) : 0);
    const auto run_block = [&](int64_t block) {
      const int64_t row0 = block * kBlockRows<C>, rows = std::min(kBlockRows<C>, m - row0);
      const auto grad_block = Buffer<C>(rows * ld_n);
      const auto kept = Buffer<uint16_t>(dropout.on ? ceil_div(width, kDrawn) * kDrawn / 16 : 0);
      A* bias_sum = wants_bias ? partial_bias.get() + block * n : nullptr;
      if (bias_sum) std::fill_n(bias_sum, n, A(0));
      for (int64_t i = 0; i < rows; ++i) {
        C* out = grad_block.get() + i * ld_n;
        BackwardRow<T, C> row{};
        row.grad = grad_data + (row0 + i) * width;
        for (int64_t part = 0; part < parts; ++part) {
          if (saved_data) row.saved[part] = saved_data + (row0 + i) * n + part * width;
          if (bias_sum) row.bias_sum[part] = bias_sum + part * width;
          row.out[part] = out + part * width;
        }
        if (dropout.on) {
          dropout_bits(dropout.state, dropout.rate, row0 + i, width, 0, width, kept.get());
          row.kept = kept.get();
          row.scale = dropout.rate.scale;
        }
        make_row(row, width);
        if (deep_n > n) out[n] = C(0);
      }
      if (wants_weight) {
        transpose(grad_block.get(), ld_n, transposed.get() + row0, ld_m, rows, n);
        if (row0 + rows == m && deep_m > m) {
          for (int64_t j = 0; j < n; ++j) transposed.get()[j * ld_m + m] = C(0);
        }
      }
      if (!wants_input) return;
      alignas(64) A tile[kBlockRows<C> * kBlockCols];
      T* grad_input_data = grad_input.mutable_data_ptr<T>();
      for (int64_t col0 = 0; col0 < k; col0 += kBlockCols) {
        const int64_t cols = std::min(kBlockCols, k - col0);
        tile_gemm<C>(rows, cols, n, grad_block.get(), ld_n, packed_weight.get() + col0 * deep_n,
                     tile, kBlockCols, false);
        for (int64_t i = 0; i < rows; ++i) {
          store_row(grad_input_data + (row0 + i) * k + col0, tile + i * kBlockCols, cols);
        }
      }
    };
    // The input's panels come last, small tasks that even the threads out.
    const int64_t input_panels = wants_weight ? panels(k) : 0;
    share_tasks(blocks + input_panels, std::min(m, kBlockRows<C>) * n * (wants_input ? k : 16),
                [&](int64_t task) {
                  if (task < blocks) return run_block(task);
                  pack_panel<T, C>(x.data, x.stride_row, x.stride_col, m, k, task - blocks,
                                   packed_input.get());
                });
    if (wants_weight) {
      T* grad_weight_data = grad_weight.mutable_data_ptr<T>();
      const int64_t col_blocks = ceil_div(k, kBlockCols);
      const int64_t row_blocks = ceil_div(n, kBlockRows<C>);
      const bool by_column = m * kBlockCols * int64_t{sizeof(C)} >= kLargeColumns;
      share_tasks(
          row_blocks * col_blocks, std::min(n, kBlockRows<C>) * std::min(k, kBlockCols) * m,
          [&](int64_t task) {
            const int64_t row0 =
                (by_column ? task % row_blocks : task / col_blocks) * kBlockRows<C>;
            const int64_t col0 = (by_column ? task / row_blocks : task % col_blocks) * kBlockCols;
            const int64_t rows = std::min(kBlockRows<C>, n - row0),
                          cols = std::min(kBlockCols, k - col0);
            alignas(64) A tile[kBlockRows<C> * kBlockCols];
            tile_gemm<C>(rows, cols, m, transposed.get() + row0 * ld_m, ld_m,
                         packed_input.get() + col0 * deep_m, tile, kBlockCols, false);
            for (int64_t i = 0; i < rows; ++i) {
              store_row(grad_weight_data + (row0 + i) * k + col0, tile + i * kBlockCols, cols);
            }
          });
    }
    if (wants_bias) {
      const auto sum = Buffer<A>(n);
      std::fill_n(sum.get(), n, A(0));
      for (int64_t block = 0; block < blocks; ++block) {
        add_row<A>(sum.get(), partial_bias.get() + block * n, n);
      }
      store_row(grad_bias.mutable_data_ptr<T>(), sum.get(), n);
    }
  });
}

at::Tensor with_unit_columns(const at::Tensor& matrix) {
  return matrix.stride(-1) == 1 || matrix.size(-1) <= 1 ? matrix : matrix.contiguous();
}

void check_operands(const at::Tensor& input, const at::Tensor& weight, bool gated, const char* op) {
  check_float(input, true, op, "input");
  check_dtype(weight, input.scalar_type(), op, "weight");
  FASTNN_CHECK(weight.dim() == 2, op, "weight", "a matrix", weight.sizes());
  FASTNN_CHECK(input.dim() >= 1 && input.size(-1) == weight.size(1), op, "input",
               "of shape (*, " + std::to_string(weight.size(1)) + ")", input.sizes());
  FASTNN_CHECK(!gated || weight.size(0) % 2 == 0, op, "weight", "of an even number of rows",
               weight.sizes());
}

std::tuple<at::Tensor, at::Tensor> linear_act_forward_cpu(
    const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& residual, const std::optional<at::Tensor>& seed,
    std::string_view activation, double dropout_p, bool save_preact, bool gated) {
  constexpr const char* op = "linear_act_forward";
  check_activation(activation, gated, op);
  check_operands(input, weight, gated, op);
  check_dropout(dropout_p, seed, op);
  const int64_t k = weight.size(1), n = weight.size(0), width = gated ? n / 2 : n;
  auto shape = input.sizes().vec();
  shape.back() = width;
  at::Tensor out = empty_tensor(shape, input.options());
  shape.back() = n;
  at::Tensor preact =
      save_preact ? empty_tensor(shape, input.options()) : at::empty({0}, input.options());
  at::Tensor bias_row, residual_rows;
  if (bias) {
    check_shape(*bias, {n}, op, "bias");
    check_dtype(*bias, input.scalar_type(), op, "bias");
    bias_row = bias->contiguous();
  }
  if (residual) {
    check_shape(*residual, out.sizes(), op, "residual");
    check_dtype(*residual, input.scalar_type(), op, "residual");
    if (width) residual_rows = with_unit_columns(residual->reshape({-1, width}));
  }
  const Dropout dropout(dropout_p, seed);
  visit_float(input.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    if (out.numel() == 0) return;
    const at::Tensor rows = input.reshape({out.numel() / width, k});
    forward<T>(rows, weight, bias_row, residual_rows, dropout, activation, gated, out, preact);
  });
  return {out, preact};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_act_backward_cpu(
    const at::Tensor& grad_out, const at::Tensor& input, const at::Tensor& weight,
    const at::Tensor& saved, const std::optional<at::Tensor>& seed, std::string_view activation,
    double dropout_p, bool gated, std::array<bool, 3> output_mask) {
  constexpr const char* op = "linear_act_backward";
  check_activation(activation, gated, op);
  check_operands(input, weight, gated, op);
  check_dropout(dropout_p, seed, op);
  const int64_t k = weight.size(1), n = weight.size(0), width = gated ? n / 2 : n;
  auto shape = input.sizes().vec();
  shape.back() = width;
  check_shape(grad_out, shape, op, "grad_out");
  check_dtype(grad_out, input.scalar_type(), op, "grad_out");
  if (activation != "identity") {
    shape.back() = n;
    check_shape(saved, shape, op, "saved");
    check_dtype(saved, input.scalar_type(), op, "saved");
  }
  const auto empty = [&](bool wanted, at::IntArrayRef sizes) {
    return empty_tensor(wanted ? sizes : at::IntArrayRef{0}, input.options());
  };
  at::Tensor grad_input = empty(output_mask[0], input.sizes());
  at::Tensor grad_weight = empty(output_mask[1], weight.sizes());
  at::Tensor grad_bias = empty(output_mask[2], {n});
  const Dropout dropout(dropout_p, seed);
  visit_float(input.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    if (n == 0) {
      grad_input.zero_();
      return;
    }
    const int64_t m = grad_out.numel() / width;
    backward<T>(grad_out.contiguous(), input.reshape({m, k}), weight, saved.contiguous(), dropout,
                activation, gated, grad_input, grad_weight, grad_bias);
  });
  return {grad_input, grad_weight, grad_bias};
}

at::Tensor dropout_cpu(const at::Tensor& input, const at::Tensor& seed, double p) {
  constexpr const char* op = "dropout";
  check_float(input, true, op, "input");
  check_dropout(p, seed, op);
  const at::Tensor in = input.contiguous();
  at::Tensor out = empty_tensor(in.sizes(), in.options());
  if (out.numel() == 0) return out;
  const int64_t cols = in.dim() ? in.size(-1) : 1, rows = in.numel() / cols;
  // Pieces of a row, so that one long row is shared out too; a multiple of 8 columns.
  constexpr int64_t kPiece = 1 << 14;
  const int64_t pieces = ceil_div(cols, kPiece);
  const PhiloxState state = p > 0 ? philox_state(seed) : PhiloxState{};
  const DropoutRate rate = dropout_rate(p);
  visit_float(in.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const T* x = in.const_data_ptr<T>();
    T* y = out.mutable_data_ptr<T>();
    const bool large = out.nbytes() >= kStreamBytes;
    const AccVec<T> scale(static_cast<accumulate_t<T>>(rate.scale));
    const auto piece_of_row = [&](int64_t row, int64_t begin) {
      const int64_t end = std::min(cols, begin + kPiece);
      uint16_t bits[kDrawn / 16];
      for (int64_t col = begin; col < end; col += kDrawn) {
        const int64_t count = std::min(kDrawn, end - col);
        dropout_bits(state, rate, row, cols, col, count, bits);
        const T* from = x + row * cols + col;
        T* to = y + row * cols + col;
        const bool stream = large && count == kDrawn && streamable(to);
        for (int64_t i = 0; i < count; i += kLanes<T>) {
          const int64_t width = std::min(kLanes<T>, count - i);
          const AccVec<T> kept = keep_lanes(load_vec(from + i, width) * scale, bits_at(bits, i));
          if (stream) {
            stream_vec(to + i, kept);
          } else {
            store_vec(to + i, kept, width);
          }
        }
      }
    };
    parallel_ranges(rows * pieces, std::min(cols, kPiece) * 8, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        piece_of_row(task / pieces, task % pieces * kPiece);
      }
      end_stream();
    });
  });
  return out;
}

}  // namespace
}  // namespace CPU_CAPABILITY
}  // namespace fastnn

FASTNN_CPU_KERNELS(m) {
  m.impl("linear_act_forward", &fastnn::linear_act_forward_cpu);
  m.impl("linear_act_backward", &fastnn::linear_act_backward_cpu);
  m.impl("dropout", &fastnn::dropout_cpu);
}
