// Included by isa_*.cpp only, within an instruction set's target region and namespace.
#if !defined(DPOFAST_ISA_REGION)
#error "included by isa_*.cpp, after isa_begin.h"
#endif

// The one generic source: compiled once per instruction set, inside a target region and a namespace of its own. The file
// that includes it defines FloatVec (fp32 vectors) and the micro-kernel's tile, DPOFAST_MR rows x DPOFAST_NV vectors, and
// gets `make_table`.

#include "cpu/gemm.h"
#include "cpu/pack.h"
#include "cpu/kinds.h"
#include "cpu/transform.h"
#include "cpu/head_layout.h"
#include "cpu/head_fold.h"
#include "cpu/head_filter.h"
#include "cpu/head_forward.h"
#include "cpu/head_grad.h"
#include "cpu/head_sparse.h"
#include "cpu/head_backward.h"
#include "cpu/logits.h"

// fp64 is for tests: its vectors and its tile, small enough for any register file, were not tuned.
using DoubleVec = ScalarVec<double, 4>;
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
  return with_kind(a.problem.hidden_dtype, a.problem.weight_dtype, [&](auto kind) { return forward<decltype(kind)>(a); });
}
static int64_t table_backward(const BackwardArgs& a) {
  return with_kind(a.problem.hidden_dtype, a.problem.weight_dtype, [&](auto kind) { return backward<decltype(kind)>(a); });
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
static void with_logits(DType d, const F& f) {
  switch (d) {
    case DType::f32: return f(Logits<FloatVec, DType::f32>{});
    case DType::f64: return f(Logits<DoubleVec, DType::f64>{});
    case DType::bf16: return f(Logits<FloatVec, DType::bf16>{});
    case DType::f16: return f(Logits<FloatVec, DType::f16>{});
  }
}
static void table_logits_forward(const LogitsArgs& a) {
  with_logits(a.dtype, [&](auto logits) { decltype(logits)::forward(a); });
}
static void table_logits_backward(const LogitsArgs& a) {
  with_logits(a.dtype, [&](auto logits) { decltype(logits)::backward(a); });
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
  // A micro-kernel's ordinary work: the depth that an L1 cache holds, and rows of A that an L2 cache does.
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
  for (int repeat = 0; repeat < 15; ++repeat) {  // times 2 ms: the 30 ms above
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
  return {name, table_forward, table_backward, table_logits_forward, table_logits_backward, table_traits, table_peak};
}
