// csrc/cuda/attention.cu as a host library, for tests/test_cuda_attention_on_host.py.
#include "cuda/attention.cu"

extern "C" {

void set_seed(unsigned seed) { on_host::random_state = seed; }

int64_t splits(const fastnn::AttentionProblem* problem, int multiprocessors) {
  return fastnn::attention_splits(*problem, multiprocessors);
}

int64_t split_scratch(const fastnn::AttentionProblem* problem, int64_t splits) {
  return fastnn::attention_split_scratch(*problem, splits);
}

int forward_portable(const fastnn::AttentionForward* problem) {
  return fastnn::attention_forward_portable_cuda(*problem, nullptr);
}
}
