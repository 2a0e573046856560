// Shared by the CUDA kernels: element types, vectorised memory accesses, reductions, launches.
//
// Kernels are launched with launch(), never with <<<>>>, and inline assembly is confined to the functions of this
// header. So the .cu files also compile with a plain C++ compiler against tests/kernels/emulator, which runs them
// thread by thread without a GPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/types.h"

namespace reca::cuda {

constexpr int warp = 32;
constexpr unsigned all_lanes = 0xffffffff;

// ---- element types ----

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// Calls f with a value of the C++ type of a dtype: float{}, bf16{} or f16{}.
template <typename F>
void with_type(DType type, const F& f) {
  if (type == DType::f32) f(float{});
  if (type == DType::bf16) f(bf16{});
  if (type == DType::f16) f(f16{});
}

// with_type() for device code.
template <typename F>
__device__ __forceinline__ void type_of(DType dtype, const F& f) {
  if (dtype == DType::f32) {
    f(float{});
  } else if (dtype == DType::bf16) {
    f(bf16{});
  } else {
    f(f16{});
  }
}

// Packs two elements, the first in the lower half. Rounds to nearest, ties to even.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t both;
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  }
#else
  const auto bits = std::is_same_v<T, bf16> ? emulator::narrow_bf16 : emulator::narrow_f16;
  both = bits(low) | uint32_t(bits(high)) << 16;
#endif
  return both;
}

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
__device__ __forceinline__ float widen(f16 x) {
#ifdef __CUDACC__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#else
  return emulator::widen_f16(x.bits);
#endif
}

template <typename T>
__device__ __forceinline__ T narrow(float x) {
  return {uint16_t(pack<T>(x, 0.0f))};
}
template <>
__device__ __forceinline__ float narrow<float>(float x) {
  return x;
}

// ---- memory ----

// Loads `count` 32-bit words with the widest accesses that divide them, up to 16 bytes. p is aligned to the access.
template <int count>
__device__ __forceinline__ void load_words(const void* p, uint32_t (&w)[count]) {
  if constexpr (count % 4 == 0) {
#pragma unroll
    for (int i = 0; i < count / 4; ++i) {
      const uint4 q = static_cast<const uint4*>(p)[i];
      w[4 * i] = q.x, w[4 * i + 1] = q.y, w[4 * i + 2] = q.z, w[4 * i + 3] = q.w;
    }
  } else if constexpr (count % 2 == 0) {
#pragma unroll
    for (int i = 0; i < count / 2; ++i) {
      const uint2 q = static_cast<const uint2*>(p)[i];
      w[2 * i] = q.x, w[2 * i + 1] = q.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < count; ++i) w[i] = static_cast<const uint32_t*>(p)[i];
  }
}

// Inline assembly, because nvcc 13 splits a plain uint4 store into four stores if the words come from conversions.
__device__ __forceinline__ void store_vector(uint4* p, uint4 w) {
#ifdef __CUDACC__
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w) : "memory");
#else
  *p = w;
#endif
}
__device__ __forceinline__ void store_vector(uint2* p, uint2 w) {
#ifdef __CUDACC__
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(p), "r"(w.x), "r"(w.y) : "memory");
#else
  *p = w;
#endif
}

// Stores to global memory; otherwise like load_words.
template <int count>
__device__ __forceinline__ void store_words(void* p, const uint32_t (&w)[count]) {
  if constexpr (count % 4 == 0) {
#pragma unroll
    for (int i = 0; i < count / 4; ++i) {
      store_vector(static_cast<uint4*>(p) + i, make_uint4(w[4 * i], w[4 * i + 1], w[4 * i + 2], w[4 * i + 3]));
    }
  } else if constexpr (count % 2 == 0) {
#pragma unroll
    for (int i = 0; i < count / 2; ++i) store_vector(static_cast<uint2*>(p) + i, make_uint2(w[2 * i], w[2 * i + 1]));
  } else {
#pragma unroll
    for (int i = 0; i < count; ++i) static_cast<uint32_t*>(p)[i] = w[i];
  }
}

// Loads n elements as floats. p is aligned to n elements or to 16 bytes, whichever is less.
template <int n, typename T>
__device__ __forceinline__ void load(const T* p, float (&x)[n]) {
  static_assert(n * sizeof(T) % 4 == 0);
  uint32_t w[n * sizeof(T) / 4];
  load_words(p, w);
#pragma unroll
  for (int i = 0; i < n; ++i) {
    if constexpr (sizeof(T) == 4) {
      x[i] = __uint_as_float(w[i]);
    } else {
      x[i] = widen(T{uint16_t(w[i / 2] >> (i % 2 * 16))});
    }
  }
}

