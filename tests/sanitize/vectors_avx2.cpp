#if defined(__x86_64__)
#include <cstdio>

#include "cpu/isa_begin.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
namespace dpofast::cpu {
namespace avx2_vectors {
#include "cpu/simd_scalar.h"
#include "cpu/simd_math.h"
#include "cpu/simd_avx2.h"
using FloatVec = Avx2Vec;
#include "vectors.h"
}  // namespace avx2_vectors

int check_avx2_vectors() { return avx2_vectors::vector_failures("avx2"); }
}  // namespace dpofast::cpu
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
