// The CPU kernels for AVX-512, without its dot products of bf16.
#if defined(__x86_64__)
#include "cpu/isa_begin.h"

#define DPOFAST_FMA
// 24 accumulators, 4 registers of B and one of A, of 32.
#define DPOFAST_MR 6
#define DPOFAST_NV 4

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#endif
namespace dpofast::cpu {
namespace avx512 {
#include "cpu/simd_scalar.h"
#include "cpu/simd_math.h"
#include "cpu/simd_avx512.h"
using FloatVec = Avx512Vec;
#include "cpu/isa_body.h"
}  // namespace avx512

const Table kAvx512 = avx512::make_table("avx512");
}  // namespace dpofast::cpu
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
