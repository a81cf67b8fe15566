// csrc/cuda/attention_backward_sm90.cu as a host library, for
// tests/test_cuda_attention_sm90_on_host.py.
#include "cuda/attention_backward_sm90.cu"

extern "C" {

bool backward_serves(const fastnn::AttentionBackward* problem) {
  return fastnn::attention_backward_sm90_serves(*problem);
}

int backward(const fastnn::AttentionBackward* problem, int blocks) {
  return fastnn::attention_backward_sm90_cuda(*problem, blocks, nullptr);
}
}
