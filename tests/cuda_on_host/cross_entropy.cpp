// csrc/cuda/cross_entropy.cu as a host library, for tests/test_cuda_on_host.py.
#include "cuda/cross_entropy.cu"

extern "C" {

void set_seed(unsigned seed) { on_host::random_state = seed; }

int forward(const fastnn::CrossEntropyProblem* problem, float* row_loss, float* lse,
            float* row_weight) {
  return fastnn::cross_entropy_forward_cuda(*problem, row_loss, lse, row_weight, nullptr);
}

int reduce(const float* row_loss, const float* row_weight, int64_t rows, bool mean, float* loss,
           float* total_weight) {
  std::vector<float> scratch(fastnn::reduce_loss_scratch(rows));
  return fastnn::reduce_loss_cuda(row_loss, row_weight, rows, mean, scratch.data(), loss,
                                  total_weight, nullptr);
}

int backward(const fastnn::CrossEntropyProblem* problem,
             const fastnn::CrossEntropyGradient* gradient) {
  return fastnn::cross_entropy_backward_cuda(*problem, *gradient, nullptr);
}
}
