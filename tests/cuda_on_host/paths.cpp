// The rules that choose among the CUDA kernels, in words, for tests/test_info.py.
#include "cuda/attention.h"
#include "cuda/linear_act_paths.h"

extern "C" {

const char* attention() { return fastnn::kAttentionPaths; }

const char* linear_act() {
  static const std::string text = fastnn::describe(fastnn::kPaths);
  return text.c_str();
}

const char* linear_cross_entropy() {
  static const std::string text = fastnn::describe(fastnn::kCountedPaths);
  return text.c_str();
}
}
