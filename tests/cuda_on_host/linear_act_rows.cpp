// csrc/cuda/linear_act_rows.cu as a host library, for tests/test_cuda_linear_act_on_host.py.
#include "cuda/linear_act_rows.cu"

extern "C" {

int apply_epilogue(const fastnn::Epilogue* epilogue, int storage, int64_t rows) {
  return fastnn::apply_epilogue_cuda(*epilogue, static_cast<fastnn::Storage>(storage), rows,
                                     nullptr);
}

int preact_grad(fastnn::PreactGradient gradient, int storage) {
  std::vector<float> scratch(
      fastnn::preact_grad_scratch(gradient.rows, gradient.width * (gradient.gated ? 2 : 1)));
  gradient.scratch = scratch.data();
  return fastnn::preact_grad_cuda(gradient, static_cast<fastnn::Storage>(storage), nullptr);
}

int dropout(const void* in, void* out, int storage, int64_t rows, int64_t cols, const int64_t* seed,
            double p) {
  const fastnn::DropoutRate rate = fastnn::dropout_rate(p);
  return fastnn::dropout_cuda(in, out, static_cast<fastnn::Storage>(storage), rows, cols, seed,
                              rate.threshold, rate.scale, nullptr);
}
}
