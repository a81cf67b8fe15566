// Which kernel makes a product: the tables, by shape and device.
#pragma once

#include <string>

#include "cuda/linear_act.h"

namespace fastnn {

enum class GemmPath : int { kSm90, kPortable, kCublas };

struct PathRow {
  int capability;                     // of the device, 10 * major; 0 is any
  bool half_only;                     // not for float32
  int64_t least_m, least_n, least_k;  // the smallest shape
  int64_t most_m, most_n, most_k;     // the largest
  GemmPath path;
};

// The first row that fits and whose kernel can serve the problem. UNMEASURED: what reasoning
// suggests until a GPU has filled it.
//   Hopper's own kernel wants a cluster's tile of 256 x 256 and enough of K for its pipeline; below
//   that, one launch of the portable kernel beats a product and an epilogue where both are short.
constexpr int64_t kAny = int64_t{1} << 62;
constexpr PathRow kPaths[] = {
    {90, true, 256, 256, 256, kAny, kAny, kAny, GemmPath::kSm90},
    {0, true, 1, 1, 0, 512, 512, 1024, GemmPath::kPortable},
    {0, false, 1, 1, 0, 128, 128, 256, GemmPath::kPortable},
    {0, false, 0, 0, 0, kAny, kAny, kAny, GemmPath::kCublas},
};

// Products whose rows only the device counts, and logits that leave only statistics (both of linear
// cross-entropy; gradients go with the logits). cuBLAS has its extents from the host: it multiplies
// the rows that are not there as zeros, and stores the logits. UNMEASURED: ours costs the dense
// case what it is behind cuBLAS (at most 5 % is the aim), and saves the share of rows that are
// ignored.
constexpr PathRow kCountedPaths[] = {
    {90, true, 128, 256, 64, kAny, kAny, kAny, GemmPath::kSm90},
    {0, false, 0, 0, 0, kAny, kAny, kAny, GemmPath::kCublas},
};

inline bool path_serves(GemmPath path, const GemmProblem& p, int capability) {
  return path != GemmPath::kSm90 || (capability == 90 && gemm_sm90_serves(p) && gemm_sm90_built());
}

template <int kRows>
GemmPath choose_row(const PathRow (&table)[kRows], const GemmProblem& p, int capability) {
  for (const PathRow& row : table) {
    const bool fits = (row.capability == 0 || row.capability == capability) &&
                      !(row.half_only && p.storage == Storage::kFloat32) && p.m >= row.least_m &&
                      p.n >= row.least_n && p.k >= row.least_k && p.m <= row.most_m &&
                      p.n <= row.most_n && p.k <= row.most_k;
    if (fits && path_serves(row.path, p, capability)) return row.path;
  }
  return GemmPath::kCublas;
}

// A table in words, for fastnn.info: the first that fits.
template <int kRows>
std::string describe(const PathRow (&table)[kRows]) {
  const auto shape = [](int64_t m, int64_t n, int64_t k) {
    return std::to_string(m) + " x " + std::to_string(n) + " x " + std::to_string(k);
  };
  std::string text;
  for (const PathRow& row : table) {
    const std::string name = row.path == GemmPath::kSm90       ? "sm90"
                             : row.path == GemmPath::kPortable ? "portable"
                                                               : "cublas";
    std::string when;
    if (row.capability != 0) when += ", compute capability " + std::to_string(row.capability / 10);
    if (row.half_only) when += ", bfloat16 and float16";
    if (row.least_m > 1) when += ", from " + shape(row.least_m, row.least_n, row.least_k);
    if (row.most_m < kAny) when += ", up to " + shape(row.most_m, row.most_n, row.most_k);
    text += (text.empty() ? "" : "; ") + name + (when.empty() ? "" : ": " + when.substr(2));
  }
  return text;
}

inline GemmPath choose_path(const GemmProblem& p, int capability) {
  return p.rows.total == nullptr ? choose_row(kPaths, p, capability)
                                 : choose_row(kCountedPaths, p, capability);
}

}  // namespace fastnn
