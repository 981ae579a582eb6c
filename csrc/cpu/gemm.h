// Included by isa_body.h only, within an instruction set's target region and namespace.
#if !defined(DPOFAST_ISA_REGION)
#error "included by isa_body.h, after isa_begin.h"
#endif

// The matrix product under everything: C[rows, P] (+)= A[rows, K] B[K, P], for one panel of B.
//
//   A   row-major, any leading dimension; elements are broadcast
//   B   packed: [K / unit][P][unit], P = vectors * W columns, `unit` consecutive k side by side
//   C   row-major, the accumulator's type
//
// `unit` is 1, or 2 for bf16, whose dot-product instruction takes pairs. K is a multiple of it.
#pragma once

// One tile of R rows and NV vectors: its accumulators fill the register file. Never inlined: inside a
// larger function the compiler spills them, at half the speed.
template <class V, int R, int NV>
DPOFAST_NOINLINE static void gemm_tile(const typename V::scalar* a, int64_t lda, const typename V::scalar* b, int64_t ldb,
                                       int64_t k_units, typename V::scalar* c, int64_t ldc, bool accumulate) {
  typename V::reg acc[R][NV];
  DPOFAST_UNROLL
  for (int r = 0; r < R; ++r) {
    DPOFAST_UNROLL
    for (int j = 0; j < NV; ++j) acc[r][j] = V::set1(0);
  }
  for (int64_t k = 0; k < k_units; ++k) {
    typename V::reg bk[NV];
    DPOFAST_UNROLL
    for (int j = 0; j < NV; ++j) bk[j] = V::load(b + k * ldb + j * V::W);
    DPOFAST_UNROLL
    for (int r = 0; r < R; ++r) {
      const typename V::reg ar = V::set1(a[r * lda + k]);
      DPOFAST_UNROLL
      for (int j = 0; j < NV; ++j) acc[r][j] = V::fma(ar, bk[j], acc[r][j]);
    }
  }
  DPOFAST_UNROLL
  for (int r = 0; r < R; ++r) {
    DPOFAST_UNROLL
    for (int j = 0; j < NV; ++j) {
      typename V::scalar* to = c + r * ldc + j * V::W;
      V::store(to, accumulate ? V::add(V::load(to), acc[r][j]) : acc[r][j]);
    }
  }
}

#if defined(DPOFAST_AVX512_BF16)
// The same for bf16: a and b hold pairs of k, as 32-bit lanes; ldb counts lanes, lda counts bf16.
template <int R, int NV>
DPOFAST_NOINLINE static void gemm_tile_bf16(const uint16_t* a, int64_t lda, const uint32_t* b, int64_t ldb, int64_t k_units,
                                            float* c, int64_t ldc, bool accumulate) {
  __m512 acc[R][NV];
  DPOFAST_UNROLL
  for (int r = 0; r < R; ++r) {
    DPOFAST_UNROLL
    for (int j = 0; j < NV; ++j) acc[r][j] = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < k_units; ++k) {
    __m512bh bk[NV];
    DPOFAST_UNROLL
    for (int j = 0; j < NV; ++j) bk[j] = (__m512bh)_mm512_loadu_si512(b + k * ldb + j * 16);
    DPOFAST_UNROLL
    for (int r = 0; r < R; ++r) {
      uint32_t pair;
      std::memcpy(&pair, a + r * lda + 2 * k, 4);
      const __m512bh ar = (__m512bh)_mm512_set1_epi32(int(pair));
      DPOFAST_UNROLL
      for (int j = 0; j < NV; ++j) acc[r][j] = _mm512_dpbf16_ps(acc[r][j], ar, bk[j]);
    }
  }
  DPOFAST_UNROLL
  for (int r = 0; r < R; ++r) {
    DPOFAST_UNROLL
    for (int j = 0; j < NV; ++j) {
      float* to = c + r * ldc + j * 16;
      _mm512_storeu_ps(to, accumulate ? _mm512_add_ps(_mm512_loadu_ps(to), acc[r][j]) : acc[r][j]);
    }
  }
}
#endif

// Calls f(first, depth) for the pieces of k terms. A sum over k is a sum of sums over at most kDepth terms each, which
// rounds far less than one long sum; its order depends on k alone, so an element's bits depend neither on how rows and
// columns are tiled nor on who computes them.
template <class K, class F>
static void for_depths(int64_t k, const F& f) {
  const int64_t even = round_up(ceil_div(k, ceil_div(k, K::kDepth)), K::unit);  // no short sum at the end
  for (int64_t k0 = 0; k0 < k; k0 += even) f(k0, k - k0 < even ? k - k0 : even);
}

// Terms k0 .. k0 + depth of all rows of A against one panel.
template <class K>
static void gemm_slice(const typename K::elem* a, int64_t lda, int64_t rows, const typename K::elem* b, int64_t ldb, int nv,
                       int64_t k0, int64_t depth, typename K::acc* c, int64_t ldc, bool accumulate) {
  for (int64_t r = 0; r < rows; r += K::MR) {
    const int64_t left = rows - r;
    K::tile(left < K::MR ? int(left) : K::MR, nv, a + r * lda + k0, lda, b + k0 * ldb, ldb, depth / K::unit, c + r * ldc, ldc,
            accumulate || k0 > 0);
  }
}

// All rows of A against one panel.
template <class K>
static void gemm_panel(const typename K::elem* a, int64_t lda, int64_t rows, const typename K::elem* b, int64_t ldb, int nv,
                       int64_t k, typename K::acc* c, int64_t ldc, bool accumulate) {
  for_depths<K>(k, [&](int64_t k0, int64_t depth) { gemm_slice<K>(a, lda, rows, b, ldb, nv, k0, depth, c, ldc, accumulate); });
}
