// Included by isa_*.cpp only, within an instruction set's target region and namespace.
#if !defined(DPOFAST_ISA_REGION)
#error "included by isa_*.cpp, after isa_begin.h"
#endif

// AVX2 vectors of 8 floats.
#pragma once

struct Avx2Vec {
  using scalar = float;
  using reg = __m256;
  static constexpr int W = 8;

  static reg set1(float a) { return _mm256_set1_ps(a); }
  static reg load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, reg a) { _mm256_storeu_ps(p, a); }
  static reg add(reg a, reg b) { return _mm256_add_ps(a, b); }
  static reg sub(reg a, reg b) { return _mm256_sub_ps(a, b); }
  static reg mul(reg a, reg b) { return _mm256_mul_ps(a, b); }
  static reg fma(reg a, reg b, reg c) { return _mm256_fmadd_ps(a, b, c); }
  static reg max(reg a, reg b) { return _mm256_max_ps(a, b); }  // b if either is NaN
  // b where it is greater than a by more than slack, else a
  static reg raise(reg a, reg b, float slack) {
    return _mm256_blendv_ps(a, b, _mm256_cmp_ps(b, add(a, set1(slack)), _CMP_GT_OQ));
  }
  static reg finite_max(reg a) { return _mm256_andnot_ps(_mm256_cmp_ps(a, set1(-INFINITY), _CMP_EQ_OQ), a); }
  static bool any_different(reg a, reg b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NEQ_UQ)) != 0; }
  // bit i: whether lane i of a is greater than that of b
  static unsigned greater(reg a, reg b) { return unsigned(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ))); }
  static float reduce_add(reg a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  static float reduce_max(reg a) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
  }

  // e^a for a <= 88, within 1 ulp; 0 below the normal range; NaN stays NaN.
  static reg exp(reg a) {
    const reg tiny = _mm256_cmp_ps(a, set1(-87.33f), _CMP_LT_OQ);
    a = _mm256_max_ps(set1(-87.33f), a);
    const reg n = _mm256_round_ps(mul(a, set1(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    reg r = _mm256_fnmadd_ps(n, set1(0.693359375f), a);
    r = _mm256_fnmadd_ps(n, set1(-2.12194440e-4f), r);
    const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_andnot_ps(tiny, mul(exp_polynomial<Avx2Vec>(r), _mm256_castsi256_ps(exponent)));
  }
  static reg tanh(reg a) {
    const reg sign = _mm256_and_ps(a, set1(-0.f)), mag = _mm256_andnot_ps(set1(-0.f), a);
    const reg t = exp(mul(mag, set1(-2.f)));
    const reg big = _mm256_or_ps(_mm256_div_ps(sub(set1(1.f), t), add(set1(1.f), t)), sign);
    return _mm256_blendv_ps(big, tanh_polynomial<Avx2Vec>(a), _mm256_cmp_ps(mag, set1(0.625f), _CMP_LT_OQ));
  }

  // out[8][8] = in[8][8] transposed
  static void transpose(const float* in, int64_t ld_in, float* out, int64_t ld_out) {
    reg r[8], q[8];
    DPOFAST_UNROLL
    for (int i = 0; i < 8; ++i) r[i] = load(in + i * ld_in);
    DPOFAST_UNROLL
    for (int i = 0; i < 8; i += 2) {
      q[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      q[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    DPOFAST_UNROLL
    for (int i = 0; i < 8; i += 4) {
      r[i] = _mm256_shuffle_ps(q[i], q[i + 2], 0x44);
      r[i + 1] = _mm256_shuffle_ps(q[i], q[i + 2], 0xee);
      r[i + 2] = _mm256_shuffle_ps(q[i + 1], q[i + 3], 0x44);
      r[i + 3] = _mm256_shuffle_ps(q[i + 1], q[i + 3], 0xee);
    }
    DPOFAST_UNROLL
    for (int i = 0; i < 4; ++i) {
      store(out + i * ld_out, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
      store(out + (i + 4) * ld_out, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
    }
  }

  static reg load_bf16(const uint16_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
  }
  static reg load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
  static void store_f16(uint16_t* p, reg a) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT)); }
  static void store_bf16(uint16_t* p, reg a) {
    const __m256i u = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    const __m256i r = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08);
    _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
  }
};
