// Included by isa_*.cpp only, within an instruction set's target region and namespace.
#if !defined(DPOFAST_ISA_REGION)
#error "included by isa_*.cpp, after isa_begin.h"
#endif

// NEON vectors of 4 floats. Part of every aarch64, so there is no target region.
#pragma once

struct NeonVec {
  using scalar = float;
  using reg = float32x4_t;
  static constexpr int W = 4;

  static reg set1(float a) { return vdupq_n_f32(a); }
  static reg load(const float* p) { return vld1q_f32(p); }
  static void store(float* p, reg a) { vst1q_f32(p, a); }
  static reg add(reg a, reg b) { return vaddq_f32(a, b); }
  static reg sub(reg a, reg b) { return vsubq_f32(a, b); }
  static reg mul(reg a, reg b) { return vmulq_f32(a, b); }
  static reg fma(reg a, reg b, reg c) { return vfmaq_f32(c, a, b); }
  static reg max(reg a, reg b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }  // b if either is NaN, which FMAX is not
  // b where it is greater than a by more than slack, else a
  static reg raise(reg a, reg b, float slack) { return vbslq_f32(vcgtq_f32(b, add(a, set1(slack))), b, a); }
  static reg finite_max(reg a) { return clear(a, vceqq_f32(a, set1(-INFINITY))); }
  static bool any_different(reg a, reg b) { return vminvq_u32(vceqq_f32(a, b)) == 0; }  // NaN differs from itself
  // bit i: whether lane i of a is greater than that of b
  static unsigned greater(reg a, reg b) {
    static constexpr uint32_t kBits[4] = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(vcgtq_f32(a, b), vld1q_u32(kBits)));
  }
  static float reduce_add(reg a) { return vaddvq_f32(a); }
  static float reduce_max(reg a) {
    a = max(a, vextq_f32(a, a, 2));
    return vgetq_lane_f32(max(a, vextq_f32(a, a, 1)), 0);
  }

  // e^a for a <= 88, within 1 ulp; 0 below the normal range; NaN stays NaN.
  static reg exp(reg a) {
    const reg n = vrndnq_f32(mul(a, set1(1.44269504f)));
    reg r = vfmsq_f32(a, n, set1(0.693359375f));
    r = vfmsq_f32(r, n, set1(-2.12194440e-4f));
    const uint32x4_t exponent = vshlq_n_u32(vaddq_u32(vreinterpretq_u32_s32(vcvtq_s32_f32(n)), vdupq_n_u32(127)), 23);
    const reg e = mul(exp_polynomial<NeonVec>(r), vreinterpretq_f32_u32(exponent));
    return clear(e, vcltq_f32(a, set1(-87.33f)));  // whatever came of such lanes, -inf's NaN too
  }
  static reg tanh(reg a) {
    const reg mag = vabsq_f32(a), t = exp(mul(mag, set1(-2.f)));
    const reg big = vdivq_f32(sub(set1(1.f), t), add(set1(1.f), t));
    const reg signed_big = vbslq_f32(vdupq_n_u32(0x80000000u), a, big);
    return vbslq_f32(vcltq_f32(mag, set1(0.625f)), tanh_polynomial<NeonVec>(a), signed_big);
  }

  static reg load_bf16(const uint16_t* p) { return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(vld1_u16(p)), 16)); }
  static reg load_f16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
  static void store_f16(uint16_t* p, reg a) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(a))); }
  static void store_bf16(uint16_t* p, reg a) {
    const uint32x4_t u = vreinterpretq_u32_f32(a), odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t quiet = vorrq_u32(u, vdupq_n_u32(0x400000));
    vst1_u16(p, vshrn_n_u32(vbslq_u32(vceqq_f32(a, a), rounded, quiet), 16));
  }

 private:
  static reg clear(reg a, uint32x4_t lanes) { return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(a), lanes)); }
};
