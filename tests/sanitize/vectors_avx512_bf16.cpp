#if defined(__x86_64__)
#include <cstdio>

#include "cpu/isa_begin.h"

#define DPOFAST_AVX512_BF16

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), \
                             apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#endif
namespace dpofast::cpu {
namespace avx512_bf16_vectors {
#include "cpu/simd_scalar.h"
#include "cpu/simd_math.h"
#include "cpu/simd_avx512.h"
using FloatVec = Avx512Vec;
#include "vectors.h"
}  // namespace avx512_bf16_vectors

int check_avx512_bf16_vectors() { return avx512_bf16_vectors::vector_failures("avx512_bf16"); }
}  // namespace dpofast::cpu
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
