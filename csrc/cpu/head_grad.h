// Included by isa_body.h only, within an instruction set's target region and namespace.
#if !defined(DPOFAST_ISA_REGION)
#error "included by isa_body.h, after isa_begin.h"
#endif

// d loss / d z of one block of the vocabulary, for a window of tokens, as the operands of both products.
#pragma once

// Tokens of which one sweep of the backward over some blocks takes care; t0 is the first of a panel.
struct Window {
  int64_t t0, t1, panels;
};

template <class K>
struct GradTiles {
  using acc = typename K::acc;
  using elem = typename K::elem;
  using V = typename K::Vec;
  using reg = typename V::reg;

  const Shape<K>& s;
  bool need_a, need_b;  // g^T [block, ld] as it is for d weight; panels of B operands for d hidden
  int64_t ld;
  elem *a[2] = {}, *b[2] = {};
  acc *coef, *coef_entropy, *z_max, *log_sum, *entropy;  // [n_padded]; coefficients include the transform's scale

  GradTiles(const Shape<K>& shape, int64_t window, bool for_weight, bool for_hidden, bool with_entropy, Arena& arena)
      : s(shape), need_a(for_weight), need_b(for_hidden) {
    ld = window;
    if (ld * int64_t(sizeof(elem)) % 4096 == 0) ld += 64 / int64_t(sizeof(elem));  // rows would share cache sets
    for (int i = 0; i < 2; ++i) {
      if (need_a) a[i] = arena.take<elem>(s.block * ld);
      if (need_b) b[i] = arena.take<elem>(s.block * window);
    }
    coef = arena.take<acc>(s.n_padded);
    z_max = arena.take<acc>(s.n_padded);
    log_sum = arena.take<acc>(s.n_padded);
    coef_entropy = with_entropy ? arena.take<acc>(s.n_padded) : nullptr;
    entropy = with_entropy ? arena.take<acc>(s.n_padded) : nullptr;
  }

  void load_coefficients(const BackwardArgs& args, acc scale) {
    for (int64_t t = 0; t < s.n_padded; ++t) {
      const bool real = t < s.n;  // padding: p = exp(z - inf) = 0 whatever z is
      const acc* lse = static_cast<const acc*>(args.lse) + 2 * t;
      coef[t] = real && args.grad_logps ? scale * static_cast<const acc*>(args.grad_logps)[t] : acc(0);
      z_max[t] = real ? lse[0] : acc(0);
      log_sum[t] = real ? lse[1] : acc(INFINITY);
      if (!coef_entropy) continue;
      coef_entropy[t] = real ? scale * static_cast<const acc*>(args.grad_entropy)[t] : acc(0);
      entropy[t] = real ? static_cast<const acc*>(args.entropy)[t] : acc(0);
    }
  }

  // A panel's g as a B operand, of leading dimension `width`; its number counts within the window.
  elem* panel_of(int64_t blk, int64_t panel) const { return b[blk & 1] + panel * s.P * s.block; }
  const elem* rows_of(int64_t blk) const { return a[blk & 1]; }

  // The exponentials of a whole block, row by row, so that whole cache lines of g^T are written.
  DPOFAST_NOINLINE void from_cache(const CacheBlock<K>& cache, int64_t blk, const Window& window, int64_t panel) const {
    const int64_t t0 = window.t0 + panel * s.P, width = s.width(t0 / s.P), rows = round_up(s.rows(blk), 2);
    const typename K::cached* e = cache.e + t0 * s.block;
    acc f[Shape<K>::P];
    for (int64_t r0 = 0; r0 < rows; r0 += kFoldRows) {
      const acc* shift = cache.shift + r0 / kFoldRows * s.n_padded + t0;
      for (int64_t t = 0; t < width; t += V::W) {
        const reg p = V::exp(V::sub(V::sub(V::load(shift + t), V::load(z_max + t0 + t)), V::load(log_sum + t0 + t)));
        V::store(f + t, V::sub(V::set1(0), V::mul(V::load(coef + t0 + t), p)));
      }
      for (int64_t r = r0; r < rows && r < r0 + kFoldRows; r += 2)
        for (int64_t t = 0; t < width; t += V::W) {
          reg e0, e1;
          K::load_cached(e + r * width, width, t, e0, e1);
          put(blk, panel, width, r, t, V::mul(e0, V::load(f + t)), V::mul(e1, V::load(f + t)));
        }
    }
  }

  // Makes g of transformed logits c [rows, width] of rows r0.., with a padding row of -inf behind them. The label's entry is
  // patched later.
  DPOFAST_NOINLINE void from_logits(const acc* c, int64_t blk, int64_t r0, int64_t n_rows, const Window& window, int64_t panel,
                                    const Transform<V>& transform) const {
    const int64_t t0 = window.t0 + panel * s.P, width = s.width(t0 / s.P), rows = round_up(n_rows, 2);
    auto g = [&](reg z, int64_t t) {
      const reg log_p = V::sub(V::sub(z, V::load(z_max + t)), V::load(log_sum + t)), p = V::exp(log_p);
      reg f = V::load(coef + t);
      if (coef_entropy) {  // d entropy / d z = -p (log p + entropy), and -entropy is the mean of log p
        const reg above_mean = V::add(V::max(log_p, V::set1(acc(kFloorLogp))), V::load(entropy + t));
        f = V::fma(V::load(coef_entropy + t), above_mean, f);
      }
      const reg x = V::mul(V::sub(V::set1(0), p), f);
      return transform.has_cap ? V::mul(x, transform.slope_over_scale(z)) : x;
    };
    for (int64_t r = 0; r < rows; r += 2)
      for (int64_t t = 0; t < width; t += V::W)
        put(blk, panel, width, r0 + r, t, g(V::load(c + r * width + t), t0 + t), g(V::load(c + (r + 1) * width + t), t0 + t));
  }

  // The label's own entry: c (1 - p) - d_entropy p (log p + entropy), with 1 - p from log p, so that nothing cancels.
  DPOFAST_NOINLINE void patch_labels(int64_t blk, const Window& window, int64_t panel, const acc* logps,
                                     const Transform<V>& transform) const {
    const int64_t t0 = window.t0 + panel * s.P, width = s.width(t0 / s.P), v0 = blk * s.block;
    for (int64_t t = 0; t < s.tokens(t0 / s.P); ++t) {
      const int64_t l = s.problem.labels[t0 + t] - v0;
      if (uint64_t(l) >= uint64_t(s.rows(blk))) continue;
      const acc logp = logps[t0 + t];
      acc g = -std::expm1(logp) * coef[t0 + t];
      if (coef_entropy && logp > -acc(INFINITY)) g -= coef_entropy[t0 + t] * std::exp(logp) * (logp + entropy[t0 + t]);
      const elem x = K::from_acc(g * transform.slope_over_scale(z_max[t0 + t] + (log_sum[t0 + t] + logp)));
      if (need_b) K::at(panel_of(blk, panel), width, l, t) = x;
      if (need_a) a[blk & 1][l * ld + panel * s.P + t] = x;
    }
  }

 private:
  void put(int64_t blk, int64_t panel, int64_t width, int64_t r, int64_t t, reg g0, reg g1) const {
    if (need_b) K::store_pair(panel_of(blk, panel) + r * width, width, t, g0, g1);
    if (need_a) {
      elem* p = a[blk & 1] + r * ld + panel * s.P + t;
      K::store(p, g0);
      K::store(p + ld, g1);
    }
  }
};
