// A few threads share a row, each with a few consecutive channels: eight if alignment permits vector accesses, else
// four. The row's loss is summed by warp shuffles. Rows of step 0, one in a thousand, are handled separately, in fp64.
#include <functional>

#include "common/noise.cuh"
#include "first_step.h"
#include "op.h"

namespace reca::cuda {
namespace {

constexpr int threads = 128;
constexpr float bits = 1.44269504f;  // 1 / ln 2

struct Work {
  Diffusion args;
  DType dtype;     // of x_t, or of out and its gradient
  int log_sharers; // log2 of the number of threads that share a row
};

// The row and first channel of a thread. there: false beyond the last row or channel.
struct Place {
  int64_t row;
  int channel;
  bool there;
};

template <int n>
__device__ __forceinline__ Place place_of(const Work& work) {
  const int64_t thread = int64_t(blockIdx.x) * threads + threadIdx.x;
  const int channel = int(thread & ((1 << work.log_sharers) - 1)) * n;
  const int64_t row = thread >> work.log_sharers;
  return {row, channel, row < work.args.count && channel < work.args.channels};
}

// The row of x0, the line of the table, and whether it is that of step 0. For a row or step out of range, all entries
// of the line are NaN.
struct Origin {
  int64_t row;
  const float* line;
  bool first;
};

constexpr float none = __builtin_nanf("");
alignas(16) __device__ const float no_line[diffusion_columns] = {none, none, none, none, none, none, none, none};

__device__ __forceinline__ Origin origin_of(const Work& work, const Place& place) {
  const int64_t row = work.args.rows ? work.args.rows[place.row] : place.row, t = work.args.t[place.row];
  const bool known = uint64_t(row) < uint64_t(work.args.samples) && uint64_t(t) < uint64_t(work.args.steps);
  return {known ? row : 0, known ? work.args.table + t * diffusion_columns : no_line, t == 0};
}

// A line of the table.
struct Step {
  float sqrt_abar, sqrt_1m_abar, sqrt_recip, sqrt_recip_m1, c1, c2, log_posterior, log_beta;
};

template <bool wide>
__device__ __forceinline__ Step step_of(const float* line) {
  float v[8];
  if constexpr (wide) {
    load(line, v);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = line[i];
  }
  return {v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7]};
}

// Computes the noise of n channels, a multiple of four.
template <int n, bool wide>
__device__ __forceinline__ void noise_of(const Work& work, const Place& place, float (&eps)[n]) {
  if (const float* const noise = work.args.explicit_noise) {
    const float* const from = noise + place.row * work.args.channels + place.channel;
    if constexpr (wide) {
      load(from, eps);
    } else {
#pragma unroll
      for (int k = 0; k < n; ++k) eps[k] = place.channel + k < work.args.channels ? from[k] : 0.0f;
    }
  } else {
    const Stream stream = stream_of(work.args.noise, place.row);
#pragma unroll
    for (int b = 0; b < n / 4; ++b) normals(stream, uint64_t(place.channel / 4 + b), eps + 4 * b);
  }
}

// Reads n elements from `begin` on, with 0 at and beyond `end`. T void: elements are of type `type` and read one by
// one.
template <typename T, int n>
__device__ __forceinline__ void read_some(DType type, const void* from, int64_t begin, int64_t end, float (&x)[n]) {
  if constexpr (std::is_void_v<T>) {
#pragma unroll
    for (int k = 0; k < n; ++k) x[k] = begin + k < end ? read(type, from, begin + k) : 0.0f;
  } else {
    load(static_cast<const T*>(from) + begin, x);
  }
}

template <typename T, int n>
__device__ __forceinline__ void write_some(DType type, void* to, int64_t begin, int64_t end, const float (&x)[n]) {
  if constexpr (std::is_void_v<T>) {
#pragma unroll
    for (int k = 0; k < n; ++k) {
      if (begin + k < end) write(type, to, begin + k, x[k]);
    }
  } else {
    store(static_cast<T*>(to) + begin, x);
  }
}

template <typename X, int n>
__device__ __forceinline__ void read_x0(const Work& work, const Place& place, int64_t row, float (&x)[n]) {
  const int64_t channels = work.args.channels;
  read_some<X>(work.args.x0_dtype, work.args.x0, row * channels + place.channel, (row + 1) * channels, x);
}

// X, P: types of x0 and x_t, or void for any types and alignment. n: channels per thread.
template <typename X, typename P, int n>
__device__ __forceinline__ void add_noise(const Work& work, void* x_t) {
  constexpr bool wide = !std::is_void_v<X>;
  const Place place = place_of<n>(work);
  if (!place.there) return;
  const Origin origin = origin_of(work, place);
  const Step step = step_of<wide>(origin.line);
  float x[n], eps[n];
  read_x0<X>(work, place, origin.row, x);
  noise_of<n, wide>(work, place, eps);
#pragma unroll
  for (int k = 0; k < n; ++k) x[k] = add(mul(step.sqrt_abar, x[k]), mul(step.sqrt_1m_abar, eps[k]));
  const int64_t first = place.row * work.args.channels;
  write_some<P>(work.dtype, x_t, first + place.channel, first + work.args.channels, x);
}

template <int n>
__device__ __forceinline__ float pick(const float (&x)[n], int k) {
  float picked = x[0];
#pragma unroll
  for (int i = 1; i < n; ++i) picked = i == k ? x[i] : picked;
  return picked;
}

template <typename X, typename P, int n>
__device__ __forceinline__ void loss(const Work& work, const void* out, void* gradient, float* losses) {
  constexpr bool wide = !std::is_void_v<X>;
  const Place place = place_of<n>(work);
  const int64_t channels = work.args.channels;
  float squares = 0, bound = 0;
  if (place.there) {
    const int64_t begin = place.row * 2 * channels + place.channel, half = place.row * 2 * channels + channels;
    const Origin origin = origin_of(work, place);
    float predicted[n], variance[n], x[n], eps[n];
    read_some<P>(work.dtype, out, begin, half, predicted);
    read_some<P>(work.dtype, out, begin + channels, half + channels, variance);
    read_x0<X>(work, place, origin.row, x);
    const Step step = step_of<wide>(origin.line);
    noise_of<n, wide>(work, place, eps);
    const float range = 0.5f * (step.log_beta - step.log_posterior), posterior = expf(step.log_posterior);
    const float share = 1.0f / float(channels);
    float mean[n];
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const float error = predicted[k] - eps[k];
      const float noisy = step.sqrt_abar * x[k] + step.sqrt_1m_abar * eps[k];
      const float guess = step.sqrt_recip * noisy - step.sqrt_recip_m1 * predicted[k];
      const float truth = step.c1 * x[k] + step.c2 * noisy;
      mean[k] = step.c1 * guess + step.c2 * noisy;
      const float log_variance = (variance[k] + 1.0f) * range + step.log_posterior;
      const float distance = truth - mean[k], precision = expf(-log_variance);
      const float shrink = posterior * precision, scaled = distance * distance * precision;
      const float here = 0.5f * (log_variance - step.log_posterior - 1.0f + shrink + scaled);
      if (wide || place.channel + k < channels) {
        squares += error * error;
        if (!origin.first) bound += here;
      }
      predicted[k] = error * (2 * share);
      if (!origin.first) {
        variance[k] = (1.0f - shrink - scaled) * (0.5f * range * share * bits);
      } else {
        variance[k] = log_variance;
      }
    }
    if (origin.first) {
#pragma unroll 1
      for (int k = 0; k < n; ++k) {  // not unrolled, because the code of fp64 functions is long
        float derivative;
        const float here = first_step(pick(x, k), pick(mean, k), pick(variance, k), &derivative);
        if (wide || place.channel + k < channels) bound += here / bits;
#pragma unroll
        for (int i = 0; i < n; ++i) variance[i] = i == k ? derivative * range * share : variance[i];
      }
    }
    if (gradient) {
      write_some<P>(work.dtype, gradient, begin, half, predicted);
      write_some<P>(work.dtype, gradient, begin + channels, half + channels, variance);
    }
    squares = squares * share + bound * (share * bits);
  }
  for (int lane = 1 << work.log_sharers >> 1; lane > 0; lane >>= 1) {
    squares += __shfl_xor_sync(all_lanes, squares, lane);
  }
  if (place.there && place.channel == 0) losses[place.row] = squares;
}

