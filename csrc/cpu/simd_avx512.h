// Included by isa_*.cpp only, within an instruction set's target region and namespace.
#if !defined(DPOFAST_ISA_REGION)
#error "included by isa_*.cpp, after isa_begin.h"
#endif

// AVX-512 vectors of 16 floats. DPOFAST_AVX512_BF16 adds the bf16 forms.
#pragma once

struct Avx512Vec {
  using scalar = float;
  using reg = __m512;
  static constexpr int W = 16;

  static reg set1(float a) { return _mm512_set1_ps(a); }
  static reg load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, reg a) { _mm512_storeu_ps(p, a); }
  static reg add(reg a, reg b) { return _mm512_add_ps(a, b); }
  static reg sub(reg a, reg b) { return _mm512_sub_ps(a, b); }
  static reg mul(reg a, reg b) { return _mm512_mul_ps(a, b); }
  static reg fma(reg a, reg b, reg c) { return _mm512_fmadd_ps(a, b, c); }
  static reg max(reg a, reg b) { return _mm512_max_ps(a, b); }  // b if either is NaN
  // b where it is greater than a by more than slack, else a
  static reg raise(reg a, reg b, float slack) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(b, add(a, set1(slack)), _CMP_GT_OQ), a, b);
  }
  static reg finite_max(reg a) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, set1(-INFINITY), _CMP_EQ_OQ), a, _mm512_setzero_ps());
  }
  static bool any_different(reg a, reg b) { return _mm512_cmp_ps_mask(a, b, _CMP_NEQ_UQ) != 0; }
  // bit i: whether lane i of a is greater than that of b
  static unsigned greater(reg a, reg b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
  static float reduce_add(reg a) { return _mm512_reduce_add_ps(a); }
  static float reduce_max(reg a) { return _mm512_reduce_max_ps(a); }

  // e^a for a <= 88, within 1 ulp; 0 below -104, where fp32 has nothing left; NaN stays NaN.
  static reg exp(reg a) {
    a = _mm512_max_ps(set1(-104.f), a);
    const reg n = _mm512_roundscale_ps(_mm512_mul_ps(a, set1(1.44269504f)), 8);
    reg r = _mm512_fnmadd_ps(n, set1(0.693359375f), a);
    r = _mm512_fnmadd_ps(n, set1(-2.12194440e-4f), r);
    return _mm512_scalef_ps(exp_polynomial<Avx512Vec>(r), n);
  }
  static reg tanh(reg a) {
    const reg mag = _mm512_abs_ps(a), t = exp(mul(mag, set1(-2.f)));
    const reg big = _mm512_div_ps(sub(set1(1.f), t), add(set1(1.f), t));
    const reg signed_big = _mm512_or_ps(big, _mm512_and_ps(a, set1(-0.f)));
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(mag, set1(0.625f), _CMP_LT_OQ), signed_big, tanh_polynomial<Avx512Vec>(a));
  }

  // r[i][j] <-> r[j][i], 32 bits each: within 128-bit lanes first, then the lanes.
  static void transpose(reg (&r)[16]) {
    reg t[16];
    DPOFAST_UNROLL
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    DPOFAST_UNROLL
    for (int i = 0; i < 16; i += 4) {  // r[i + j]: column 4 * lane + j of rows i .. i + 3
      r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
      r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
      r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    DPOFAST_UNROLL
    for (int j = 0; j < 4; ++j) {
      const reg a = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88);
      const reg c = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xdd), d = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xdd);
      t[j] = _mm512_shuffle_f32x4(a, b, 0x88);
      t[8 + j] = _mm512_shuffle_f32x4(a, b, 0xdd);
      t[4 + j] = _mm512_shuffle_f32x4(c, d, 0x88);
      t[12 + j] = _mm512_shuffle_f32x4(c, d, 0xdd);
    }
    DPOFAST_UNROLL
    for (int i = 0; i < 16; ++i) r[i] = t[i];
  }

  static reg load_bf16(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
  }
  static reg load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
  static void store_f16(uint16_t* p, reg a) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a, 8)); }
  static void store_bf16(uint16_t* p, reg a) {
#if defined(DPOFAST_AVX512_BF16)
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(a));
#else
    const __m512i u = _mm512_castps_si512(a);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x400000));
    const __m512i r = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), rounded, quiet);
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16)));
#endif
  }
};
