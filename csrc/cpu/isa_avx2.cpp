// The CPU kernels for AVX2 with FMA.
#if defined(__x86_64__)
#include "cpu/isa_begin.h"

#define DPOFAST_FMA
// 12 accumulators, 2 registers of B and one of A, of 16.
#define DPOFAST_MR 6
#define DPOFAST_NV 2

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
namespace dpofast::cpu {
namespace avx2 {
#include "cpu/simd_scalar.h"
#include "cpu/simd_math.h"
#include "cpu/simd_avx2.h"
using FloatVec = Avx2Vec;
#include "cpu/isa_body.h"
}  // namespace avx2

const Table kAvx2 = avx2::make_table("avx2");
}  // namespace dpofast::cpu
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
