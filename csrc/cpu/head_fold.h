// Included by isa_body.h only, within an instruction set's target region and namespace.
#if !defined(DPOFAST_ISA_REGION)
#error "included by isa_body.h, after isa_begin.h"
#endif

// A tile of logits is folded into the running statistics of its tokens; its exponentials go where they are wanted.
#pragma once

// m moves only when it has to: what was summed relative to it need not be scaled at every new maximum. exp(z - m) <= e^8:
// nothing overflows, and relative precision is the same.
constexpr float kSlack = 8;

struct Nowhere {  // the exponentials are not wanted
  static constexpr bool kWanted = false;
};

// The exponentials go to the cache of a block, with the shift that they are relative to: the m of their fold.
template <class K>
struct ToCache {
  static constexpr bool kWanted = true;
  using V = typename K::Vec;
  using reg = typename V::reg;
  typename K::cached* e;   // [rows, width] of this tile
  typename K::acc* shift;  // [folds, n_padded], this tile's, from the panel's first token
  int64_t width, n_padded;

  void start(int64_t fold, int64_t t, reg m_now) { V::store(shift + fold * n_padded + t, m_now); }
  void put(int64_t r, int64_t t, reg e0, reg e1) { K::store_cached(e + r * width, width, t, e0, e1); }
};

// The exponentials become the B operand of a product with W^T, whose sums are relative to a shift of their own: `shift`
// [width].
template <class K>
struct ToProduct {
  static constexpr bool kWanted = true;
  using V = typename K::Vec;
  using reg = typename V::reg;
  typename K::elem* e;  // [rows, width]
  const typename K::acc* shift;
  int64_t width;
  reg scale;

  void start(int64_t, int64_t t, reg m_now) { scale = V::exp(V::sub(m_now, V::finite_max(V::load(shift + t)))); }
  void put(int64_t r, int64_t t, reg e0, reg e1) {
    K::store_pair(e + r * width, width, t, V::mul(e0, scale), V::mul(e1, scale));
  }
};

template <class K>
struct Fold {
  using acc = typename K::acc;
  using V = typename K::Vec;
  using reg = typename V::reg;

  Stats<acc> stats;
  const int64_t* labels;
  const acc* bias;
  Transform<V> transform;

  // Takes products c [rows, width] of vocabulary v0.. and tokens t0.., transforms them and takes the labels' out. c has room
  // for a row more.
  void prepare(acc* c, int64_t width, int64_t rows, int64_t v0, int64_t t0, int64_t n_tokens) const {
    const int64_t at = piece_of(v0) * stats.stride + t0;
    transform_tile<K>(transform, bias, v0, c, width, rows);
    if (stats.sum_z)
      for (int64_t r = 0; r < rows; r += kFoldRows)
        add_rows(c + r * width, width, rows - r < kFoldRows ? rows - r : kFoldRows, stats.sum_z + at);
    for (int64_t t = 0; t < n_tokens; ++t) {
      const int64_t l = labels[t0 + t] - v0;
      if (uint64_t(l) >= uint64_t(rows)) continue;
      stats.z_label[t0 + t] = c[l * width + t];
      c[l * width + t] = -acc(INFINITY);
      if (stats.top_before)
        for (int64_t r = 0; r < l; ++r)
          stats.top_before[at + t] = c[r * width + t] > stats.top_before[at + t] ? c[r * width + t] : stats.top_before[at + t];
    }
  }

  // Folds what `prepare` left; the exponentials (times slope_over_scale) go to `sink`.
  template <class Sink>
  void operator()(const acc* c, int64_t width, int64_t rows, int64_t v0, int64_t t0, int64_t n_tokens, Sink sink) const {
    const int64_t at = piece_of(v0) * stats.stride + t0, rows_even = round_up(rows, 2);
    for (int64_t t = 0; t < width; t += V::W)
      for (int64_t r0 = 0; r0 < rows; r0 += kFoldRows) {
        const int64_t r1 = r0 + kFoldRows < rows_even ? r0 + kFoldRows : rows_even;
        const reg top = max_of(c + t, width, r0, r1);
        if (stats.top) raise_top(top, at + t, t0 + t, n_tokens - t, v0 + (r1 < rows ? r1 : rows));
        const reg m_old = V::load(stats.m + at + t), m_new = V::raise(m_old, top, kSlack), m = V::finite_max(m_new);
        V::store(stats.m + at + t, m_new);
        if constexpr (Sink::kWanted) sink.start(r0 / kFoldRows, t, m);
        if (stats.sum_x || stats.sum_sq) exponentials<true>(c, width, r0, r1, m_old, m, at + t, t, sink);
        else exponentials<false>(c, width, r0, r1, m_old, m, at + t, t, sink);
      }
  }

