// linear_logprob on one instruction set and one product type: forward and backward, each in one call.
//
// Everything is laid out transposed: the logits of a block of vocabulary rows and a panel of tokens are
// z^T = W_block h_panel^T, so that
//   - W is read where it lies (its rows are the A operand of gemm.h; only h, which is small, is packed);
//   - the softmax runs down the rows of a tile, one token per vector lane, with no horizontal reductions;
//   - g^T, stored as it comes, is the A operand of d weight = g^T h, and, two rows side by side, the B
//     operand of d hidden^T = W^T g^T. Only a W block is ever transposed, once for all tokens.
//
// The vocabulary goes past in steps of one or more blocks, every thread working on the same step, with a
// barrier between steps. What a step needs of W beyond the rows themselves (a converted copy, a
// transposed copy) is prepared a step ahead, in another buffer, so that one barrier a step is enough.
// The label's own entry is left out of every tile and put back exactly (core/softmax.h).
#pragma once

struct Arena {  // hands out 64-byte aligned pieces; with no base it only counts
  char* base;
  int64_t used = 0;
  template <class T>
  T* take(int64_t n) {
    const int64_t at = used;
    used += round_up(n * int64_t(sizeof(T)), 64);
    return base ? reinterpret_cast<T*>(base + at) : nullptr;
  }
};

template <class K>
struct Shape {
  static constexpr int P = K::NV * K::Vec::W;  // tokens in a panel, and hidden columns in a panel of d weight
  const Head& head;
  int64_t n, h, v, block, h_padded, n_padded, panels, blocks;

  explicit Shape(const Head& a)
      : head(a), n(a.n), h(a.h), v(a.v), block(a.block), h_padded(round_up(a.h, K::unit)),
        n_padded(round_up(a.n, K::Vec::W)), panels(ceil_div(a.n, P)), blocks(ceil_div(a.v, a.block)) {}

  int64_t width(int64_t panel) const { return panel + 1 < panels ? P : n_padded - panel * P; }
  int64_t tokens(int64_t panel) const { return panel + 1 < panels ? P : n - panel * P; }
  int64_t rows(int64_t b) const { return b + 1 < blocks ? block : v - b * block; }
  int64_t h_panels() const { return ceil_div(h, P); }
  // W's rows can be the A operand as they lie, if their elements are the product's.
  bool weight_as_is() const {
    return head.weight_dtype == K::kElemType && head.weight_col_stride == 1 && h_padded == h;
  }
  int64_t cache_block_elems() const { return block * n_padded; }
  int64_t cache_per_block() const {
    return round_up(cache_block_elems() * int64_t(sizeof(typename K::elem)), 64) +
           round_up(n_padded * int64_t(sizeof(typename K::acc)), 64);
  }
};

// exp(z - m) of one vocabulary block for all tokens, panel after panel, and m.
template <class K>
struct CacheBlock {
  typename K::elem* e;
  typename K::acc* m;
  CacheBlock(const Shape<K>& s, void* cache, int64_t b) {
    char* at = static_cast<char*>(cache) + b * s.cache_per_block();
    e = reinterpret_cast<typename K::elem*>(at);
    m = reinterpret_cast<typename K::acc*>(at + round_up(s.cache_block_elems() * int64_t(sizeof(typename K::elem)), 64));
  }
};

// Logits c [rows, width] of vocabulary v0.., in place: the bias [v] or null, then the transform.
template <class K>
static void transform_tile(const Transform<typename K::Vec>& transform, const typename K::acc* bias, int64_t v0,
                           typename K::acc* c, int64_t width, int64_t rows) {
  using V = typename K::Vec;
  if (!bias && transform.is_identity()) return;
  for (int64_t r = 0; r < rows; ++r) {
    const auto b = V::set1(bias ? bias[v0 + r] : typename K::acc(0));
    typename K::acc* row = c + r * width;
    for (int64_t t = 0; t < width; t += V::W) V::store(row + t, transform.apply(V::add(V::load(row + t), b)));
  }
}

// Running statistics of one (piece, panel), and where its exponentials go.
template <class K>
struct Fold {
  using acc = typename K::acc;
  using elem = typename K::elem;
  using V = typename K::Vec;
  using reg = typename V::reg;

  Stats<acc> stats;
  const int64_t* labels;
  const acc* bias;
  Transform<V> transform;

