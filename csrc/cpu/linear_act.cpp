#include "dropout.h"
#include "gemm.h"
#include "registry.h"
FASTNN_CPU_KERNELS(m) {}