template <int n, typename T>
__device__ __forceinline__ void store(T* p, const float (&x)[n]) {
  static_assert(n * sizeof(T) % 4 == 0);
  uint32_t w[n * sizeof(T) / 4];
#pragma unroll
  for (int i = 0; i < int(n * sizeof(T) / 4); ++i) {
    if constexpr (sizeof(T) == 4) {
      w[i] = __float_as_uint(x[i]);
    } else {
      w[i] = pack<T>(x[2 * i], x[2 * i + 1]);
    }
  }
  store_words(p, w);
}

// Loads a value that another thread may be storing to. The caller may use it only where it knows that none does.
template <typename T>
__device__ __forceinline__ T load_racing(const T* p) {
#ifndef __CUDACC__
  const emulator::Outside unchecked;
#endif
  return *p;
}

// Reads one element of a type known at run time.
__device__ __forceinline__ float read(DType type, const void* p, int64_t i) {
  if (type == DType::f32) return static_cast<const float*>(p)[i];
  return type == DType::bf16 ? widen(static_cast<const bf16*>(p)[i]) : widen(static_cast<const f16*>(p)[i]);
}

__device__ __forceinline__ void write(DType type, void* p, int64_t i, float x) {
  if (type == DType::f32) static_cast<float*>(p)[i] = x;
  if (type == DType::bf16) static_cast<bf16*>(p)[i] = narrow<bf16>(x);
  if (type == DType::f16) static_cast<f16*>(p)[i] = narrow<f16>(x);
}

inline bool aligned(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// Copies 16 aligned bytes from global to shared memory. This thread may read them after wait_for_copies(); other
// threads need a barrier in addition.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(unsigned(__cvta_generic_to_shared(shared))),
               "l"(global)
               : "memory");
#else
  emulator::copy_async(shared, global);
#endif
}

__device__ __forceinline__ void wait_for_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_all;" ::: "memory");
#else
  emulator::wait_for_copies();
#endif
}

// The dynamic shared memory of a block, aligned to 16 bytes.
__device__ __forceinline__ void* dynamic_shared() {
#ifdef __CUDACC__
  extern __shared__ uint4 bytes[];
  return bytes;
#else
  return emulator::aligned_shared();
#endif
}

// ---- reductions, in a fixed order ----

// Reduces over the lanes of a warp with op. Every lane gets the result.
template <typename T, typename Op>
__device__ __forceinline__ T warp_reduce(T x, const Op& op) {
#pragma unroll
  for (int lane = warp / 2; lane > 0; lane /= 2) x = op(x, __shfl_xor_sync(all_lanes, x, lane));
  return x;
}

template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
  return warp_reduce(x, [](T a, T b) { return a + b; });
}

// Sums over a block of `threads`. The threads of the first warp get the result. Needs __syncthreads() between calls.
template <int threads, typename T>
__device__ __forceinline__ T block_sum(T x) {
  static_assert(threads % warp == 0 && threads <= warp * warp);
  __shared__ T parts[threads / warp];
  x = warp_sum(x);
  if (threadIdx.x % warp == 0) parts[threadIdx.x / warp] = x;
  __syncthreads();
  return threadIdx.x < warp ? warp_sum(threadIdx.x < threads / warp ? parts[threadIdx.x] : T{}) : x;
}

// ---- launches ----

inline void check(const char* op, cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(op) + ": CUDA error: " + cudaGetErrorString(status));
}

// Makes a device current during its lifetime.
class OnDevice {
 public:
  OnDevice(const char* op, int device) {
    check(op, cudaGetDevice(&before_));
    moved_ = before_ != device;
    if (moved_) check(op, cudaSetDevice(device));
  }
  ~OnDevice() {
    if (moved_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;

 private:
  int before_;
  bool moved_;
};

// Launches kernel(args...) on blocks of `threads`, with `shared` bytes of dynamic shared memory. 0 blocks: no launch.
template <typename... Parameters, typename... Arguments>
void launch(const char* op, Launch on, void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared,
            const Arguments&... args) {
  if (blocks == 0) return;
  if (blocks > 0x7fffffff) throw std::runtime_error(std::string(op) + ": too many elements for one launch");
  const OnDevice guard(op, on.device);
  if (shared > 0) {  // always set: the default limit of 48 KB includes the kernel's static shared memory
    check(op, cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   int(shared)));
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(on.stream);
  check(op, cudaLaunchKernelEx(&config, kernel, Parameters(args)...));
}

}  // namespace reca::cuda
