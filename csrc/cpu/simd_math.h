// Included by isa_*.cpp only, within an instruction set's target region and namespace.
#if !defined(DPOFAST_ISA_REGION)
#error "included by isa_*.cpp, after isa_begin.h"
#endif

// Polynomials shared by the vector widths (minimax coefficients of the Cephes library, S. Moshier).
#pragma once

// e^r for |r| <= ln(2)/2
template <class V>
static inline typename V::reg exp_polynomial(typename V::reg r) {
  typename V::reg p = V::set1(1.9875691500e-4f);
  p = V::fma(p, r, V::set1(1.3981999507e-3f));
  p = V::fma(p, r, V::set1(8.3334519073e-3f));
  p = V::fma(p, r, V::set1(4.1665795894e-2f));
  p = V::fma(p, r, V::set1(1.6666665459e-1f));
  p = V::fma(p, r, V::set1(5.0000001201e-1f));
  p = V::fma(p, r, V::set1(1.f));
  return V::fma(p, r, V::set1(1.f));
}

// tanh x for |x| < 0.625, where (1 - t) / (1 + t) would cancel
template <class V>
static inline typename V::reg tanh_polynomial(typename V::reg x) {
  const typename V::reg s = V::mul(x, x);
  typename V::reg p = V::set1(-5.70498872745e-3f);
  p = V::fma(p, s, V::set1(2.06390887954e-2f));
  p = V::fma(p, s, V::set1(-5.37397155531e-2f));
  p = V::fma(p, s, V::set1(1.33314422036e-1f));
  p = V::fma(p, s, V::set1(-3.33332819422e-1f));
  return V::fma(V::mul(p, s), x, x);
}
