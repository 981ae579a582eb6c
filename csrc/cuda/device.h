// What every CUDA kernel here shares: element types, 16-byte loads, reductions. No torch.
//
// The kernels also compile as plain C++ for the emulator (tests/emu), which defines DPOFAST_EMULATE and the words of
// CUDA that are used: then arithmetic on 16-bit types is core/float16.h's, and shared memory is the emulator's.
#pragma once
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "core/float16.h"
#include "core/types.h"

#if defined(DPOFAST_EMULATE)
#include "cuda_emu.h"
// An array of the block's own: real __shared__ on a GPU, a poisoned arena in the emulator.
#define DPOFAST_SHARED(type, name, count) type* const name = emu::shared<type>(count, __LINE__)
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define DPOFAST_SHARED(type, name, count) __shared__ type name[count]
#endif

namespace dpofast::cuda {

// Per block, in every kernel over rows. With 64 registers a thread that is a quarter of an SM's; other numbers were not tuned.
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAll = 0xffffffffu;

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
struct Acc {
  using type = float;
};
template <>
struct Acc<double> {
  using type = double;
};
template <class T>
using acc_t = typename Acc<T>::type;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
#if defined(DPOFAST_EMULATE)
inline float widen(bf16 x) { return bf16_to_float(x.bits); }
inline float widen(f16 x) { return f16_to_float(x.bits); }
inline void narrow(float x, bf16& to) { to.bits = float_to_bf16(x); }
inline void narrow(float x, f16& to) { to.bits = float_to_f16(x); }
#else
__device__ __forceinline__ float widen(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
__device__ __forceinline__ float widen(f16 x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ __forceinline__ void narrow(float x, bf16& to) { to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
__device__ __forceinline__ void narrow(float x, f16& to) { to.bits = __half_as_ushort(__float2half_rn(x)); }
#endif
__device__ __forceinline__ void narrow(float x, float& to) { to = x; }
__device__ __forceinline__ void narrow(double x, double& to) { to = x; }
__device__ __forceinline__ void narrow(float x, double& to) { to = x; }
template <class G>
__device__ __forceinline__ void narrow(double x, G& to) {
  narrow(float(x), to);
}

// Blocks that the registers of one SM must have room for: 64 registers a thread for a float accumulator, which hold two
// vectors on their way, and 128 for double's. The loads of four blocks are more than the memory can have in flight.
template <class T>
constexpr int kBlocksPerSm = sizeof(acc_t<T>) == 8 ? 2 : 4;

// The two narrowed values in one word, the first one in its low half.
template <class G>
__device__ __forceinline__ uint32_t narrow_pair(float a, float b) {
#if !defined(DPOFAST_EMULATE)
  if constexpr (std::is_same<G, bf16>::value) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __half2 pair = __floats2half2_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
#else
  G low, high;
  narrow(a, low), narrow(b, high);
  return uint32_t(low.bits) | uint32_t(high.bits) << 16;
#endif
}

__device__ __forceinline__ void store_16_bytes(const uint32_t* words, uint32_t* to) {
#if defined(DPOFAST_EMULATE)
  memcpy(to, words, 16);
#else
  *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
#endif
}

// exp in two instructions. x log2 e is rounded, which adds |x| 6e-8 to the relative error of 2e-7: an entry that is
// exp(-80) of the largest is known to 5e-6 of itself. Results below 1e-38 are 0.
__device__ __forceinline__ float quick_exp(float x) {
#if defined(DPOFAST_EMULATE)
  return std::exp2(x * 1.44269504f);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504f));
  return y;
#endif
}
__device__ __forceinline__ double quick_exp(double x) { return exp(x); }
// scale x - shift, rounded once.
__device__ __forceinline__ float scaled_minus(float x, float scale, float shift) { return fmaf(x, scale, -shift); }
__device__ __forceinline__ double scaled_minus(double x, double scale, double shift) { return fma(x, scale, -shift); }

// These are for the numbers of a row: accurate for every x.
__device__ __forceinline__ float exp_of(float x) { return expf(x); }
__device__ __forceinline__ double exp_of(double x) { return exp(x); }
__device__ __forceinline__ float tanh_of(float x) { return tanhf(x); }
__device__ __forceinline__ double tanh_of(double x) { return tanh(x); }
__device__ __forceinline__ float expm1_of(float x) { return expm1f(x); }
__device__ __forceinline__ double expm1_of(double x) { return expm1(x); }

// z = softcap * tanh(logit_scale * x / softcap) / temperature, each part optional, and its slope dz/dx.
template <class A>
struct Transform {
  A scale;    // logit_scale / temperature
  A inner;    // logit_scale / softcap
  A cap;      // softcap / temperature; 0: no softcap
  A inv_cap;  // temperature / softcap; 0: no softcap

  __device__ __forceinline__ A operator()(A x) const { return cap != 0 ? cap * tanh_of(inner * x) : scale * x; }
  __device__ __forceinline__ A slope_over_scale(A z) const {
    const A t = cap != 0 ? z * inv_cap : A(0);
    return 1 - t * t;
  }
  __device__ __forceinline__ A slope(A z) const { return scale * slope_over_scale(z); }
};

template <class A>
inline Transform<A> make_transform(double temperature, double logit_scale, double softcap) {
  if (softcap == 0) return {A(logit_scale / temperature), 0, 0, 0};
  return {A(logit_scale / temperature), A(logit_scale / softcap), A(softcap / temperature), A(temperature / softcap)};
}

template <class T>
struct alignas(16) Load16 {
  T x[16 / sizeof(T)];
};

template <class T>
__device__ __forceinline__ Load16<T> load_16_bytes(const T* from) {
#if defined(DPOFAST_EMULATE)
  Load16<T> load;
  memcpy(&load, from, sizeof load);
  return load;
#else
  return *reinterpret_cast<const Load16<T>*>(from);
#endif
}

template <class A>
__device__ __forceinline__ A biased(A x, const A* bias, int v) {
  return bias ? x + bias[v] : x;
}

// Elements [begin, end) of one row, N at a time for each thread, then a tail one by one. `visit(v, count, x)` gets
// x[0 .. count), elements v, v + 1, ... kAhead vectors are on their way at once. Which thread gets which elements does not
// depend on the row's address, so that a row has the same bits wherever it lies; one that does not start at a multiple
// of 16 bytes is only read one by one.
template <int N, int kAhead = 2, class T, class F>
__device__ __forceinline__ void for_vectors(const T* row, int begin, int end, const F& visit) {
  constexpr int kPerLoad = 16 / int(sizeof(T));
  static_assert(N % kPerLoad == 0, "whole loads of 16 bytes");
  struct Vec {
    Load16<T> loads[N / kPerLoad];
  };
  constexpr int kStep = kThreads * N;  // elements that the block visits at a time
  const int whole = begin + (end - begin) / N * N;
  const bool aligned = reinterpret_cast<uintptr_t>(row + begin) % 16 == 0;
  auto load = [&](int v, Vec& some) {
    if (aligned) {
#pragma unroll
      for (int j = 0; j < N / kPerLoad; ++j) some.loads[j] = load_16_bytes(row + v + j * kPerLoad);
    } else {
#pragma unroll
      for (int j = 0; j < N; ++j) some.loads[j / kPerLoad].x[j % kPerLoad] = row[v + j];
    }
  };
  auto give = [&](int v, const Vec& some) {
    T x[N];
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] = some.loads[j / kPerLoad].x[j % kPerLoad];
    visit(v, std::integral_constant<int, N>(), x);
  };
  int v = begin + int(int64_t(threadIdx.x) * N);
  for (; v < whole - (kAhead - 1) * kStep; v += kAhead * kStep) {
    Vec some[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) load(v + j * kStep, some[j]);
#pragma unroll
    for (int j = 0; j < kAhead; ++j) give(v + j * kStep, some[j]);
  }
  for (; v < whole; v += kStep) {
    Vec some;
    load(v, some);
    give(v, some);
  }
  for (int tail = whole + int(threadIdx.x); tail < end; tail += kThreads)
    visit(tail, std::integral_constant<int, 1>(), row + tail);
}

// Stores N values, 16 bytes at a time where they are that many and `to` is aligned. (A struct of small elements is
// taken apart by the compiler, element by element: hence the words.)
template <int N, class A, class G>
__device__ __forceinline__ void store_vector(const A (&x)[N], G* to) {
  constexpr int kWords = N * int(sizeof(G)) / 4;
  if constexpr (N > 1 && kWords * 4 == N * int(sizeof(G))) {
    if (reinterpret_cast<uintptr_t>(to) % 16 == 0) {
      uint32_t words[kWords];
      if constexpr (sizeof(G) == 2) {
#pragma unroll
        for (int i = 0; i < kWords; ++i) words[i] = narrow_pair<G>(x[2 * i], x[2 * i + 1]);
      } else {
        G narrowed[N];
#pragma unroll
        for (int i = 0; i < N; ++i) narrow(x[i], narrowed[i]);
        memcpy(words, narrowed, sizeof words);
      }
      if constexpr (kWords % 4 == 0) {
#pragma unroll
        for (int i = 0; i < kWords; i += 4) store_16_bytes(words + i, reinterpret_cast<uint32_t*>(to) + i);
        return;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) narrow(x[i], to[i]);
}

}  // namespace dpofast::cuda