template <typename X, typename P>
__global__ void __launch_bounds__(threads) diffusion_add_noise_kernel(const __grid_constant__ Work work, void* x_t) {
  add_noise<X, P, 8>(work, x_t);
}

__global__ void __launch_bounds__(threads) diffusion_add_noise_any_kernel(const __grid_constant__ Work work, void* x_t) {
  add_noise<void, void, 4>(work, x_t);
}

template <typename X, typename P>
__global__ void __launch_bounds__(threads)
    diffusion_loss_kernel(const __grid_constant__ Work work, const void* out, void* gradient, float* losses) {
  loss<X, P, 8>(work, out, gradient, losses);
}

__global__ void __launch_bounds__(threads)
    diffusion_loss_any_kernel(const __grid_constant__ Work work, const void* out, void* gradient, float* losses) {
  loss<void, void, 4>(work, out, gradient, losses);
}

// ---- launches ----

// Calls launch_it(kernel, work, blocks). The kernel is wide(X{}, P{}), with the types of x0 and of x_t or out, if types
// and alignment permit vector accesses, else `any`.
template <typename Kernel, typename Wide>
void with_kernel(const Diffusion& args, DType dtype, std::initializer_list<const void*> tensors, Kernel any,
                 const Wide& wide, const std::function<void(Kernel, const Work&, int64_t)>& launch_it) {
  Kernel kernel = any;
  int n = 4;
  bool vectors = args.channels % 8 == 0;
  for (const void* tensor : tensors) vectors = vectors && aligned(tensor, 16);
  if (vectors) {
    with_type(args.x0_dtype, [&](auto x) {
      with_type(dtype, [&](auto p) {
        using X = decltype(x);
        using P = decltype(p);
        if constexpr (std::is_same_v<X, float> || std::is_same_v<P, float> || std::is_same_v<X, P>) {
          kernel = wide(x, p), n = 8;
        }
      });
    });
  }
  Work work = {args, dtype, 0};
  while ((int64_t(n) << work.log_sharers) < args.channels) ++work.log_sharers;
  launch_it(kernel, work, ((args.count << work.log_sharers) + threads - 1) / threads);
}

}  // namespace