  // Folds the logits c [rows, width] of vocabulary v0.. and tokens t0.. into piece `piece`. If `e` is given it
  // receives exp(z - m) (times bend) as a B operand, and `m_out` the m of each token; `factor`, if given,
  // exp(m before - m after): by what an accumulator relative to the old m must be scaled.
  // c has room for a row more. Returns whether any token's m changed.
  bool operator()(acc* c, int64_t width, int64_t rows, int64_t v0, int64_t t0, int64_t n_tokens, int64_t piece, elem* e,
                  acc* m_out, acc* factor) const {
    const acc inf = acc(INFINITY);
    const int64_t at = piece * stats.stride + t0;
    transform_tile<K>(transform, bias, v0, c, width, rows);
    if (stats.sum_z) add_rows(c, width, rows, stats.sum_z + at);
    for (int64_t t = 0; t < n_tokens; ++t) {
      const int64_t l = labels[t0 + t] - v0;
      if (uint64_t(l) >= uint64_t(rows)) continue;
      stats.z_label[t0 + t] = c[l * width + t];
      c[l * width + t] = -inf;
      if (stats.top_before)
        for (int64_t r = 0; r < l; ++r)
          stats.top_before[at + t] = c[r * width + t] > stats.top_before[at + t] ? c[r * width + t] : stats.top_before[at + t];
    }
    const int64_t rows_even = round_up(rows, 2);
    for (int64_t t = 0; rows_even > rows && t < width; ++t) c[rows * width + t] = -inf;

    bool moved = false;
    for (int64_t t = 0; t < width; t += V::W) {
      const acc* z = c + t;
      reg m0 = V::set1(-inf), m1 = m0;
      for (int64_t r = 0; r < rows_even; r += 2) {
        m0 = V::max(m0, V::load(z + r * width));
        m1 = V::max(m1, V::load(z + (r + 1) * width));
      }
      m0 = V::max(m0, m1);
      if (stats.top) raise_top(m0, at + t, t0 + t, n_tokens - t, v0 + rows);
      // m moves only when it has to: what was summed relative to it need not be scaled at every new maximum.
      const reg m_old = V::load(stats.m + at + t), m_new = V::raise(m_old, m0, kSlack), m = V::finite_max(m_new);
      const reg f = V::exp(V::sub(m_old, m));
      moved |= V::any_different(m_old, m_new);
      V::store(stats.m + at + t, m_new);
      if (m_out) V::store(m_out + t, m);
      if (factor) V::store(factor + t, f);
      if (stats.sum_x || stats.sum_sq)
        exponentials<true>(z, width, rows_even, m_old, m, f, at + t, e, t);
      else
        exponentials<false>(z, width, rows_even, m_old, m, f, at + t, e, t);
    }
    return moved;
  }

 private:
  static constexpr float kSlack = 8;  // exp(z - m) <= e^8: nothing overflows, and relative precision is the same

