// Included by isa_body.h only, within an instruction set's target region and namespace.
#if !defined(DPOFAST_ISA_REGION)
#error "included by isa_body.h, after isa_begin.h"
#endif

// What the kernels are templates of, a "kind" of product: its element types, its vectors, and how both are stored.
//
// A kind K has these members:
//
//   Vec                    the vectors of the accumulator (simd_*.h), and `reg`, one of them
//   acc, elem, cached      types: of sums and logits; of a product's operands; of exponentials in the cache
//   kElemType              elem as a DType: inputs of that type need no conversion
//   unit                   how many consecutive k an operand holds side by side: 1, or 2 where an instruction adds up pairs
//   MR, NV                 the micro-kernel's tile: MR rows of A, NV vectors of C
//   kDepth                 terms of a sum that are added up before they join the others (gemm.h)
//   tile(r, j, ...)        the micro-kernel of r <= MR rows and j <= NV vectors
//   multiply_add           what one of its instructions does, for a measurement of the peak
//   from_acc, to_acc       one number, rounded to elem and back
//   at(b, ldb, r, t)       row r, token t of a B operand
//   load, store            a vector of a row of elem, as A operands have it
//   store_pair             two rows of a B operand that stand side by side, from vectors
//   store_cached, load_cached   two rows of the cache, in whatever order the two agree on
//   kTransposed, transpose_tile   out[16][kTransposed] = in[kTransposed][16] transposed
#pragma once

// gemm_tile for every number of rows and vectors that a remainder can have.
template <class F, int MR, int NV>
struct TileTable {
  typename F::Pointer at[MR][NV];
  constexpr TileTable() : at() { fill<MR, NV>(); }

 private:
  template <int R, int J>
  constexpr void fill() {
    at[R - 1][J - 1] = F::template get<R, J>();
    if constexpr (J > 1) fill<R, J - 1>();
    else if constexpr (R > 1) fill<R - 1, NV>();
  }
};

// The product's element is the accumulator's type: fp32 and fp64, and 16-bit inputs widened to fp32. Where both inputs are
// bf16 the exponentials are cached in bf16 (`Cached`), as on CPUs that multiply it: a budget holds the same everywhere.
template <class V, DType D, int Mr, int Nv, class Cached = typename V::scalar>
struct WideKind {
  using Vec = V;
  using acc = typename V::scalar;
  using elem = acc;
  using cached = Cached;
  using reg = typename V::reg;
  static constexpr int unit = 1, MR = Mr, NV = Nv;
  // Terms added up at a time. Of a panel of 16 columns, 256 of them and as much of MR rows of A share a 32 KiB L1 cache (at
  // 384 the micro-kernel is a fifth slower); wider panels live in the L2 cache.
  static constexpr int64_t kDepth = Nv * V::W <= 16 ? 256 : 384;
  static constexpr DType kElemType = D;

  static reg multiply_add(reg a, reg b, reg sum) { return V::fma(sum, a, b); }
  static elem from_acc(acc x) { return x; }
  static acc to_acc(elem x) { return x; }
  static elem& at(elem* b, int64_t ldb, int64_t r, int64_t t) { return b[r * ldb + t]; }
  static void store(elem* p, reg x) { V::store(p, x); }
  static reg load(const elem* p) { return V::load(p); }
  static void store_pair(elem* b, int64_t ldb, int64_t t, reg x, reg y) {
    V::store(b + t, x);
    V::store(b + ldb + t, y);
  }
  static void store_cached(cached* e, int64_t ld, int64_t t, reg x, reg y) {
    if constexpr (std::is_same_v<cached, acc>) {
      store_pair(e, ld, t, x, y);
    } else {
      V::store_bf16(e + t, x);
      V::store_bf16(e + ld + t, y);
    }
  }
  static void load_cached(const cached* e, int64_t ld, int64_t t, reg& x, reg& y) {
    if constexpr (std::is_same_v<cached, acc>) {
      x = V::load(e + t);
      y = V::load(e + ld + t);
    } else {
      x = V::load_bf16(e + t);
      y = V::load_bf16(e + ld + t);
    }
  }

