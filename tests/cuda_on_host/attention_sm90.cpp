// csrc/cuda/attention_sm90.cu as a host library, for tests/test_cuda_attention_sm90_on_host.py.
#include "cuda/attention_sm90.cu"

extern "C" {

void set_seed(uint32_t seed) { on_host::random_state = seed; }

bool forward_serves(const fastnn::AttentionForward* problem) {
  return fastnn::attention_forward_sm90_serves(*problem);
}

int forward(const fastnn::AttentionForward* problem, int blocks) {
  return fastnn::attention_forward_sm90_cuda(*problem, blocks, nullptr);
}
}
