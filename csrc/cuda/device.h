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

constexpr int kThreads = 256;  // per block, in every kernel over rows
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

// Blocks that the registers of one SM must have room for. Left to choose, ptxas spills a few registers to fit one block
// more; 48 registers a thread (64 K / 5 blocks) are enough for a float accumulator, and fp64 needs up to 92.
template <class T>
constexpr int kBlocksPerSm = sizeof(acc_t<T>) == 8 ? 2 : 5;

// exp2f(x log2 e) would lose digits for large |x|; expf is accurate and these kernels wait for memory.
__device__ __forceinline__ float exp_of(float x) { return expf(x); }
__device__ __forceinline__ double exp_of(double x) { return exp(x); }
__device__ __forceinline__ float tanh_of(float x) { return tanhf(x); }
__device__ __forceinline__ double tanh_of(double x) { return tanh(x); }
__device__ __forceinline__ float expm1_of(float x) { return expm1f(x); }
__device__ __forceinline__ double expm1_of(double x) { return expm1(x); }

// z and dz/dx of core/transform: softcap * tanh(logit_scale * x / softcap) / temperature, each part optional.
template <class A>
struct Transform {
  A scale;   // logit_scale / temperature
  A before;  // logit_scale / softcap
  A after;   // softcap / temperature; 0: no softcap

  __device__ __forceinline__ A operator()(A x) const { return after != 0 ? after * tanh_of(before * x) : scale * x; }
  __device__ __forceinline__ A slope(A z) const {
    if (after == 0) return scale;
    const A t = z / after;
    return scale * (1 - t * t);
  }
};

template <class A>
inline Transform<A> make_transform(double temperature, double logit_scale, double softcap) {
  if (softcap == 0) return {A(logit_scale / temperature), 0, 0};
  return {A(logit_scale / temperature), A(logit_scale / softcap), A(softcap / temperature)};
}

// Elements of one row that a thread visits, 16 bytes at a time, then a tail one by one. `visit(v, count, x)` gets
// x[0 .. count), elements v, v + 1, ... Which thread gets which elements does not depend on the row's address, so that
// a row has the same bits wherever it lies; one that does not start at a multiple of 16 bytes is only read in pieces.
template <class T, class F>
__device__ __forceinline__ void for_elements(const T* row, int64_t begin, int64_t end, const F& visit) {
  constexpr int kVec = 16 / int(sizeof(T));
  struct alignas(16) Vec {
    T x[kVec];
  };
  const T* const from = row + begin;
  const int64_t vectors = (end - begin) / kVec;
  const bool aligned = reinterpret_cast<uintptr_t>(from) % sizeof(Vec) == 0;
  for (int64_t i = threadIdx.x; i < vectors; i += kThreads) {
    Vec some;
    if (aligned) {
      some = reinterpret_cast<const Vec*>(from)[i];
    } else {
#pragma unroll
      for (int j = 0; j < kVec; ++j) some.x[j] = from[i * kVec + j];
    }
    visit(begin + i * kVec, std::integral_constant<int, kVec>(), some.x);
  }
  for (int64_t v = begin + vectors * kVec + threadIdx.x; v < end; v += kThreads)
    visit(v, std::integral_constant<int, 1>(), row + v);
}

}  // namespace dpofast::cuda