  static constexpr int64_t kTransposed = 16;
  static void transpose_tile(const elem* in, int64_t ld_in, elem* out, int64_t ld_out) {
    if constexpr (V::W == 8) {
      for (int64_t c = 0; c < 16; c += 8)
        for (int64_t r = 0; r < 16; r += 8) V::transpose(in + r * ld_in + c, ld_in, out + c * ld_out + r, ld_out);
    } else if constexpr (V::W == 16) {
      reg r[16];
      DPOFAST_UNROLL
      for (int i = 0; i < 16; ++i) r[i] = V::load(in + i * ld_in);
      V::transpose(r);
      DPOFAST_UNROLL
      for (int i = 0; i < 16; ++i) V::store(out + i * ld_out, r[i]);
    } else {
      for (int c = 0; c < 16; ++c)
        for (int r = 0; r < 16; ++r) out[c * ld_out + r] = in[r * ld_in + c];
    }
  }

  struct Tiles {
    using Pointer = void (*)(const elem*, int64_t, const elem*, int64_t, int64_t, acc*, int64_t, bool);
    template <int R, int J>
    static constexpr Pointer get() {
      return &gemm_tile<V, R, J>;
    }
  };
  static void tile(int r, int j, const elem* a, int64_t lda, const elem* b, int64_t ldb, int64_t k, acc* c, int64_t ldc,
                   bool accumulate) {
    static constexpr TileTable<Tiles, MR, NV> table;
    table.at[r - 1][j - 1](a, lda, b, ldb, k, c, ldc, accumulate);
  }
};

#if defined(DPOFAST_AVX512_BF16)
// Both inputs bf16, accumulated in fp32 by the dot-product instruction; g and the cache are bf16, too.
struct Bf16Kind {
  using Vec = FloatVec;
  using acc = float;
  using elem = uint16_t;
  using cached = elem;
  using reg = __m512;
  static constexpr int unit = 2, MR = DPOFAST_MR, NV = DPOFAST_NV;
  static constexpr int64_t kDepth = 512;  // the bytes of 256 terms in fp32; 512 was not compared with other depths
  static constexpr DType kElemType = DType::bf16;

  // The two halves of x, element by element in turn.
  static __m512i interleave(__m512i x) {
    alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), x);
  }

  // Pairs of rows are interleaved, then transposed as 32-bit lanes.
  static constexpr int64_t kTransposed = 32;
  static void transpose_tile(const elem* in, int64_t ld_in, elem* out, int64_t ld_out) {
    reg r[16];
    DPOFAST_UNROLL
    for (int i = 0; i < 16; ++i) {
      const __m256i even = _mm256_loadu_si256((const __m256i*)(in + 2 * i * ld_in));
      const __m256i odd = _mm256_loadu_si256((const __m256i*)(in + (2 * i + 1) * ld_in));
      r[i] = _mm512_castsi512_ps(interleave(_mm512_inserti64x4(_mm512_castsi256_si512(even), odd, 1)));
    }
    Vec::transpose(r);
    DPOFAST_UNROLL
    for (int i = 0; i < 16; ++i) _mm512_storeu_ps(out + i * ld_out, r[i]);
  }

  static reg multiply_add(reg a, reg b, reg sum) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
  static elem from_acc(acc x) { return float_to_bf16(x); }
  static acc to_acc(elem x) { return bf16_to_float(x); }
  static elem& at(elem* b, int64_t ldb, int64_t r, int64_t t) { return b[(r - r % 2) * ldb + t * 2 + r % 2]; }
  static void store(elem* p, reg x) { Vec::store_bf16(p, x); }
  static reg load(const elem* p) { return Vec::load_bf16(p); }
  static void store_pair(elem* b, int64_t, int64_t t, reg x, reg y) {
    _mm512_storeu_si512(b + 2 * t, interleave((__m512i)_mm512_cvtne2ps_pbh(y, x)));
  }
  static void store_cached(cached* e, int64_t ld, int64_t t, reg x, reg y) { store_pair(e, ld, t, x, y); }
  static void load_cached(const cached* e, int64_t, int64_t t, reg& x, reg& y) {
    const __m512i both = _mm512_loadu_si512(e + 2 * t);
    x = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    y = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000))));
  }

  struct Tiles {
    using Pointer = void (*)(const elem*, int64_t, const uint32_t*, int64_t, int64_t, acc*, int64_t, bool);
    template <int R, int J>
    static constexpr Pointer get() {
      return &gemm_tile_bf16<R, J>;
    }
  };
  static void tile(int r, int j, const elem* a, int64_t lda, const elem* b, int64_t ldb, int64_t k, acc* c, int64_t ldc,
                   bool accumulate) {
    static constexpr TileTable<Tiles, MR, NV> table;
    table.at[r - 1][j - 1](a, lda, reinterpret_cast<const uint32_t*>(b), ldb, k, c, ldc, accumulate);
  }
};
#endif
