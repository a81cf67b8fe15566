// csrc/cuda/linear_act.cu as a host library, for tests/test_cuda_linear_act_on_host.py.
#include "cuda/linear_act.cu"

extern "C" {

void set_seed(unsigned seed) { on_host::random_state = seed; }

int find_activation(const char* name, bool* gated) {
  const auto found = fastnn::find_activation(name);
  *gated = found.gated;
  return found.id;
}

int gemm_portable(const fastnn::GemmProblem* problem) {
  return fastnn::gemm_portable_cuda(*problem, nullptr);
}
}
