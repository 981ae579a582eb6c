// bf16 and fp16 as bits, one value at a time: round to nearest even, NaN stays NaN, subnormals kept.
// Internal linkage: each instruction set compiles its own copy.
#pragma once
#include <cstdint>
#include <cstring>

namespace dpofast {
namespace {

inline uint32_t float_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

inline float bits_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

inline float bf16_to_float(uint16_t b) { return bits_float(uint32_t(b) << 16); }

inline uint16_t float_to_bf16(float f) {
  const uint32_t u = float_bits(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return uint16_t((u >> 16) | 0x40);  // quiet NaN
  return uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}

inline float f16_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, mag = h & 0x7fff;
  if (mag >= 0x7c00) return bits_float(sign | 0x7f800000u | ((mag & 0x3ff) << 13));
  if (mag >= 0x400) return bits_float(sign | ((mag << 13) + (112u << 23)));
  return bits_float(sign | float_bits(float(mag) * 0x1p-24f));
}

inline uint16_t float_to_f16(float f) {
  const uint32_t u = float_bits(f), sign = (u >> 16) & 0x8000, mag = u & 0x7fffffffu;
  if (mag > 0x7f800000u) return uint16_t(sign | 0x7e00 | ((mag >> 13) & 0x3ff));
  if (mag >= 0x477ff000u) return uint16_t(sign | 0x7c00);  // >= 65520 rounds to inf
  if (mag < 0x38800000u)                                   // below 2^-14: adding 0.5 lines the mantissa up at 2^-24
    return uint16_t(sign | (float_bits(bits_float(mag) + 0.5f) - 0x3f000000u));
  return uint16_t(sign | ((mag - (112u << 23) + 0xfffu + ((mag >> 13) & 1)) >> 13));
}

}  // namespace
}  // namespace dpofast