  // Raises `shift` [width], to which sums are relative, where this tile needs it; `factor` receives what the sums must be
  // scaled by. Returns whether any must.
  static bool raise_shift(const acc* c, int64_t width, int64_t rows, acc* shift, acc* factor) {
    bool moved = false;
    for (int64_t t = 0; t < width; t += V::W) {
      const reg old = V::load(shift + t), now = V::raise(old, max_of(c + t, width, 0, round_up(rows, 2)), kSlack);
      moved |= V::any_different(old, now);
      V::store(shift + t, now);
      V::store(factor + t, V::exp(V::sub(old, V::finite_max(now))));
    }
    return moved;
  }

 private:
  int64_t piece_of(int64_t v) const { return v / kGroupRows % stats.pieces; }

  static reg max_of(const acc* z, int64_t width, int64_t r0, int64_t r1) {
    reg m0 = V::set1(-acc(INFINITY)), m1 = m0;
    for (int64_t r = r0; r < r1; r += 2) {
      m0 = V::max(m0, V::load(z + r * width));
      m1 = V::max(m1, V::load(z + (r + 1) * width));
    }
    return V::max(m0, m1);
  }

  template <bool Extra, class Sink>
  void exponentials(const acc* c, int64_t width, int64_t r0, int64_t r1, reg m_old, reg m, int64_t at, int64_t lane,
                    Sink& sink) const {
    reg s0 = V::set1(0), s1 = s0, sx = s0, sq = s0;
    for (int64_t r = r0; r < r1; r += 2) {
      const reg z0 = V::load(c + r * width + lane), z1 = V::load(c + (r + 1) * width + lane);
      const reg x0 = V::sub(z0, m), x1 = V::sub(z1, m);
      reg e0 = V::exp(x0), e1 = V::exp(x1);
      s0 = V::add(s0, e0);
      s1 = V::add(s1, e1);
      if constexpr (Extra) {
        const reg low = V::set1(acc(kFloorLogp));
        sx = V::fma(e0, V::max(x0, low), V::fma(e1, V::max(x1, low), sx));
        sq = V::fma(e0, e0, V::fma(e1, e1, sq));
      }
      if constexpr (Sink::kWanted) {
        if (transform.has_cap) {
          e0 = V::mul(e0, transform.slope_over_scale(z0));
          e1 = V::mul(e1, transform.slope_over_scale(z1));
        }
        sink.put(r, lane, e0, e1);
      }
    }
    const reg f = V::exp(V::sub(m_old, m)), old = V::load(stats.sum + at);
    V::store(stats.sum + at, V::fma(old, f, V::add(s0, s1)));
    if constexpr (Extra) {
      if (stats.sum_x) {
        // An empty piece (old = 0, m_old = -inf) contributes 0, not 0 * -inf.
        const reg d = V::max(V::sub(m_old, m), V::set1(acc(kFloorLogp)));
        const reg moved = V::fma(d, old, V::load(stats.sum_x + at));
        V::store(stats.sum_x + at, V::fma(moved, f, sx));
      }
      if (stats.sum_sq) V::store(stats.sum_sq + at, V::fma(V::load(stats.sum_sq + at), V::mul(f, f), sq));
    }
  }

  static void add_rows(const acc* c, int64_t width, int64_t rows, acc* sum) {
    for (int64_t t = 0; t < width; t += V::W) {
      reg s = V::set1(0);
      for (int64_t r = 0; r < rows; ++r) s = V::add(s, V::load(c + r * width + t));
      V::store(sum + t, V::add(V::load(sum + t), s));
    }
  }

  void raise_top(reg rows_max, int64_t at, int64_t token, int64_t n_tokens, int64_t v_end) const {
    acc m[V::W];
    V::store(m, rows_max);
    for (int64_t i = 0; i < V::W && i < n_tokens; ++i) {
      if (m[i] > stats.top[at + i]) stats.top[at + i] = m[i];
      if (labels[token + i] >= v_end && m[i] > stats.top_before[at + i]) stats.top_before[at + i] = m[i];
    }
  }
};
