// Element types and sizes shared by every backend. No Python, no torch.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define DPOFAST_HD __host__ __device__
#else
#define DPOFAST_HD
#endif

namespace dpofast {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

constexpr size_t size_of(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }

// Running statistics of rows, [kStats, n] in the accumulator's type (dpofast/contract.py has these numbers, too).
enum Stat { kM, kSum, kSumX, kSumSq, kSumZ, kTopBefore, kZLabel, kStats };

// Stands for a log-prob of -inf where its exponential, which is 0 from far above this on, is a factor: 0 * -inf is NaN.
constexpr double kFloorLogp = -1e4;

constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
constexpr int64_t ceil_div(int64_t x, int64_t by) { return (x + by - 1) / by; }

}  // namespace dpofast
