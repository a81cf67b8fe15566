// csrc/cuda/attention_rows.cu as a host library, for tests/test_cuda_attention_on_host.py.
#include "cuda/attention_rows.cu"

extern "C" {

int rows(const fastnn::AttentionBackward* problem) {
  return fastnn::attention_rows_cuda(*problem, nullptr);
}

int sinks_gradient(const fastnn::AttentionBackward* problem) {
  return fastnn::attention_sinks_gradient_cuda(*problem, nullptr);
}

int64_t mask_parts(const fastnn::AttentionBackward* problem) {
  return fastnn::attention_mask_parts(*problem);
}

int mask_gradient(const fastnn::AttentionBackward* problem) {
  return fastnn::attention_mask_gradient_cuda(*problem, nullptr);
}
}
