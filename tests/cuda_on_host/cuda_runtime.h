// Just enough of CUDA to run the kernels of csrc/cuda on the host, compiled as C++: every thread of
// a block is a fiber, and fibers are resumed in a random order, so that a missing barrier shows. A
// barrier that not every thread reaches ends the program with a message. The blocks of a cluster
// run side by side on threads of the system, whose thread-local variables are their shared memory.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static thread_local
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
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

// A device of few multiprocessors, so that few rows fill it.
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrClusterLaunch };
struct cudaFuncAttributes {
  int ptxVersion;
};
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 2 : 1;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
  attributes->ptxVersion = 90;
  return cudaSuccess;
}

namespace on_host {

constexpr int kWarpSize = 32;
constexpr size_t kStack = 128 * 1024;

inline thread_local uint32_t random_state = 1;

inline uint32_t random_number() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 17;
  return random_state ^= random_state << 5;
}

// A barrier of `size` threads that also combines a predicate and exchanges a word per thread. Two
// sets of slots: nobody is two generations ahead of a thread that has still to read.
struct Barrier {
  int size = 0, arrived = 0;
  std::atomic<unsigned> generation = 0;
  bool any[2] = {false, false};
  float slots[2][kWarpSize] = {};
};

struct Fiber {
  ucontext_t context;  // to enter it; later switches are jumps, which make no system call
  jmp_buf resumption;
  std::unique_ptr<char[]> stack;
  bool entered = false, done = false;
  const std::atomic<unsigned>* waits_for = nullptr;  // a generation that has to move on
  unsigned seen = 0, seen_by_cluster = 0;
};

// The blocks that run side by side; `anchors` are the addresses of their copies of one variable.
struct Cluster {
  unsigned threads = 0;
  std::atomic<unsigned> arrived = 0, generation = 0;
  std::vector<char*> anchors;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Barrier> warps;
  Barrier all;
  jmp_buf scheduler;
  std::function<void()> body;
  unsigned current = 0;
};

inline thread_local Block* block = nullptr;
inline thread_local Cluster* cluster = nullptr;
inline thread_local unsigned rank = 0;
inline thread_local char anchor = 0;

inline void wait_for(const std::atomic<unsigned>& generation, unsigned seen) {
  Fiber& fiber = block->fibers[block->current];
  fiber.waits_for = &generation;
  fiber.seen = seen;
  if (_setjmp(fiber.resumption) == 0) _longjmp(block->scheduler, 1);
}

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
  wait_for(barrier.generation, generation);
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

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace on_host {

inline void run_block(unsigned threads, const std::function<void()>& body) {
  Block running;
  block = &running;
  running.body = body;
  running.fibers.resize(threads);
  running.warps = std::vector<Barrier>(threads / kWarpSize);
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
  auto deadline = std::chrono::steady_clock::now();
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
    // The other blocks of a cluster may still arrive, for a while.
    const auto now = std::chrono::steady_clock::now();
    if (moved) {
      deadline = now + std::chrono::seconds(cluster == nullptr ? 0 : 60);
    } else if (now < deadline) {
      std::this_thread::yield();
    } else {
      std::fprintf(stderr, "a barrier was not reached by every thread\n");
      std::abort();
    }
  }
  block = nullptr;
}

}  // namespace on_host

inline void __syncthreads() { on_host::wait(on_host::block->all, false); }

inline unsigned __ballot_sync(unsigned, bool predicate) {
  const int lane = threadIdx.x % on_host::kWarpSize;
  auto& barrier = on_host::block->warps[threadIdx.x / on_host::kWarpSize];
  barrier.slots[barrier.generation % 2][lane] = predicate;
  const int set = on_host::wait(barrier, false);
  unsigned ballot = 0;
  for (int other = 0; other < on_host::kWarpSize; ++other) {
    ballot |= static_cast<unsigned>(barrier.slots[set][other] != 0.f) << other;
  }
  return ballot;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

inline void __syncwarp() {
  on_host::wait(on_host::block->warps[threadIdx.x / on_host::kWarpSize], false);
}

inline unsigned __clusterSizeInBlocks() {
  return static_cast<unsigned>(on_host::cluster->anchors.size());
}
inline unsigned __clusterRelativeBlockRank() { return on_host::rank; }
inline void* __cluster_map_shared_rank(const void* shared, unsigned rank) {
  const auto offset = static_cast<const char*>(shared) - &on_host::anchor;
  return on_host::cluster->anchors[rank] + offset;
}
inline void __cluster_barrier_arrive() {
  auto& cluster = *on_host::cluster;
  on_host::block->fibers[on_host::block->current].seen_by_cluster = cluster.generation;
  if (++cluster.arrived == cluster.threads) {
    cluster.arrived = 0;
    ++cluster.generation;
  }
}
inline void __cluster_barrier_arrive_relaxed() { __cluster_barrier_arrive(); }
inline void __cluster_barrier_wait() {
  const auto& generation = on_host::cluster->generation;
  const unsigned seen = on_host::block->fibers[on_host::block->current].seen_by_cluster;
  if (generation == seen) on_host::wait_for(generation, seen);
}

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

namespace on_host {

inline void run_cluster(const cudaLaunchConfig_t& config, unsigned first, unsigned blocks,
                        const std::function<void()>& body) {
  Cluster shared;
  shared.threads = blocks * config.blockDim.x;
  shared.anchors.resize(blocks);
  std::atomic<unsigned> ready = 0;
  const uint32_t seed = random_state;
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < blocks; ++i) {
    threads.emplace_back([&, i] {
      random_state = seed + i;
      gridDim = config.gridDim;
      blockDim = config.blockDim;
      blockIdx = dim3(first + i);
      cluster = &shared;
      rank = i;
      shared.anchors[i] = &anchor;
      for (++ready; ready < blocks;) std::this_thread::yield();
      run_block(config.blockDim.x, body);
    });
  }
  for (auto& thread : threads) thread.join();
}

}  // namespace on_host

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  const std::function<void()> body = [&] { kernel(arguments...); };
  const unsigned cluster = config->numAttrs == 0 ? 1 : config->attrs[0].val.clusterDim.x;
  for (unsigned i = 0; i < config->gridDim.x; i += cluster) {
    blockIdx = dim3(i, 0, 0);
    if (cluster > 1) {
      on_host::run_cluster(*config, i, cluster, body);
    } else {
      on_host::run_block(config->blockDim.x, body);
    }
  }
  return cudaSuccess;
}
