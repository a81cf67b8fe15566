// csrc/cuda/attention_backward.cu as a host library, for tests/test_cuda_attention_on_host.py.
#include "cuda/attention_backward.cu"

extern "C" int backward_portable(const fastnn::AttentionBackward* problem) {
  return fastnn::attention_backward_portable_cuda(*problem, nullptr);
}
