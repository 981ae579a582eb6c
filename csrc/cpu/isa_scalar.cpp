// The CPU kernels for every machine: plain C++, which a compiler turns into SSE2 or NEON.
#include "cpu/isa_begin.h"

namespace dpofast::cpu {
namespace scalar {
#include "cpu/simd_scalar.h"
using FloatVec = ScalarVec<float, 4>;
// 8 accumulators, 2 registers of B and one of A, of the 16 that SSE2 and NEON have at least.
#define DPOFAST_MR 4
#define DPOFAST_NV 2
#include "cpu/isa_body.h"
}  // namespace scalar

const Table kScalar = scalar::make_table("scalar");
}  // namespace dpofast::cpu
