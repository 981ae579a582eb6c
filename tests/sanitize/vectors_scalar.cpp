#include <cstdio>

#include "cpu/isa_begin.h"

namespace dpofast::cpu {
namespace scalar_vectors {
#include "cpu/simd_scalar.h"
using FloatVec = ScalarVec<float, 4>;
#include "vectors.h"
}  // namespace scalar_vectors

int check_scalar_vectors() { return scalar_vectors::vector_failures("scalar"); }
}  // namespace dpofast::cpu
