// Just enough of CUDA to run the kernels of csrc/cuda on the host, compiled as C++: every thread of
// a block is a fiber, and fibers are resumed in a random order, so that a missing barrier shows. A
// barrier that not every thread reaches ends the program with a message.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

using std::max;
using std::min;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace on_host {

constexpr int kWarpSize = 32;
constexpr size_t kStack = 128 * 1024;

inline uint32_t random_state = 1;

inline uint32_t random_number() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 17;
  return random_state ^= random_state << 5;
}

// A barrier of `size` threads that also combines a predicate and exchanges a word per thread. Two
// sets of slots: nobody is two generations ahead of a thread that has still to read.
struct Barrier {
  int size = 0, arrived = 0;
  unsigned generation = 0;
  bool any[2] = {false, false};
  float slots[2][kWarpSize] = {};
};

struct Fiber {
  ucontext_t context;  // to enter it; later switches are jumps, which make no system call
  jmp_buf resumption;
  std::unique_ptr<char[]> stack;
  bool entered = false, done = false;
  const unsigned* waits_for = nullptr;  // a generation that has to move on
  unsigned seen = 0;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Barrier> warps;
  Barrier all;
  jmp_buf scheduler;
  std::function<void()> body;
  unsigned current = 0;
};

inline Block* block = nullptr;

// Returns the generation's slot set, once every thread has arrived.
inline int wait(Barrier& barrier, bool predicate) {
  const unsigned generation = barrier.generation;
  const int set = generation % 2;
  barrier.any[set] = barrier.any[set] || predicate;
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    barrier.any[1 - set] = false;
    ++barrier.generation;
    return set;
  }
  Fiber& fiber = block->fibers[block->current];
  fiber.waits_for = &barrier.generation;
  fiber.seen = generation;
  if (_setjmp(fiber.resumption) == 0) _longjmp(block->scheduler, 1);
  return set;
}

inline void enter() {
  block->body();
  block->fibers[block->current].done = true;
  _longjmp(block->scheduler, 1);
}

// Runs a fiber up to its next barrier or its end.
__attribute__((noinline)) inline void resume(Fiber& fiber) {
  if (_setjmp(block->scheduler) != 0) return;
  if (fiber.entered) _longjmp(fiber.resumption, 1);
  fiber.entered = true;
  setcontext(&fiber.context);
}

}  // namespace on_host

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace on_host {

inline void run_block(unsigned threads, const std::function<void()>& body) {
  Block running;
  block = &running;
  running.body = body;
  running.fibers.resize(threads);
  running.warps.resize(threads / kWarpSize);
  for (auto& warp : running.warps) warp.size = kWarpSize;
  running.all.size = static_cast<int>(threads);
  for (auto& fiber : running.fibers) {
    fiber.stack.reset(new char[kStack]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, reinterpret_cast<void (*)()>(enter), 0);
  }
  std::vector<unsigned> order(threads);
  for (unsigned i = 0; i < threads; ++i) order[i] = i;
  unsigned done = 0;
  while (done < threads) {
    for (unsigned i = threads - 1; i > 0; --i)
      std::swap(order[i], order[random_number() % (i + 1)]);
    bool moved = false;
    for (const unsigned index : order) {
      Fiber& fiber = running.fibers[index];
      const bool waits = fiber.waits_for != nullptr && *fiber.waits_for == fiber.seen;
      if (fiber.done || waits) continue;
      fiber.waits_for = nullptr;
      running.current = index;
      threadIdx = dim3(index);
      moved = true;
      resume(fiber);
      done += fiber.done;
    }
    if (!moved) {
      std::fprintf(stderr, "a barrier was not reached by every thread\n");
      std::abort();
    }
  }
  block = nullptr;
}

}  // namespace on_host

inline void __syncthreads() { on_host::wait(on_host::block->all, false); }

inline int __syncthreads_or(int predicate) {
  auto& barrier = on_host::block->all;
  return barrier.any[on_host::wait(barrier, predicate != 0)];
}

inline float __shfl_xor_sync(unsigned, float value, int mask) {
  const int lane = threadIdx.x % on_host::kWarpSize;
  auto& barrier = on_host::block->warps[threadIdx.x / on_host::kWarpSize];
  barrier.slots[barrier.generation % 2][lane] = value;
  return barrier.slots[on_host::wait(barrier, false)][lane ^ mask];
}

inline float __int_as_float(int bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline float __fdividef(float x, float y) { return x / y; }
template <typename T>
T __ldg(const T* pointer) {
  return *pointer;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  for (unsigned i = 0; i < config->gridDim.x; ++i) {
    blockIdx = dim3(i, 0, 0);
    on_host::run_block(config->blockDim.x, [&] { kernel(arguments...); });
  }
  return cudaSuccess;
}
