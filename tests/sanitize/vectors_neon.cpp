#if defined(__aarch64__)
#include <cstdio>
#include <arm_neon.h>

#include "cpu/isa_begin.h"

namespace dpofast::cpu {
namespace neon_vectors {
#include "cpu/simd_scalar.h"
#include "cpu/simd_math.h"
#include "cpu/simd_neon.h"
using FloatVec = NeonVec;
#include "vectors.h"
}  // namespace neon_vectors

int check_neon_vectors() { return neon_vectors::vector_failures("neon"); }
}  // namespace dpofast::cpu
#endif
