// Included by isa_*.cpp only, within an instruction set's target region and namespace.
#if !defined(DPOFAST_ISA_REGION)
#error "included by isa_*.cpp, after isa_begin.h"
#endif

// Vectors for any machine: plain arrays that a compiler can turn into SSE2 or NEON. The scalar table's
// float and double vectors, and every table's double.
#pragma once

template <class T, int Width>
struct Array {
  T x[Width];
};

template <class T, int Width>
struct ScalarVec {
  using scalar = T;
  using reg = Array<T, Width>;
  static constexpr int W = Width;

#define DPOFAST_LANES(expr)                  \
  reg r;                                     \
  for (int i = 0; i < W; ++i) r.x[i] = expr; \
  return r
  static reg set1(T a) { DPOFAST_LANES(a); }
  static reg load(const T* p) { DPOFAST_LANES(p[i]); }
  static reg add(reg a, reg b) { DPOFAST_LANES(a.x[i] + b.x[i]); }
  static reg sub(reg a, reg b) { DPOFAST_LANES(a.x[i] - b.x[i]); }
  static reg mul(reg a, reg b) { DPOFAST_LANES(a.x[i] * b.x[i]); }
#if defined(DPOFAST_FMA)
  static reg fma(reg a, reg b, reg c) { DPOFAST_LANES(std::fma(a.x[i], b.x[i], c.x[i])); }
#else
  static reg fma(reg a, reg b, reg c) { DPOFAST_LANES(a.x[i] * b.x[i] + c.x[i]); }
#endif
  static reg max(reg a, reg b) { DPOFAST_LANES(a.x[i] > b.x[i] ? a.x[i] : b.x[i]); }  // b if either is NaN
  static reg exp(reg a) { DPOFAST_LANES(std::exp(a.x[i])); }
  static reg tanh(reg a) { DPOFAST_LANES(std::tanh(a.x[i])); }
  static reg raise(reg a, reg b, T slack) { DPOFAST_LANES(b.x[i] > a.x[i] + slack ? b.x[i] : a.x[i]); }
  static reg finite_max(reg a) { DPOFAST_LANES(a.x[i] == -T(INFINITY) ? T(0) : a.x[i]); }
#undef DPOFAST_LANES
  static void store(T* p, reg a) {
    for (int i = 0; i < W; ++i) p[i] = a.x[i];
  }
  static bool any_different(reg a, reg b) {
    bool any = false;
    for (int i = 0; i < W; ++i) any |= !(a.x[i] == b.x[i]);
    return any;
  }
  // bit i: whether lane i of a is greater than that of b
  static unsigned greater(reg a, reg b) {
    unsigned bits = 0;
    for (int i = 0; i < W; ++i) bits |= unsigned(a.x[i] > b.x[i]) << i;
    return bits;
  }
  static T reduce_add(reg a) {
    T s = 0;
    for (int i = 0; i < W; ++i) s += a.x[i];
    return s;
  }
  static T reduce_max(reg a) {
    T m = a.x[0];
    for (int i = 1; i < W; ++i) m = a.x[i] > m ? a.x[i] : m;
    return m;
  }
  static reg load_bf16(const uint16_t* p) {
    reg r;
    for (int i = 0; i < W; ++i) r.x[i] = T(bf16_to_float(p[i]));
    return r;
  }
  static reg load_f16(const uint16_t* p) {
    reg r;
    for (int i = 0; i < W; ++i) r.x[i] = T(f16_to_float(p[i]));
    return r;
  }
  static void store_bf16(uint16_t* p, reg a) {
    for (int i = 0; i < W; ++i) p[i] = float_to_bf16(float(a.x[i]));
  }
  static void store_f16(uint16_t* p, reg a) {
    for (int i = 0; i < W; ++i) p[i] = float_to_f16(float(a.x[i]));
  }
};
