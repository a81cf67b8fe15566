// csrc/cuda/linear_act_sm90.cu as a host library, for tests/test_cuda_linear_act_on_host.py.
#include "cuda/linear_act_sm90.cu"

#include "cuda/linear_act_paths.h"

extern "C" {

int gemm_sm90(const fastnn::GemmProblem* problem) {
  if (!fastnn::gemm_sm90_serves(*problem)) return -1;
  return fastnn::gemm_sm90_cuda(*problem, 5, nullptr);  // two clusters
}

int choose_path(const fastnn::GemmProblem* problem, int capability) {
  return static_cast<int>(fastnn::choose_path(*problem, capability));
}

void tile_at(int tiles_m, int tiles_n, int index, int* m, int* n) {
  const auto tile = fastnn::TileOrder{tiles_m, tiles_n}.at(index);
  *m = tile.m;
  *n = tile.n;
}
}