void diffusion_add_noise(const Diffusion& args, DType dtype, void* x_t, Launch on) {
  using Kernel = void (*)(Work, void*);
  const auto wide = [](auto x, auto p) -> Kernel { return diffusion_add_noise_kernel<decltype(x), decltype(p)>; };
  with_kernel<Kernel>(args, dtype, {args.x0, args.table, args.explicit_noise, x_t}, diffusion_add_noise_any_kernel, wide,
                      [&](Kernel kernel, const Work& work, int64_t blocks) {
                        launch("diffusion_loss", on, kernel, blocks, threads, 0, work, x_t);
                      });
}

void diffusion_loss(const Diffusion& args, DType dtype, const void* out, void* gradient, float* losses, Launch on) {
  using Kernel = void (*)(Work, const void*, void*, float*);
  const auto wide = [](auto x, auto p) -> Kernel { return diffusion_loss_kernel<decltype(x), decltype(p)>; };
  with_kernel<Kernel>(args, dtype, {args.x0, args.table, args.explicit_noise, out, gradient}, diffusion_loss_any_kernel,
                      wide, [&](Kernel kernel, const Work& work, int64_t blocks) {
                        launch("diffusion_loss", on, kernel, blocks, threads, 0, work, out, gradient, losses);
                      });
}

}  // namespace reca::cuda
