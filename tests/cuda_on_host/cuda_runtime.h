// Just enough of CUDA to run the kernels of csrc/cuda on the host, compiled as C++: every thread of
// a block is a fiber, and fibers are resumed in a random order, so that a missing barrier shows. A
// barrier that not every thread reaches ends the program with a message. The blocks of a cluster
// run side by side on threads of the system, whose thread-local variables are their shared memory;
// one of them at a time runs, for a round of its fibers.
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
#include <mutex>
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
struct alignas(8) float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

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
  int ptxVersion, numRegs;
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaMemcpyKind { cudaMemcpyDefault };
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
  attributes->numRegs = 255;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}
template <typename T>
cudaError_t cudaMalloc(T** memory, size_t bytes) {
  *memory = static_cast<T*>(std::aligned_alloc(256, (bytes + 255) / 256 * 256));
  return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "an error"; }

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
  const void* offers[kWarpSize] = {};
};

using Task = std::function<void()>;

struct Fiber {
  ucontext_t context;  // to enter it; later switches are jumps, which make no system call
  jmp_buf resumption;
  std::unique_ptr<char[]> stack;
  bool entered = false, done = false;
  const std::atomic<unsigned>* waits_for = nullptr;  // a generation that has to move on
  unsigned seen = 0, seen_by_cluster = 0;
  // Asynchronous work of this thread that is not done yet: closed groups, and the open one.
  std::vector<std::vector<Task>> groups;
  std::vector<Task> open;
};

// The blocks that run side by side; `anchors` are the addresses of their copies of one variable,
// `shared` their dynamic shared memory.
struct Cluster {
  unsigned threads = 0;
  std::atomic<unsigned> arrived = 0, generation = 0;
  std::vector<char*> anchors, shared;
  std::mutex turn;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Barrier> warps;
  Barrier all;
  Barrier groups[8];  // of four warps
  Barrier named[16];
  std::vector<Task> copies;  // by the copy engine, done at a random time
  char* shared = nullptr;    // dynamic
  jmp_buf scheduler;
  std::function<void()> body;
  unsigned current = 0;
};

inline thread_local Block* block = nullptr;
inline thread_local Cluster* cluster = nullptr;
inline thread_local unsigned rank = 0;
inline thread_local char anchor = 0;

inline Fiber& fiber() { return block->fibers[block->current]; }

inline void pause() {
  if (_setjmp(fiber().resumption) == 0) _longjmp(block->scheduler, 1);
}

inline void wait_for(const std::atomic<unsigned>& generation, unsigned seen) {
  fiber().waits_for = &generation;
  fiber().seen = seen;
  pause();
}

// Lets the others go on; now and then for so long that a thread which overwrites what this one has
// still to read does so.
inline void dawdle() {
  for (int turns = random_number() % 32 == 0 ? 60 : 0; turns > 0; --turns) pause();
}

// Returns the generation that this thread is of.
inline unsigned arrive(Barrier& barrier, bool predicate) {
  const unsigned generation = barrier.generation;
  const int set = generation % 2;
  barrier.any[set] = barrier.any[set] || predicate;
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    barrier.any[1 - set] = false;
    ++barrier.generation;
  }
  return generation;
}

// Returns the generation's slot set, once every thread has arrived.
inline int wait(Barrier& barrier, bool predicate) {
  const unsigned generation = arrive(barrier, predicate);
  if (barrier.generation == generation) wait_for(barrier.generation, generation);
  return generation % 2;
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

// Every lane of the warp offers a pointer; `use` gets all of them, and no lane goes on before every
// lane has used them.
template <typename Use>
void exchange(const void* offer, const Use& use) {
  Barrier& warp = block->warps[threadIdx.x / kWarpSize];
  warp.offers[threadIdx.x % kWarpSize] = offer;
  wait(warp, false);
  use(warp.offers);
  wait(warp, false);
}

// Closes the running thread's open group of asynchronous work.
inline void commit_group() {
  fiber().groups.push_back(std::move(fiber().open));
  fiber().open.clear();
}

// Does the running thread's groups but the last `pending`.
inline void wait_groups(size_t pending) {
  auto& groups = fiber().groups;
  while (groups.size() > pending) {
    for (const Task& task : groups.front()) task();
    groups.erase(groups.begin());
  }
}

inline void do_random_copy() {
  auto& copies = block->copies;
  const size_t index = random_number() % copies.size();
  const Task copy = std::move(copies[index]);
  copies.erase(copies.begin() + static_cast<std::ptrdiff_t>(index));
  copy();
}

// Dynamic shared memory: NaN until it is written.
class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes) : memory_(new char[bytes + kAlignment]) {
    std::memset(memory_.get(), 0xff, bytes + kAlignment);
  }
  char* data() const {
    return memory_.get() + (kAlignment - reinterpret_cast<uintptr_t>(memory_.get()) % kAlignment);
  }

 private:
  static constexpr size_t kAlignment = 1024;
  std::unique_ptr<char[]> memory_;
};

inline void run_block(unsigned threads, char* shared, const std::function<void()>& body) {
  Block running;
  block = &running;
  running.shared = shared;
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
    std::unique_lock<std::mutex> turn;
    if (cluster != nullptr) turn = std::unique_lock(cluster->turn);
    for (const unsigned index : order) {
      if (!running.copies.empty() && random_number() % 64 == 0) {
        do_random_copy();
        moved = true;  // who waits for it may have been passed over already
      }
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
    if (!moved && !running.copies.empty()) {
      do_random_copy();
      moved = true;
    }
    if (turn) turn.unlock();
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
  if (!running.copies.empty()) {
    std::fprintf(stderr, "a copy was under way when its block ended\n");
    std::abort();
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

// The word of lane `source` of the warp.
template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  static_assert(sizeof(T) == sizeof(float), "a word");
  auto& barrier = on_host::block->warps[threadIdx.x / on_host::kWarpSize];
  float* const slots = barrier.slots[barrier.generation % 2];
  std::memcpy(slots + threadIdx.x % on_host::kWarpSize, &value, sizeof(value));
  const int set = on_host::wait(barrier, false);
  std::memcpy(&value, barrier.slots[set] + source, sizeof(value));
  return value;
}
template <typename T>
T __shfl_xor_sync(unsigned all, T value, int mask) {
  const int lane = threadIdx.x % on_host::kWarpSize;
  return __shfl_sync(all, value, lane ^ mask);
}

inline int atomicAdd(int* sum, int value) { return std::atomic_ref<int>(*sum).fetch_add(value); }

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
  std::vector<SharedMemory> memory;
  for (unsigned i = 0; i < blocks; ++i) {
    memory.emplace_back(config.dynamicSmemBytes);
    shared.shared.push_back(memory.back().data());
  }
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
      run_block(config.blockDim.x, shared.shared[i], body);
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
      const on_host::SharedMemory shared(config->dynamicSmemBytes);
      on_host::run_block(config->blockDim.x, shared.data(), body);
    }
  }
  return cudaSuccess;
}
