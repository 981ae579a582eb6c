// The instruction set that every machine has.
#include "cpu/isa_begin.h"

namespace dpofast::cpu {
namespace scalar {
#include "cpu/simd_scalar.h"
using FloatVec = ScalarVec<float, 4>;
#define DPOFAST_MR 4
#define DPOFAST_NV 2
#include "cpu/isa_body.h"
}  // namespace scalar

const Table kScalar = scalar::make_table("scalar");
}  // namespace dpofast::cpu
