// Included by isa_body.h only, within an instruction set's target region and namespace.
#if !defined(DPOFAST_ISA_REGION)
#error "included by isa_body.h, after isa_begin.h"
#endif

// logprob on one instruction set: statistics and gradients of logits that exist already, a row at a time,
// one read of memory forward, one read and one write backward.
#pragma once

template <class V, DType D>
struct Logits {
  using acc = typename V::scalar;
  using reg = typename V::reg;
  using stored = std::conditional_t<D == DType::f32, float, std::conditional_t<D == DType::f64, double, uint16_t>>;
  static constexpr int64_t kChunk = 512;  // logits in the L1 cache at a time, as `acc`

  static reg load(const stored* p) {
    if constexpr (D == DType::bf16) return V::load_bf16(p);
    else if constexpr (D == DType::f16) return V::load_f16(p);
    else return V::load(p);
  }
  static void store(stored* p, reg x) {
    if constexpr (D == DType::bf16) V::store_bf16(p, x);
    else if constexpr (D == DType::f16) V::store_f16(p, x);
    else V::store(p, x);
  }
  static acc get(stored x) {
    if constexpr (D == DType::bf16) return bf16_to_float(x);
    else if constexpr (D == DType::f16) return f16_to_float(x);
    else return x;
  }
  static void put(stored* p, acc x) {
    if constexpr (D == DType::bf16) *p = float_to_bf16(float(x));
    else if constexpr (D == DType::f16) *p = float_to_f16(float(x));
    else *p = x;
  }

  // z of a chunk, padded with -inf to whole vectors; returns the padded length.
  static int64_t read_chunk(const Transform<V>& transform, const stored* x, int64_t n, acc* z) {
    const int64_t whole = n / V::W * V::W, padded = round_up(n, V::W);
    for (int64_t i = 0; i < whole; i += V::W) V::store(z + i, transform.apply(load(x + i)));
    if (padded > whole) {
      for (int64_t i = whole; i < n; ++i) z[i] = get(x[i]);
      for (int64_t i = n; i < padded; ++i) z[i] = 0;
      V::store(z + whole, transform.apply(V::load(z + whole)));
      for (int64_t i = n; i < padded; ++i) z[i] = -acc(INFINITY);
    }
    return padded;
  }

  static void forward(const LogitsArgs& a) {
    const Transform<V> transform(a.temperature, a.logit_scale, a.softcap);
    for_tasks(a.threads, a.n, [&](int64_t row, int) {
      const stored* x = static_cast<const stored*>(a.logits) + a.row_offsets[row];
      const acc inf = acc(INFINITY);
      acc z[kChunk], m = -inf, top_before = -inf, z_label = 0, sum = 0, sum_x = 0, sum_sq = 0, sum_z = 0;
      for (int64_t v0 = 0; v0 < a.v; v0 += kChunk) {
        const int64_t n = a.v - v0 < kChunk ? a.v - v0 : kChunk, padded = read_chunk(transform, x + v0, n, z);
        const int64_t l = a.labels[row] - v0;
        if (a.outputs & kMeanLogits) {
          reg s = V::set1(0);
          const int64_t whole = n / V::W * V::W;
          for (int64_t i = 0; i < whole; i += V::W) s = V::add(s, V::load(z + i));
          sum_z += V::reduce_add(s);
          for (int64_t i = whole; i < n; ++i) sum_z += z[i];
        }
        if (uint64_t(l) < uint64_t(n)) {
          for (int64_t i = 0; i < l; ++i) top_before = z[i] > top_before ? z[i] : top_before;
          z_label = z[l];
          z[l] = -inf;
        }
        reg top = V::set1(-inf);
        for (int64_t i = 0; i < padded; i += V::W) top = V::max(top, V::load(z + i));
        const acc chunk_max = V::reduce_max(top);
        if (l >= n && chunk_max > top_before) top_before = chunk_max;
        const acc m_new = chunk_max > m ? chunk_max : m, safe = m_new == -inf ? acc(0) : m_new;
        const acc f = std::exp(m - safe), d_m = m == -inf ? acc(0) : m - safe;
        reg s = V::set1(0), sx = s, sq = s;
        const bool extra = a.outputs & (kEntropy | kLogSumSqProbs);
        for (int64_t i = 0; i < padded; i += V::W) {
          const reg d = V::sub(V::load(z + i), V::set1(safe)), e = V::exp(d);
          s = V::add(s, e);
          if (!extra) continue;
          sx = V::fma(e, V::max(d, V::set1(acc(kFloorLogp))), sx);
          sq = V::fma(e, e, sq);
        }
        sum_x = (sum_x + d_m * sum) * f + V::reduce_add(sx);
        sum_sq = sum_sq * f * f + V::reduce_add(sq);
        sum = sum * f + V::reduce_add(s);
        m = m_new;
      }
      const Stats<acc> stats{&m, &sum, &sum_x, &sum_sq, &sum_z, &m, &top_before, &z_label, 1, 1};
      finish_rows(stats, 1, a.v, {a, nullptr}, row);
    });
  }

  static void backward(const LogitsArgs& a) {
    const Transform<V> transform(a.temperature, a.logit_scale, a.softcap);
    auto value = [](const void* p, int64_t i) { return p ? static_cast<const acc*>(p)[i] : acc(0); };
    for_tasks(a.threads, a.n, [&](int64_t row, int) {
      const stored* x = static_cast<const stored*>(a.logits) + a.row_offsets[row];
      stored* out = static_cast<stored*>(a.grad_logits) + a.grad_offsets[row];
      const acc c = transform.scale * value(a.grad_logps, row), d_entropy = transform.scale * value(a.grad_entropy, row);
      const acc z_max = value(a.lse, 2 * row), log_sum = value(a.lse, 2 * row + 1), logp = value(a.logps, row),
                entropy = value(a.of(kEntropy), row);
      acc z[kChunk];
      for (int64_t v0 = 0; v0 < a.v; v0 += kChunk) {
        const int64_t n = a.v - v0 < kChunk ? a.v - v0 : kChunk, padded = read_chunk(transform, x + v0, n, z);
        const int64_t l = a.labels[row] - v0;
        const bool has_label = uint64_t(l) < uint64_t(n);
        const acc z_label = has_label ? z[l] : acc(0);
        for (int64_t i = 0; i < padded; i += V::W) {
          const reg zi = V::load(z + i), log_p = V::sub(V::sub(zi, V::set1(z_max)), V::set1(log_sum));
          const reg p = V::exp(log_p);
          reg f = V::set1(-c);
          if (a.grad_entropy) {
            const reg above_mean = V::add(V::max(log_p, V::set1(acc(kFloorLogp))), V::set1(entropy));
            f = V::sub(f, V::mul(V::set1(d_entropy), above_mean));
          }
          reg g = V::mul(p, f);
          if (transform.has_cap) g = V::mul(g, transform.slope_over_scale(zi));
          if (i + V::W <= n) store(out + v0 + i, g);
          else V::store(z + i, g);
        }
        for (int64_t i = n / V::W * V::W; i < n; ++i) put(out + v0 + i, z[i]);
        if (!has_label) continue;
        acc g = -std::expm1(logp) * c;
        if (a.grad_entropy && logp > -acc(INFINITY)) g -= d_entropy * std::exp(logp) * (logp + entropy);
        g *= transform.slope_over_scale(z_label);
        put(out + v0 + l, g);
      }
    });
  }
};
