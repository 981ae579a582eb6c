// Included by isa_body.h only, within an instruction set's target region and namespace.
#if !defined(DPOFAST_ISA_REGION)
#error "included by isa_body.h, after isa_begin.h"
#endif

// The logit transform, a vector at a time:
//   z = x * scale,  or  cap * tanh(x * inner), with the slope d z / d x = scale * slope_over_scale(z), slope_over_scale(z) = 1
//   - (z / cap)^2
// where scale = logit_scale / temperature, cap = softcap / temperature, inner = logit_scale / softcap.
#pragma once

template <class V>
struct Transform {
  using acc = typename V::scalar;
  using reg = typename V::reg;
  bool has_cap;
  acc scale, inner, cap, inv_cap;

  // softcap 0: none
  Transform(double temperature, double logit_scale, double softcap)
      : has_cap(softcap != 0),
        scale(acc(logit_scale / temperature)),
        inner(has_cap ? acc(logit_scale / softcap) : acc(0)),
        cap(acc(softcap / temperature)),
        inv_cap(has_cap ? acc(temperature / softcap) : acc(0)) {}

  bool is_identity() const { return !has_cap && scale == acc(1); }
  reg apply(reg x) const {
    return has_cap ? V::mul(V::set1(cap), V::tanh(V::mul(x, V::set1(inner)))) : V::mul(x, V::set1(scale));
  }
  // Kept >= 0, so that z = -inf, an entry that is left out, gives 0 and not NaN.
  reg slope_over_scale(reg z) const {
    const reg u = V::mul(z, V::set1(inv_cap));
    return V::max(V::set1(0), V::sub(V::set1(1), V::mul(u, u)));
  }
  acc slope_over_scale(acc z) const { return has_cap ? acc(1) - z * inv_cap * z * inv_cap : acc(1); }
};
