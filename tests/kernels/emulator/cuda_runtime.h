// Stands in for <cuda_runtime.h> where csrc/*/cuda.cu is compiled by a plain C++ compiler: kernels run on the CPU, one
// thread of a block at a time, so that their arithmetic, indices and barriers can be tested where there is no GPU.
//
// A launch runs at once, block after block. The threads of a block are coroutines; one gives way at a barrier, a shuffle
// or when it ends. They take turns in ascending order in even blocks and in descending order in odd ones. Asynchronous
// copies take place at once in even blocks, and when their thread waits for them in odd ones. Barriers that some threads
// of a block or warp never reach are an error, and so are data races if races.h is included. What this cannot show is
// what nvcc makes of the code. It holds only what the kernels use.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __shared__ static  // blocks run one after another
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

// ---- threads ----

namespace emulator {

constexpr size_t stack_bytes = 128 << 10;

struct Barrier {
  int waiting = 0;
  uint64_t passed = 0;
};

struct Thread {
  std::unique_ptr<char[]> stack{new char[stack_bytes]};
  ucontext_t start;
  jmp_buf place;
  bool begun, ended;
  uint64_t barriers;  // of the block that it has passed
  std::vector<std::pair<void*, const void*>> copies;  // (to, from) of 16 bytes each, not yet made
};

struct Warp {
  Barrier barrier;
  int running;
  uint64_t values[warpSize];
};

inline std::deque<Thread> threads;  // kept from launch to launch
inline std::vector<Warp> warps;
inline Barrier block_barrier;
inline int current, running;
inline bool in_kernel;  // the code of a kernel runs, not the emulator's
inline bool moved;  // something happened since the last look: a barrier was passed or a thread ended
inline jmp_buf scheduler;
inline std::function<void()> body;
inline std::vector<unsigned char> dynamic_shared;

inline void* aligned_shared() {
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(dynamic_shared.data()) + 127) / 128 * 128);
}

inline void give_way() {
  if (!_setjmp(threads[current].place)) _longjmp(scheduler, 1);
}

// While it lives, the emulator's own code runs.
struct Outside {
  const bool before = in_kernel;
  Outside() { in_kernel = false; }
  ~Outside() { in_kernel = before; }
};

// `expected` is read again and again: threads that end no longer count.
inline void wait(Barrier& barrier, const int& expected) {
  const Outside outside;
  const uint64_t mine = barrier.passed;
  ++barrier.waiting;
  while (barrier.passed == mine) {
    if (barrier.waiting >= expected) {
      barrier.waiting = 0, ++barrier.passed, moved = true;
    } else {
      give_way();
    }
  }
}

inline Warp& my_warp() { return warps[size_t(current) / warpSize]; }

inline void run_thread() {
  in_kernel = true;
  body();
  in_kernel = false;
  threads[current].ended = true, moved = true;
  --running, --my_warp().running;
  _longjmp(scheduler, 1);
}

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "CUDA emulator: block %u: %s\n", blockIdx.x, message);
  std::abort();
}

inline void enter(int thread) {
  current = thread;
  threadIdx = dim3(unsigned(thread));
  Thread& t = threads[thread];
  if (_setjmp(scheduler)) return;
  if (t.begun) _longjmp(t.place, 1);
  t.begun = true;
  getcontext(&t.start);
  t.start.uc_stack.ss_sp = t.stack.get();
  t.start.uc_stack.ss_size = stack_bytes;
  t.start.uc_link = nullptr;
  makecontext(&t.start, run_thread, 0);
  setcontext(&t.start);
}

inline void run_block(int count) {
  while (int(threads.size()) < count) threads.emplace_back();
  for (int i = 0; i < count; ++i) {
    Thread& thread = threads[i];
    thread.begun = thread.ended = false, thread.barriers = 0, thread.copies.clear();
  }
  warps.assign(size_t(count + warpSize - 1) / warpSize, {});
  for (int i = 0; i < count; ++i) ++warps[size_t(i) / warpSize].running;
  block_barrier = {};
  running = count;
  while (running) {
    moved = false;
    for (int i = 0; i < count; ++i) {
      const int thread = blockIdx.x % 2 ? count - 1 - i : i;
      if (!threads[thread].ended) enter(thread);
    }
    if (!moved) fail("threads wait at barriers that others never reach");
  }
}

template <typename T>
T exchange(unsigned mask, T value, int from) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  const Outside outside;
  Warp& warp = my_warp();
  if (mask != 0xffffffff) fail("only shuffles of whole warps are emulated");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  warp.values[current % warpSize] = bits;
  wait(warp.barrier, warp.running);
  bits = warp.values[from];
  wait(warp.barrier, warp.running);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// ---- numbers ----

