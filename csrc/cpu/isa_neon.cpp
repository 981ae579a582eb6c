// The CPU kernels for NEON, which is part of every aarch64 and needs no target region.
#if defined(__aarch64__)
#include <arm_neon.h>

#include "cpu/isa_begin.h"

#define DPOFAST_FMA
// 20 accumulators, more than the 16 FMAs that the widest cores have under way (four a cycle, four cycles each), 4 registers
// of B and 5 of A. With 6 x 4 these are 34: GCC loads a whole column of A ahead and spills accumulators within the loop.
#define DPOFAST_MR 5
#define DPOFAST_NV 4

namespace dpofast::cpu {
namespace neon {
#include "cpu/simd_scalar.h"
#include "cpu/simd_math.h"
#include "cpu/simd_neon.h"
using FloatVec = NeonVec;
#include "cpu/isa_body.h"
}  // namespace neon

const Table kNeon = neon::make_table("neon");
}  // namespace dpofast::cpu
#endif