  template <bool Extra>
  void exponentials(const acc* z, int64_t width, int64_t rows, reg m_old, reg m, reg f, int64_t at, elem* e,
                    int64_t lane) const {
    reg s0 = V::set1(0), s1 = s0, sx = s0, sq = s0;
    for (int64_t r = 0; r < rows; r += 2) {
      const reg z0 = V::load(z + r * width), z1 = V::load(z + (r + 1) * width);
      const reg x0 = V::sub(z0, m), x1 = V::sub(z1, m);
      reg e0 = V::exp(x0), e1 = V::exp(x1);
      s0 = V::add(s0, e0);
      s1 = V::add(s1, e1);
      if constexpr (Extra) {
        const reg low = V::set1(acc(-1e4));  // 0 times it is 0, which 0 * -inf is not
        sx = V::fma(e0, V::max(x0, low), V::fma(e1, V::max(x1, low), sx));
        sq = V::fma(e0, e0, V::fma(e1, e1, sq));
      }
      if (e) {
        if (transform.has_cap) {
          e0 = V::mul(e0, transform.bend(z0));
          e1 = V::mul(e1, transform.bend(z1));
        }
        K::store_pair(e + r * width, width, lane, e0, e1);
      }
    }
    const reg old = V::load(stats.sum + at);
    V::store(stats.sum + at, V::fma(old, f, V::add(s0, s1)));
    if constexpr (Extra) {
      if (stats.sum_x) {
        // An empty piece (old = 0, m_old = -inf) contributes 0, not 0 * -inf.
        const reg shift = V::max(V::sub(m_old, m), V::set1(acc(-1e4)));
        const reg moved = V::fma(shift, old, V::load(stats.sum_x + at));
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

  void raise_top(reg block_max, int64_t at, int64_t token, int64_t n_tokens, int64_t v_end) const {
    acc m[V::W];
    V::store(m, block_max);
    for (int64_t i = 0; i < V::W && i < n_tokens; ++i) {
      if (m[i] > stats.top[at + i]) stats.top[at + i] = m[i];
      if (labels[token + i] >= v_end && m[i] > stats.top_before[at + i]) stats.top_before[at + i] = m[i];
    }
  }
};

// What a step needs of W: rows as A operands, and, for products with W^T, their transposes.
template <class K>
struct WeightBlocks {
  using elem = typename K::elem;
  const Shape<K>& s;
  bool as_is, need_transposed;
  // Three of each: a block is prepared, then read as rows, then as columns, in up to three steps running.
  static constexpr int kBuffers = 3;
  elem *converted[kBuffers] = {}, *transposed[kBuffers] = {};

  WeightBlocks(const Shape<K>& shape, bool rows, bool columns, Arena& arena)
      : s(shape), as_is(shape.weight_as_is() || !(rows || columns)), need_transposed(columns) {
    for (int i = 0; i < kBuffers; ++i) {
      if (!as_is) converted[i] = arena.take<elem>(s.block * s.h_padded);
      if (need_transposed) transposed[i] = arena.take<elem>(s.block * s.h);
    }
  }
  bool any() const { return !as_is || need_transposed; }
  int64_t tasks() const { return any() ? ceil_div(s.block, kRows) : 0; }

  const elem* rows_of(int64_t b) const {
    return as_is ? static_cast<const elem*>(s.head.weight) + b * s.block * s.head.weight_row_stride : converted[b % kBuffers];
  }
  int64_t ld_rows() const { return as_is ? s.head.weight_row_stride : s.h_padded; }
  const elem* transposed_of(int64_t b) const { return transposed[b % kBuffers]; }  // [h, block]

  void prepare(int64_t b, int64_t task) const {
    const int64_t r0 = task * kRows, rows = s.rows(b), r1 = r0 + kRows < rows ? r0 + kRows : rows;
    if (!as_is)
      for (int64_t r = r0; r < r1; ++r)
        read_row<K>(s.head.weight, s.head.weight_dtype, (b * s.block + r) * s.head.weight_row_stride,
                    s.head.weight_col_stride, s.h, s.h_padded, converted[b % kBuffers] + r * s.h_padded);
    if (!need_transposed) return;
    if (r1 > r0) transpose<K>(rows_of(b) + r0 * ld_rows(), ld_rows(), r1 - r0, s.h, transposed[b % kBuffers] + r0, s.block);
    for (int64_t r = rows; r < round_up(rows, 2) && r / kRows == task; ++r)  // the last block's odd row
      for (int64_t k = 0; k < s.h; ++k) transposed[b % kBuffers][k * s.block + r] = elem(0);
  }

 private:
  static constexpr int64_t kRows = 32;
};

// hidden, packed as the B operand of z^T: panel after panel of [h_padded / unit][tokens][unit].
template <class K>
static void pack_tokens(const Shape<K>& s, typename K::elem* out, typename K::elem* row, int64_t panel) {
  using elem = typename K::elem;
  const int64_t width = s.width(panel);
  elem* b = out + panel * s.P * s.h_padded;
  for (int64_t t = 0; t < width; ++t) {
    // Lanes without a token repeat the last one: zeros would make NaN of an infinite weight, and 0 times that is not 0.
    if (t < s.tokens(panel))
      read_row<K>(s.head.hidden, s.head.hidden_dtype, s.head.row_offsets[panel * s.P + t], s.head.hidden_col_stride, s.h,
                  s.h_padded, row);
    put_column<K>(b, width, t, row, s.h_padded);
  }
}

// The logits of block b for one panel of tokens, before the transform: c [rows, width].
template <class K>
static void logits_tile(const Shape<K>& s, const WeightBlocks<K>& w, const typename K::elem* packed, int64_t b,
                        int64_t panel, typename K::acc* c) {
  const int64_t width = s.width(panel);
  gemm_panel<K>(w.rows_of(b), w.ld_rows(), s.rows(b), packed + panel * s.P * s.h_padded, width, int(width / K::Vec::W),
                s.h_padded, c, width, false);
}

// Vocabulary pieces with statistics of their own, so that few tokens still occupy many threads.
constexpr int64_t kPieces = 8;

template <class K>
static int64_t forward(const ForwardArgs& a) {
  using acc = typename K::acc;
  using elem = typename K::elem;
  using V = typename K::Vec;
  const Shape<K> s(a.head);
  const int threads = a.head.threads;
  acc* const jacobian = static_cast<acc*>(a.jacobian);

  Arena arena{static_cast<char*>(a.workspace)};
  const WeightBlocks<K> w(s, true, jacobian != nullptr, arena);
  // A step prepares what the next one uses, so a step is one block wherever something is prepared.
  const int64_t pieces = w.any() ? 1 : (s.blocks < kPieces ? s.blocks : kPieces);
  elem* packed = arena.take<elem>(s.h_padded * s.n_padded);
  auto stat = [&](bool wanted) { return wanted ? arena.take<acc>(pieces * s.n_padded) : nullptr; };
  Stats<acc> stats;
  stats.m = stat(true);
  stats.sum = stat(true);
  stats.sum_x = stat(a.outputs & kEntropy);
  stats.sum_sq = stat(a.outputs & kLogSumSqProbs);
  stats.sum_z = stat(a.outputs & kMeanLogits);
  stats.top = stat(a.outputs & kIsTop1);
  stats.top_before = stat(a.outputs & kIsTop1);
  stats.z_label = arena.take<acc>(s.n_padded);
  stats.pieces = pieces;
  stats.stride = s.n_padded;
  acc* tiles = arena.take<acc>(threads * (s.block + 2) * s.P);  // logits, their padding row, factors
  elem* exps = jacobian ? arena.take<elem>(threads * s.block * s.P) : nullptr;
  elem* rows = arena.take<elem>(threads * s.h_padded);
  if (!a.workspace) return arena.used;

  for (int64_t i = 0; i < pieces * s.n_padded; ++i) {
    stats.m[i] = -acc(INFINITY);
    stats.sum[i] = 0;
    if (i < s.n_padded) stats.z_label[i] = -acc(INFINITY);
    if (stats.sum_x) stats.sum_x[i] = 0;
    if (stats.sum_sq) stats.sum_sq[i] = 0;
    if (stats.sum_z) stats.sum_z[i] = 0;
    if (stats.top) stats.top[i] = stats.top_before[i] = -acc(INFINITY);
  }
  const Transform<V> transform(a.head.temperature, a.head.logit_scale, a.head.softcap);
  const acc* bias = static_cast<const acc*>(a.head.bias);
  const Fold<K> fold{stats, a.head.labels, bias, transform};

  // Step 0 packs hidden and prepares block 0; step i works on blocks (i - 1) * pieces onward.
  auto n_tasks = [&](int64_t step) {
    if (step == 0) return s.panels + w.tasks();
    const int64_t first = (step - 1) * pieces, left = s.blocks - first;
    return (left < pieces ? left : pieces) * s.panels + (step < s.blocks ? w.tasks() : 0);
  };
  auto task = [&](int64_t step, int64_t i, int thread) {
    if (step == 0) {
      if (i < s.panels)
        pack_tokens<K>(s, packed, rows + thread * s.h_padded, i);
      else
        w.prepare(0, i - s.panels);
      return;
    }
    const int64_t first = (step - 1) * pieces, left = s.blocks - first, now = left < pieces ? left : pieces;
    if (i >= now * s.panels) return w.prepare(step, i - now * s.panels);
    const int64_t piece = i / s.panels, panel = i % s.panels, b = first + piece, width = s.width(panel);
    acc* c = tiles + thread * (s.block + 2) * s.P;
    acc* factor = c + (s.block + 1) * s.P;
    elem* e = jacobian ? exps + thread * s.block * s.P : nullptr;
    acc* m_out = nullptr;
    if (b < a.cached_blocks) {
      const CacheBlock<K> cache(s, a.cache, b);
      e = cache.e + panel * s.P * s.block;
      m_out = cache.m + panel * s.P;
    }
    logits_tile<K>(s, w, packed, b, panel, c);
    const bool moved =
        fold(c, width, s.rows(b), b * s.block, panel * s.P, s.tokens(panel), piece, e, m_out, factor);
    if (!jacobian) return;
    acc* sums = jacobian + panel * s.P * s.h;  // sum_v exp(z_v - m) W_v, transposed: [h, width]
    if (moved && b > 0)
      for (int64_t k = 0; k < s.h; ++k)
        for (int64_t t = 0; t < width; t += V::W)
          V::store(sums + k * width + t, V::mul(V::load(sums + k * width + t), V::load(factor + t)));
    gemm_panel<K>(w.transposed_of(b), s.block, s.h, e, width, int(width / V::W), round_up(s.rows(b), K::unit), sums, width,
                  b > 0);
  };
  for_steps(threads, 1 + ceil_div(s.blocks, pieces), n_tasks, task);
  finish_rows(stats, s.n, s.v, {a.logps, a.lse, a.entropy, a.log_sum_sq_probs, a.mean_logits, a.is_top1, a.stats});
  if (!jacobian) return arena.used;

  // d logp / d hidden = (1 - p_label) W[label] - sum_{v != label} p_v W_v
  for_tasks(threads, s.panels, [&](int64_t panel, int thread) {
    const int64_t width = s.width(panel);
    acc* sums = jacobian + panel * s.P * s.h;
    elem* row = rows + thread * s.h_padded;
    for (int64_t t = 0; t < s.tokens(panel); ++t) {
      const int64_t token = panel * s.P + t;
      const acc* lse = static_cast<const acc*>(a.lse) + 2 * token;
      const acc logp = static_cast<const acc*>(a.logps)[token], others = -std::exp(stats.m[token] - lse[0] - lse[1]);
      const acc own = -std::expm1(logp) * transform.bend(stats.z_label[token]);
      read_row<K>(a.head.weight, a.head.weight_dtype, a.head.labels[token] * a.head.weight_row_stride,
                  a.head.weight_col_stride, s.h, s.h_padded, row);
      for (int64_t k = 0; k < s.h; ++k)
        sums[k * width + t] = others * sums[k * width + t] + own * K::to_acc(row[k]);
    }
  });
  return arena.used;
}

// grad_hidden rows of one panel from sums [h, width]: each token's column, scaled.
template <class K>
static void write_tokens(const Shape<K>& s, const BackwardArgs& a, int64_t panel, const typename K::acc* sums,
                         const typename K::acc* scale, typename K::acc* row) {
  const int64_t width = s.width(panel);
  for (int64_t t = 0; t < s.tokens(panel); ++t) {
    const int64_t token = panel * s.P + t;
    const typename K::acc c = scale ? scale[token] : typename K::acc(1);
    for (int64_t k = 0; k < s.h; ++k) row[k] = c * sums[k * width + t];
    write_row<K>(a.grad_hidden, a.grad_hidden_dtype, a.grad_rows[token] * s.h, row, s.h);
  }
}

// d loss / d z of one block, for all tokens, as the operands of both products.
template <class K>
struct GradTiles {
  using acc = typename K::acc;
  using elem = typename K::elem;
  using V = typename K::Vec;
  using reg = typename V::reg;

  const Shape<K>& s;
  bool need_a, need_b;  // g^T [block, ld] for d weight, and panels of B operands for d hidden, where those differ
  int64_t ld;
  elem *a[2] = {}, *b[2] = {};
  acc *coef, *coef_entropy, *z_max, *log_sum, *entropy;  // [n_padded]; coefficients include the transform's slope

  GradTiles(const Shape<K>& shape, bool for_weight, bool for_hidden, bool with_entropy, Arena& arena)
      : s(shape), need_a(for_weight), need_b(for_hidden && !(for_weight && K::unit == 1)) {
    ld = s.n_padded;
    if (ld * int64_t(sizeof(elem)) % 4096 == 0) ld += 64 / int64_t(sizeof(elem));  // rows would share cache sets
    for (int i = 0; i < 2; ++i) {
      if (need_a) a[i] = arena.take<elem>(s.block * ld);
      if (need_b) b[i] = arena.take<elem>(s.block * s.n_padded);
    }
    coef = arena.take<acc>(s.n_padded);
    z_max = arena.take<acc>(s.n_padded);
    log_sum = arena.take<acc>(s.n_padded);
    coef_entropy = with_entropy ? arena.take<acc>(s.n_padded) : nullptr;
    entropy = with_entropy ? arena.take<acc>(s.n_padded) : nullptr;
  }

  void load_coefficients(const BackwardArgs& args, acc slope) {
    for (int64_t t = 0; t < s.n_padded; ++t) {
      const bool real = t < s.n;  // padding: p = exp(z - inf) = 0 whatever z is
      const acc* lse = static_cast<const acc*>(args.lse) + 2 * t;
      coef[t] = real && args.grad_logps ? slope * static_cast<const acc*>(args.grad_logps)[t] : acc(0);
      z_max[t] = real ? lse[0] : acc(0);
      log_sum[t] = real ? lse[1] : acc(INFINITY);
      if (!coef_entropy) continue;
      coef_entropy[t] = real ? slope * static_cast<const acc*>(args.grad_entropy)[t] : acc(0);
      entropy[t] = real ? static_cast<const acc*>(args.entropy)[t] : acc(0);
    }
  }

  elem* panel_of(int64_t blk, int64_t panel) const {
    return need_b ? b[blk & 1] + panel * s.P * s.block : a[blk & 1] + panel * s.P;
  }
  int64_t ld_panel(int64_t panel) const { return need_b ? s.width(panel) : ld; }
  const elem* rows_of(int64_t blk) const { return a[blk & 1]; }

  void put(int64_t blk, int64_t panel, int64_t r, int64_t t, reg g0, reg g1) const {
    if (need_b) K::store_pair(panel_of(blk, panel) + r * s.width(panel), s.width(panel), t, g0, g1);
    if (need_a) {
      elem* p = a[blk & 1] + r * ld + panel * s.P + t;
      K::store(p, g0);
      if (r + 1 < s.block) K::store(p + ld, g1);
    }
  }

  // Row by row, so that whole cache lines of g^T are written.
  DPOFAST_NOINLINE void from_cache(const CacheBlock<K>& cache, int64_t blk, int64_t panel) const {
    const int64_t width = s.width(panel), t0 = panel * s.P, rows = round_up(s.rows(blk), 2);
    const elem* e = cache.e + t0 * s.block;
    acc f[Shape<K>::P];
    for (int64_t t = 0; t < width; t += V::W) {
      const reg p = V::exp(V::sub(V::sub(V::load(cache.m + t0 + t), V::load(z_max + t0 + t)), V::load(log_sum + t0 + t)));
      V::store(f + t, V::sub(V::set1(0), V::mul(V::load(coef + t0 + t), p)));
    }
    for (int64_t r = 0; r < rows; r += 2)
      for (int64_t t = 0; t < width; t += V::W) {
        reg e0, e1;
        K::load_pair(e + r * width, width, t, e0, e1);
        put(blk, panel, r, t, V::mul(e0, V::load(f + t)), V::mul(e1, V::load(f + t)));
      }
  }

  // From transformed logits c [rows, width], a padding row -inf in it. The label's entry is patched later.
  DPOFAST_NOINLINE void from_logits(const acc* c, int64_t blk, int64_t panel, const Transform<V>& transform) const {
    const int64_t width = s.width(panel), t0 = panel * s.P, rows = round_up(s.rows(blk), 2);
    auto g = [&](reg z, int64_t t) {
      const reg log_p = V::sub(V::sub(z, V::load(z_max + t)), V::load(log_sum + t)), p = V::exp(log_p);
      reg f = V::load(coef + t);
      if (coef_entropy) {
        const reg h = V::add(V::max(log_p, V::set1(acc(-1e4))), V::load(entropy + t));
        f = V::fma(V::load(coef_entropy + t), h, f);
      }
      const reg x = V::mul(V::sub(V::set1(0), p), f);
      return transform.has_cap ? V::mul(x, transform.bend(z)) : x;
    };
    for (int64_t r = 0; r < rows; r += 2)
      for (int64_t t = 0; t < width; t += V::W)
        put(blk, panel, r, t, g(V::load(c + r * width + t), t0 + t), g(V::load(c + (r + 1) * width + t), t0 + t));
  }

  // The label's own entry: c (1 - p) - e p (log p + entropy), with 1 - p from log p, so that nothing cancels.
  DPOFAST_NOINLINE void patch_labels(int64_t blk, int64_t panel, const acc* logps, const Transform<V>& transform) const {
    const int64_t width = s.width(panel), t0 = panel * s.P, v0 = blk * s.block;
    for (int64_t t = 0; t < s.tokens(panel); ++t) {
      const int64_t l = s.head.labels[t0 + t] - v0;
      if (uint64_t(l) >= uint64_t(s.rows(blk))) continue;
      const acc logp = logps[t0 + t];
      acc g = -std::expm1(logp) * coef[t0 + t];
      if (coef_entropy && logp > -acc(INFINITY)) g -= coef_entropy[t0 + t] * std::exp(logp) * (logp + entropy[t0 + t]);
      const elem x = K::from_acc(g * transform.bend(z_max[t0 + t] + (log_sum[t0 + t] + logp)));
      if (need_b) K::at(panel_of(blk, panel), width, l, t) = x;
      if (need_a) a[blk & 1][l * ld + t0 + t] = x;
    }
  }
};

template <class K>
static int64_t backward(const BackwardArgs& a) {
  using acc = typename K::acc;
  using elem = typename K::elem;
  using V = typename K::Vec;
  const Shape<K> s(a.head);
  const int threads = a.head.threads;
  const bool to_weight = a.grad_weight || a.grad_bias, to_hidden = a.grad_hidden;

  Arena arena{static_cast<char*>(a.workspace)};
  acc* tiles = arena.take<acc>(threads * (s.block + 1) * s.P);
  acc* rows = arena.take<acc>(threads * (s.h_padded > s.P ? s.h_padded : s.P));
  elem* elem_rows = reinterpret_cast<elem*>(rows);  // never used at the same time, and elem is no larger
  const int64_t row_size = s.h_padded > s.P ? s.h_padded : s.P;
  const Transform<V> transform(a.head.temperature, a.head.logit_scale, a.head.softcap);
  const acc* bias = static_cast<const acc*>(a.head.bias);

  if (a.jacobian) {
    acc* scale = arena.take<acc>(s.n_padded);
    if (!a.workspace) return arena.used;
    for (int64_t t = 0; t < s.n; ++t) scale[t] = transform.scale * static_cast<const acc*>(a.grad_logps)[t];
    for_tasks(threads, s.panels, [&](int64_t panel, int thread) {
      write_tokens<K>(s, a, panel, static_cast<const acc*>(a.jacobian) + panel * s.P * s.h, scale, rows + thread * row_size);
    });
    return arena.used;
  }

  const bool recomputes = a.cached_blocks < s.blocks;
  const WeightBlocks<K> w(s, recomputes, to_hidden, arena);
  GradTiles<K> g(s, to_weight, to_hidden, a.grad_entropy != nullptr, arena);
  elem* packed = recomputes ? arena.take<elem>(s.h_padded * s.n_padded) : nullptr;
  // d hidden, transposed, fp32: panel after panel of [h, tokens]
  acc* sums = to_hidden ? arena.take<acc>(s.h * s.n_padded) : nullptr;
  // hidden as the B operand of d weight: panels of P columns, [n / unit][P][unit]
  const int64_t depth = round_up(s.n, K::unit), column_panel = depth * s.P;
  elem* columns = a.grad_weight ? arena.take<elem>(s.h_panels() * column_panel) : nullptr;
  if (!a.workspace) return arena.used;

  g.load_coefficients(a, transform.scale);
  const int64_t weight_tasks = a.grad_weight ? s.h_panels() : 0, bias_tasks = a.grad_bias ? 1 : 0;
  constexpr int64_t kHiddenRows = 128 * K::MR;
  const int64_t chunks = ceil_div(s.h, kHiddenRows), hidden_tasks = to_hidden ? s.panels * chunks : 0;

  for_tasks(threads, s.panels, [&](int64_t panel, int thread) {
    elem* row = elem_rows + thread * row_size * int64_t(sizeof(acc) / sizeof(elem));
    if (recomputes) pack_tokens<K>(s, packed, row, panel);
    if (!columns) return;
    const int64_t t1 = panel + 1 < s.panels ? panel * s.P + s.P : depth;
    for (int64_t t = panel * s.P; t < t1; ++t) {
      if (t < s.n)
        read_row<K>(a.head.hidden, a.head.hidden_dtype, a.head.row_offsets[t], a.head.hidden_col_stride, s.h, s.h_padded, row);
      else
        for (int64_t k = 0; k < s.h; ++k) row[k] = elem(0);
      put_row<K>(columns, s.P, column_panel, t, row, s.h);
    }
  });

  auto make_g = [&](int64_t b, int64_t panel, int thread) {
    if (b < a.cached_blocks) {
      g.from_cache(CacheBlock<K>(s, const_cast<void*>(a.cache), b), b, panel);
    } else {
      acc* c = tiles + thread * (s.block + 1) * s.P;
      const int64_t width = s.width(panel), n_rows = s.rows(b);
      logits_tile<K>(s, w, packed, b, panel, c);
      transform_tile<K>(transform, bias, b * s.block, c, width, n_rows);
      for (int64_t t = 0; n_rows % 2 && t < width; ++t) c[n_rows * width + t] = -acc(INFINITY);
      g.from_logits(c, b, panel, transform);
    }
    g.patch_labels(b, panel, static_cast<const acc*>(a.logps), transform);
  };
  auto weight_grad = [&](int64_t b, int64_t panel, int thread) {
    acc* c = tiles + thread * (s.block + 1) * s.P;
    gemm_panel<K>(g.rows_of(b), g.ld, s.rows(b), columns + panel * column_panel, s.P, K::NV, depth, c, s.P, false);
    const int64_t k0 = panel * s.P, width = s.h - k0 < s.P ? s.h - k0 : s.P;
    for (int64_t r = 0; r < s.rows(b); ++r)
      write_row<K>(a.grad_weight, a.head.weight_dtype, (b * s.block + r) * s.h + k0, c + r * s.P, width);
  };
  auto bias_grad = [&](int64_t b) {
    for (int64_t r = 0; r < s.rows(b); ++r) {
      typename V::reg sum = V::set1(0);
      for (int64_t t = 0; t < s.n_padded; t += V::W) sum = V::add(sum, K::load(g.rows_of(b) + r * g.ld + t));
      static_cast<acc*>(a.grad_bias)[b * s.block + r] = V::reduce_add(sum);
    }
  };
  auto hidden_grad = [&](int64_t b, int64_t panel, int64_t chunk) {
    const int64_t k0 = chunk * kHiddenRows, n_rows = s.h - k0 < kHiddenRows ? s.h - k0 : kHiddenRows;
    const int64_t width = s.width(panel);
    gemm_panel<K>(w.transposed_of(b) + k0 * s.block, s.block, n_rows, g.panel_of(b, panel), g.ld_panel(panel), int(width / V::W),
                  round_up(s.rows(b), K::unit), sums + panel * s.P * s.h + k0 * width, width, b > 0);
  };

  // In step i, block i of W is prepared, g of block i - lead is made, and block i - lead - 1 multiplied.
  const int64_t lead = w.as_is ? 0 : 1;
  auto n_tasks = [&](int64_t step) {
    int64_t n = 0;
    const int64_t making = step - lead, using_b = making - 1;
    if (using_b >= 0 && using_b < s.blocks) n += weight_tasks + bias_tasks + hidden_tasks;
    if (making >= 0 && making < s.blocks) n += s.panels;
    if (step < s.blocks) n += w.tasks();
    return n;
  };
  auto task = [&](int64_t step, int64_t i, int thread) {
    const int64_t making = step - lead, using_b = making - 1;
    if (using_b >= 0 && using_b < s.blocks) {
      if (i < weight_tasks) return weight_grad(using_b, i, thread);
      i -= weight_tasks;
      if (i < bias_tasks) return bias_grad(using_b);
      i -= bias_tasks;
      if (i < hidden_tasks) return hidden_grad(using_b, i / chunks, i % chunks);
      i -= hidden_tasks;
    }
    if (making >= 0 && making < s.blocks) {
      if (i < s.panels) return make_g(making, i, thread);
      i -= s.panels;
    }
    w.prepare(step, i);
  };
  for_steps(threads, s.blocks + 1 + lead, n_tasks, task);

  if (to_hidden)
    for_tasks(threads, s.panels, [&](int64_t panel, int thread) {
      write_tokens<K>(s, a, panel, sums + panel * s.P * s.h, nullptr, rows + thread * row_size);
    });
  return arena.used;
}
