// csrc/cuda/linear_cross_entropy.cu as a host library, for tests/test_cuda_on_host.py.
#include "cuda/linear_cross_entropy.cu"

extern "C" {

int compact(const int64_t* labels, int rows, int classes, int64_t ignore_index,
            const float* class_weight, int* place, int* kept, float* row_weight) {
  return fastnn::compact_rows_cuda(labels, rows, classes, ignore_index, class_weight, place, kept,
                                   row_weight, nullptr);
}

int scalars(const float* total_weight, const int* kept, float* scalars) {
  return fastnn::gemm_scalars_cuda(total_weight, kept, scalars, nullptr);
}

int move(void* from, int64_t from_stride, void* to, int64_t to_stride, int64_t bytes, int element,
         const int* place, const int* kept, int first, int rows, bool scatter) {
  return fastnn::move_rows_cuda({from, from_stride}, {to, to_stride}, bytes, element, place,
                                {kept, first}, rows, scatter, nullptr);
}

int merge_statistics(const fastnn::CrossEntropyProblem* problem,
                     const fastnn::RowStatistics* statistics, int64_t tiles, float* row_loss,
                     float* lse) {
  return fastnn::merge_statistics_cuda(*problem, *statistics, tiles, row_loss, lse, nullptr);
}

int scale(void* data, int storage, int64_t count, const float* scale) {
  return fastnn::scale_cuda(data, static_cast<fastnn::Storage>(storage), count, scale, nullptr);
}
}
