// The one generic source: compiled once per instruction set, inside a target region and a namespace of
// its own, by the isa_*.cpp files. They define FloatVec (fp32 vectors), FloatVec's tile size DPOFAST_MR x
// DPOFAST_NV, and DPOFAST_TABLE, the name of the table to fill in.

#include "cpu/gemm.h"
#include "cpu/pack.h"

using DoubleVec = ScalarVec<double, 4>;

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
// bf16 the exponentials are kept in bf16 (`Cached`), as on CPUs that multiply it: a budget holds the same everywhere.
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

  // out[16][kTransposed] = in[kTransposed][16] transposed
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
// Both inputs bf16, accumulated in fp32 by the dot-product instruction; g and exp(z - m) are kept in bf16.
struct Bf16Kind {
  using Vec = FloatVec;
  using acc = float;
  using elem = uint16_t;
  using cached = elem;
  using reg = __m512;
  static constexpr int unit = 2, MR = DPOFAST_MR, NV = DPOFAST_NV;
  static constexpr int64_t kDepth = 512;
  static constexpr DType kElemType = DType::bf16;

  // The two halves of x, element by element in turn.
  static __m512i interleave(__m512i x) {
    alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), x);
  }

  // As WideKind's: pairs of rows are interleaved, then transposed as 32-bit lanes.
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

#include "cpu/transform.h"

#include "cpu/head_layout.h"
#include "cpu/head_fold.h"
#include "cpu/head_forward.h"
#include "cpu/head_grad.h"
#include "cpu/head_backward.h"
#include "cpu/rows.h"

using F32 = WideKind<FloatVec, DType::f32, DPOFAST_MR, DPOFAST_NV>;
using F32CachedBf16 = WideKind<FloatVec, DType::f32, DPOFAST_MR, DPOFAST_NV, uint16_t>;
using F64 = WideKind<DoubleVec, DType::f64, 2, 2>;

// Calls f(Kind{}) with the kind of product that these inputs get: the promotion of the two types, except
// that 16-bit inputs are multiplied in fp32 where no instruction does better.
template <class F>
static auto with_kind(DType hidden, DType weight, const F& f) {
  if (hidden == DType::f64 || weight == DType::f64) return f(F64{});
#if defined(DPOFAST_AVX512_BF16)
  if (hidden == DType::bf16 && weight == DType::bf16) return f(Bf16Kind{});
#else
  if (hidden == DType::bf16 && weight == DType::bf16) return f(F32CachedBf16{});
#endif
  return f(F32{});
}

static int64_t table_forward(const ForwardArgs& a) {
  return with_kind(a.head.hidden_dtype, a.head.weight_dtype, [&](auto kind) { return forward<decltype(kind)>(a); });
}
static int64_t table_backward(const BackwardArgs& a) {
  return with_kind(a.head.hidden_dtype, a.head.weight_dtype, [&](auto kind) { return backward<decltype(kind)>(a); });
}
static Traits table_traits(DType hidden, DType weight) {
  return with_kind(hidden, weight, [](auto kind) {
    using K = decltype(kind);
    return Traits{K::Vec::W,
                  Shape<K>::P,
                  K::unit,
                  int64_t(sizeof(typename K::elem)),
                  int64_t(sizeof(typename K::acc)),
                  int64_t(sizeof(typename K::cached))};
  });
}

template <class F>
static void with_rows(DType d, const F& f) {
  switch (d) {
    case DType::f32: return f(Rows<FloatVec, DType::f32>{});
    case DType::f64: return f(Rows<DoubleVec, DType::f64>{});
    case DType::bf16: return f(Rows<FloatVec, DType::bf16>{});
    case DType::f16: return f(Rows<FloatVec, DType::f16>{});
  }
}
static void table_rows_forward(const RowsArgs& a) {
  with_rows(a.dtype, [&](auto rows) { decltype(rows)::forward(a); });
}
static void table_rows_backward(const RowsArgs& a) {
  with_rows(a.dtype, [&](auto rows) { decltype(rows)::backward(a); });
}

// A loop of independent multiply-adds that keeps every unit busy: 12 of them in flight, which is what two units with a
// latency of four or five cycles need. Returns something that depends on all, so that none is left out.
template <class K>
DPOFAST_NOINLINE static typename K::acc multiply_adds(int64_t n, typename K::acc x) {
  using V = typename K::Vec;
  typename V::reg sums[12];
  DPOFAST_UNROLL
  for (int i = 0; i < 12; ++i) sums[i] = V::set1(typename K::acc(i));
  const typename V::reg a = V::set1(x), b = V::set1(1 - x);
  for (int64_t k = 0; k < n; ++k) {
    DPOFAST_UNROLL
    for (int i = 0; i < 12; ++i) sums[i] = K::multiply_add(a, b, sums[i]);
  }
  typename V::reg all = sums[0];
  for (int i = 1; i < 12; ++i) all = V::add(all, sums[i]);
  return V::reduce_add(all);
}

// Both figures of `Peak`, measured in turns, so that a core that changes its clock does so for both; the best of each. About
// 30 ms. What a plan is priced with.
template <class K>
static Peak peak_of(char* work) {
  using elem = typename K::elem;
  using acc = typename K::acc;
  constexpr int64_t depth = 256, p = K::NV * K::Vec::W, rows = 16 * K::MR;
  elem* a = reinterpret_cast<elem*>(work);
  elem* b = a + rows * depth;
  acc* c = reinterpret_cast<acc*>(b + p * depth);
  static_assert((rows * depth + p * depth) * int64_t(sizeof(elem)) + rows * p * int64_t(sizeof(acc)) <= kPeakBytes);
  auto rate = [](double flops, const auto& f) {
    const auto start = std::chrono::steady_clock::now();
    f();
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    return flops / took.count();
  };
  // About 1 ms of an AVX2 core each.
  constexpr double per_step = 2.0 * 12 * K::Vec::W * K::unit, per_call = 2.0 * rows * p * depth;
  constexpr int64_t steps = int64_t(8e7 / per_step), calls = int64_t(8e7 / per_call) + 1;
  Peak best{};
  for (int repeat = 0; repeat < 15; ++repeat) {
    volatile acc sink = 0;
    const double hardware = rate(per_step * double(steps), [&] { sink = multiply_adds<K>(steps, acc(0.5)); });
    const double kernel = rate(per_call * double(calls), [&] {
      for (int64_t i = 0; i < calls; ++i) gemm_panel<K>(a, depth, rows, b, p, K::NV, depth, c, p, false);
    });
    (void)sink;
    best.hardware = hardware > best.hardware ? hardware : best.hardware;
    best.micro_kernel = kernel > best.micro_kernel ? kernel : best.micro_kernel;
  }
  return best;
}
static Peak table_peak(DType hidden, DType weight, char* work) {
  return with_kind(hidden, weight, [&](auto kind) { return peak_of<decltype(kind)>(work); });
}

static constexpr Table make_table(const char* name) {
  return {name, table_forward, table_backward, table_rows_forward, table_rows_backward, table_traits, table_peak};
}