inline float square_root(float x) { return std::sqrt(x); }

#ifdef __aarch64__
using Half = __fp16;  // C++ has _Float16 there from GCC 13 on
#else
using Half = _Float16;
#endif

inline float widen_f16(uint16_t bits) {
  Half half;
  std::memcpy(&half, &bits, sizeof half);
  return float(half);
}

inline uint16_t narrow_f16(float x) {
  const Half half = Half(x);
  uint16_t bits;
  std::memcpy(&bits, &half, sizeof bits);
  return bits;
}

inline uint16_t narrow_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return x != x ? 0x7fff : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// A neighbour of y two steps away, up or down by a hash of its bits. 1, 0, inf and NaN stay.
inline float off_by_2_ulp(float y) {
  uint32_t bits;
  std::memcpy(&bits, &y, sizeof bits);
  if (y == 1 || (bits & 0x7fffffff) < 3 || (bits & 0x7f800000) == 0x7f800000) return y;
  bits += bits * 2654435761u >> 31 ? 2 : -2;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

}  // namespace emulator

#ifdef __SANITIZE_THREAD__
#include "races.h"
#else
namespace emulator {
inline void forget_launch() {}
inline void forget_block() {}
inline void accessed(const void*, size_t, bool) {}
}  // namespace emulator
#endif

namespace emulator {

inline void copy_async(void* to, const void* from) {
  const Outside outside;
  accessed(from, 16, false), accessed(to, 16, true);
  if (blockIdx.x % 2) {
    threads[current].copies.emplace_back(to, from);
  } else {
    std::memcpy(to, from, 16);
  }
}

inline void wait_for_copies() {
  const Outside outside;
  for (const auto& [to, from] : threads[current].copies) {
    accessed(to, 16, true);
    std::memcpy(to, from, 16);
  }
  threads[current].copies.clear();
}

}  // namespace emulator

// ---- functions of CUDA C++ ----

inline void __syncthreads() {
  const emulator::Outside outside;
  emulator::wait(emulator::block_barrier, emulator::running);
  ++emulator::threads[emulator::current].barriers;
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return emulator::exchange(mask, value, int(threadIdx.x % warpSize) ^ lanes);
}
inline unsigned __ballot_sync(unsigned mask, bool vote) {
  unsigned votes = 0;
  for (int lane = 0; lane < warpSize; ++lane) votes |= unsigned(emulator::exchange(mask, vote, lane)) << lane;
  return votes;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
template <typename T>
T atomicMax(T* p, T x) {
  const emulator::Outside outside;
  return std::exchange(*p, *p < x ? x : *p);
}

inline float __uint_as_float(unsigned x) {
  float f;
  std::memcpy(&f, &x, 4);
  return f;
}
inline unsigned __float_as_uint(float x) {
  unsigned u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }

// Compiled with -ffp-contract=off, so these are rounded on their own.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }

// ---- the runtime ----

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration };
using cudaStream_t = struct Stream*;
enum cudaDeviceAttr {  // their values, of a device so small that every block of a persistent kernel takes several rows
  cudaDevAttrMultiProcessorCount = 1,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 131072,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 65536,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidValue ? "invalid argument" : "invalid configuration argument";
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int) { return *value = what, cudaSuccess; }

// Dynamic shared memory that a kernel may ask for. Its static memory counts as well; 512 bytes stand for that.
namespace emulator {
constexpr int static_shared = 512;
inline std::map<const void*, int> most_shared;
}  // namespace emulator

inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  if (bytes + emulator::static_shared > cudaDevAttrMaxSharedMemoryPerBlockOptin) return cudaErrorInvalidValue;
  return emulator::most_shared[kernel] = bytes, cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... args) {
  gridDim = config->gridDim, blockDim = config->blockDim;
  if (gridDim.x == 0 || gridDim.x > 0x7fffffff || blockDim.x == 0 || blockDim.x > 1024) {
    return cudaErrorInvalidConfiguration;
  }
  const auto asked = emulator::most_shared.find(reinterpret_cast<const void*>(kernel));
  const int most = asked == emulator::most_shared.end() ? (48 << 10) - emulator::static_shared : asked->second;
  if (int(config->dynamicSmemBytes) > most) return cudaErrorInvalidValue;
  emulator::forget_launch();
  emulator::body = [=] { kernel(args...); };
  for (unsigned block = 0; block < gridDim.x; ++block) {
    blockIdx = dim3(block);
    emulator::forget_block();
    emulator::dynamic_shared.assign(config->dynamicSmemBytes + 128, 0xff);  // NaN: what nobody wrote
    emulator::run_block(int(blockDim.x));
  }
  return cudaSuccess;
}
