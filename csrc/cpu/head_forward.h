// Included by isa_body.h only, within an instruction set's target region and namespace.
#if !defined(DPOFAST_ISA_REGION)
#error "included by isa_body.h, after isa_begin.h"
#endif

// linear_logprob forward: one pass over the vocabulary, in one call.
#pragma once

template <class K>
struct Forward {
  using acc = typename K::acc;
  using elem = typename K::elem;
  using V = typename K::Vec;

  const ForwardArgs& a;
  const Shape<K> s;
  const int threads;
  const int64_t cached_blocks;
  acc* const jacobian;  // sum_v exp(z_v - shift) W_v, transposed: panel after panel of [h, width]
  Arena arena;
  const WeightBlocks<K> w;
  // A step takes `together` blocks that stand `apart` and meet in no piece; one, where something is prepared for the next.
  int64_t together = 1, apart = 1;
  const int64_t span, spans;  // panels in a task, tasks of a block
  Stats<acc> stats{};
  elem *packed, *exps, *token_scratch;
  acc *tiles, *shift;
  std::optional<Filter<K>> filter;  // what it keeps goes to the cache in place of exponentials

  // A forward of these computes no statistics, but what tokens drop, as shares of what their labels leave to the others.
  struct Dropped {
    const acc *least, *log_others;  // [n_padded]: z that are kept are more than `least`; log sum_{u != label} e^{z_u}
    acc* sums;                      // [panels, v]
  };
  std::optional<Dropped> dropped;

  explicit Forward(const ForwardArgs& args, const Kept<K>* kept = nullptr)
      : a(args),
        s(a.problem),
        threads(s.threads(a.jacobian ? 2 : 1)),
        cached_blocks(kept ? 0 : s.cached_blocks(a.cache, a.cache_bytes)),
        jacobian(static_cast<acc*>(a.jacobian)),
        arena{static_cast<char*>(a.workspace)},
        w(s, true, jacobian != nullptr, arena),
        span(panels_together(s.panels, threads)),
        spans(ceil_div(s.panels, span)) {
    if (!w.any() && kGroupRows % s.block == 0) {
      together = kPieces;
      apart = kGroupRows / s.block;
    } else if (!w.any() && s.block % kGroupRows == 0 && s.block <= kPieces * kGroupRows) {
      together = kPieces * kGroupRows / s.block;
    }
    const int64_t groups = ceil_div(s.v, kGroupRows);
    stats.pieces = groups < kPieces ? groups : kPieces;
    stats.stride = s.n_padded;
    packed = arena.take<elem>(s.h_padded * s.n_padded);
    auto stat = [&](bool wanted) { return wanted ? arena.take<acc>(stats.pieces * s.n_padded) : nullptr; };
    stats.m = stat(true);
    stats.sum = stat(true);
    stats.sum_x = stat(a.outputs & kEntropy);
    stats.sum_sq = stat(a.outputs & kLogSumSqProbs);
    stats.sum_z = stat(a.outputs & kMeanLogits);
    stats.top = stat(a.outputs & kIsTop1);
    stats.top_before = stat(a.outputs & kIsTop1);
    stats.z_label = arena.take<acc>(s.n_padded);
    tiles = arena.take<acc>(threads * tile_size());
    exps = jacobian ? arena.take<elem>(threads * s.tile_rows() * s.P) : nullptr;
    token_scratch = arena.take<elem>(threads * s.h_padded);
    shift = jacobian ? arena.take<acc>(s.n_padded) : nullptr;
    if (kept) filter.emplace(*kept, stats, a.grad_filter, threads, arena);
  }

  void run() {
    clear();
    const int64_t rounds = ceil_div(s.blocks, together * apart);
    for_steps(
        threads, 1 + rounds * apart, [&](int64_t step) { return n_tasks(step); },
        [&](int64_t step, int64_t i, int thread) { task(step, i, thread); });
    if (dropped) return;
    finish_rows(stats, s.n, s.v, {a, a.stats});
    if (filter)
      for_tasks(threads, s.panels, [&](int64_t panel, int) {
        filter->kept.finish(panel, static_cast<const acc*>(a.logps), static_cast<const acc*>(a.lse), a.grad_filter,
                            a.tolerance);
      });
    if (jacobian) for_tasks(threads, s.panels, [&](int64_t panel, int thread) { finish_jacobian(panel, thread); });
  }

 private:
  int64_t tile_rows() const { return s.tile_rows() + 2; }  // logits, their padding row, factors
  int64_t tile_size() const { return span * tile_rows() * s.P; }

  void clear() {
    for (int64_t i = 0; i < stats.pieces * s.n_padded; ++i) {
      stats.m[i] = -acc(INFINITY);
      stats.sum[i] = 0;
      if (stats.sum_x) stats.sum_x[i] = 0;
      if (stats.sum_sq) stats.sum_sq[i] = 0;
      if (stats.sum_z) stats.sum_z[i] = 0;
      if (stats.top) stats.top[i] = stats.top_before[i] = -acc(INFINITY);
    }
    for (int64_t t = 0; t < s.n_padded; ++t) {
      stats.z_label[t] = -acc(INFINITY);
      if (shift) shift[t] = -acc(INFINITY);
    }
    if (filter) filter->clear();
  }

  // Step 0 packs hidden and prepares block 0. Step k works on the k-th `together` blocks, and prepares block k.
  int64_t block_of(int64_t step, int64_t i) const { return ((step - 1) / apart * together + i) * apart + (step - 1) % apart; }
  int64_t n_tasks(int64_t step) const {
    if (step == 0) return s.panels + w.tasks();
    int64_t blocks = 0;
    while (blocks < together && block_of(step, blocks) < s.blocks) ++blocks;
    return blocks * spans + (step < s.blocks ? w.tasks() : 0);
  }
  void task(int64_t step, int64_t i, int thread) const {
    if (step == 0) {
      if (i >= s.panels) return w.prepare(0, i - s.panels);
      return pack_tokens<K>(s, packed_of(i), token_scratch + thread * s.h_padded, i);
    }
    const int64_t block = i / spans;
    if (block < together && block_of(step, block) < s.blocks)
      return fold_block(block_of(step, block), i % spans * span, thread);
    w.prepare(step, i - spans);  // where anything is prepared, a step has one block
  }

  elem* packed_of(int64_t panel) const { return packed + panel * s.P * s.h_padded; }

  void fold_block(int64_t b, int64_t first, int thread) const {
    const int64_t last = first + span < s.panels ? first + span : s.panels;
    for_tiles(s, b, [&](int64_t r0, int64_t n_rows) {
      auto tile_of = [&](int64_t panel) { return tiles + thread * tile_size() + (panel - first) * tile_rows() * s.P; };
      for_slabs<K>(n_rows, [&](int64_t slab, int64_t slab_rows) {
        for (int64_t panel = first; panel < last; ++panel)
          logits_tile<K>(s, w, packed_of(panel), b, r0 + slab, slab_rows, s.width(panel),
                         tile_of(panel) + slab * s.width(panel));
      });
      for (int64_t panel = first; panel < last; ++panel) fold_tile(b, r0, n_rows, panel, tile_of(panel), thread);
    });
  }

  void fold_tile(int64_t b, int64_t r0, int64_t n_rows, int64_t panel, acc* c, int thread) const {
    const Fold<K> fold{stats, a.problem.labels, static_cast<const acc*>(a.problem.bias),
                       Transform<V>(a.problem.temperature, a.problem.logit_scale, a.problem.softcap)};
    const int64_t width = s.width(panel), t0 = panel * s.P, tokens = s.tokens(panel), v0 = b * s.block + r0;
    fold.prepare(c, width, n_rows, v0, t0, tokens);
    if (dropped) {
      sum_dropped(c, width, n_rows, v0, panel);
    } else if (jacobian) {
      add_to_jacobian(fold, c, b, r0, n_rows, panel, thread);
    } else if (b < cached_blocks) {
      const CacheBlock<K> cache(s, a.cache, b);
      fold(c, width, n_rows, v0, t0, tokens,
           ToCache<K>{cache.e + t0 * s.block + r0 * width, cache.shift + r0 / kFoldRows * s.n_padded + t0, width, s.n_padded});
    } else {
      fold(c, width, n_rows, v0, t0, tokens, Nowhere{});
      if (filter) (*filter)(c, width, n_rows, b, panel, thread);
    }
  }

  void sum_dropped(const acc* c, int64_t width, int64_t rows, int64_t v0, int64_t panel) const {
    const acc *least = dropped->least + panel * s.P, *log_others = dropped->log_others + panel * s.P;
    for (int64_t r = 0; r < rows; ++r) {
      acc sum = 0, share[V::W];
      for (int64_t t = 0; t < width; t += V::W) {
        V::store(share, V::exp(V::sub(V::load(c + r * width + t), V::load(log_others + t))));
        for (int64_t i = 0; i < V::W; ++i)
          if (c[r * width + t + i] <= least[t + i]) sum += share[i];
      }
      dropped->sums[panel * s.v + v0 + r] = sum;
    }
  }

  void add_to_jacobian(const Fold<K>& fold, acc* c, int64_t b, int64_t r0, int64_t n_rows, int64_t panel, int thread) const {
    const int64_t width = s.width(panel), t0 = panel * s.P;
    const bool first = b == 0 && r0 == 0;
    acc* const factor = c + (s.tile_rows() + 1) * s.P;
    acc* const sums = jacobian + t0 * s.h;
    elem* const e = exps + thread * s.tile_rows() * s.P;
    if (fold.raise_shift(c, width, n_rows, shift + t0, factor) && !first)
      for (int64_t k = 0; k < s.h; ++k)
        for (int64_t t = 0; t < width; t += V::W)
          V::store(sums + k * width + t, V::mul(V::load(sums + k * width + t), V::load(factor + t)));
    fold(c, width, n_rows, b * s.block + r0, t0, s.tokens(panel), ToProduct<K>{e, shift + t0, width, V::set1(0)});
    gemm_panel<K>(w.transposed_of(b) + r0, s.block, s.h, e, width, int(width / V::W), round_up(n_rows, K::unit), sums, width,
                  !first);
  }

  // d logp / d hidden = (1 - p_label) W[label] - sum_{v != label} p_v W_v
  void finish_jacobian(int64_t panel, int thread) const {
    const Transform<V> transform(a.problem.temperature, a.problem.logit_scale, a.problem.softcap);
    const int64_t width = s.width(panel);
    acc* const sums = jacobian + panel * s.P * s.h;
    elem* const row = token_scratch + thread * s.h_padded;
    for (int64_t t = 0; t < s.tokens(panel); ++t) {
      const int64_t token = panel * s.P + t;
      const acc* lse = static_cast<const acc*>(a.lse) + 2 * token;
      const acc logp = static_cast<const acc*>(a.logps)[token], others = -std::exp(shift[token] - lse[0] - lse[1]);
      const acc own = -std::expm1(logp) * transform.slope_over_scale(stats.z_label[token]);
      read_row<K>(a.problem.weight, a.problem.weight_dtype, a.problem.labels[token] * a.problem.weight_row_stride,
                  a.problem.weight_col_stride, s.h, s.h_padded, row);
      for (int64_t k = 0; k < s.h; ++k) sums[k * width + t] = others * sums[k * width + t] + own * K::to_acc(row[k]);
    }
  }
};

// The forward with a filter. Some tokens of all parts of the batch go first: where on these the filter would keep so much,
// or leave so many tokens to the dense way, that exact gradients are cheaper, the call is one for exact gradients. They also
// say how the mass that tokens drop is given back: in the shares in which they dropped it themselves.
template <class K>
struct Filtered {
  using acc = typename K::acc;

  const ForwardArgs& a;
  const Shape<K> s;
  Arena arena;  // of the tokens that go first
  ForwardArgs first;
  int64_t *offsets, *labels;
  acc *least, *log_others;  // Forward::Dropped

  // What a kept entry costs of its part in a dense product: loads and stores where a product has multiply-adds. Where a tenth
  // to a fifth of the entries were kept, a filter took as long as exact gradients.
  static constexpr double kEntryCost = 6;
  // With fewer panels those that go first would be a large part of all; one of 64 costs 1 % of three products. Not tuned.
  static constexpr int64_t kLeastPanels = 4, kPanelsAPanel = 64;

  explicit Filtered(const ForwardArgs& args) : a(args), s(a.problem), arena{static_cast<char*>(a.workspace)}, first(a) {
    first.problem.n = s.panels < kLeastPanels ? 0 : s.P * ceil_div(s.panels, kPanelsAPanel);
    const int64_t n = first.problem.n;
    offsets = arena.take<int64_t>(n);
    labels = arena.take<int64_t>(n);
    first.logps = arena.take<acc>(n);
    first.lse = arena.take<acc>(2 * n);
    least = arena.take<acc>(n);
    log_others = arena.take<acc>(n);
    for (void*& statistic : first.statistics) statistic = nullptr;
    first.outputs = 0;
    first.problem.token_offsets = offsets;
    first.problem.labels = labels;
    first.workspace = nullptr;
  }

  int64_t run() {
    const Kept<K> kept(s, a.cache, a.cache_bytes);
    Forward<K> all(a, &kept);
    int64_t needed = all.arena.used;
    if (first.problem.n) {
      const Shape<K> some(first.problem);
      const Kept<K> none(some, nullptr, 0);
      needed = std::max(needed, arena.used + Forward<K>(first, &none).arena.used);
    }
    if (!a.workspace) return needed;
    const bool filters = kept.room > 0 && (!first.problem.n || pays(kept));
    std::memset(a.cache, 0, kFilterHeader);
    *static_cast<int64_t*>(a.cache) = filters;
    if (filters) {
      find_shares(kept);
      all.run();
    } else {
      ForwardArgs exact = a;
      exact.cache = static_cast<char*>(a.cache) + kFilterHeader;
      exact.cache_bytes -= kFilterHeader;
      Forward<K>(exact).run();
    }
    for (int64_t t = 0; a.dropped_mass && t < s.n; ++t)
      static_cast<acc*>(a.dropped_mass)[t] = filters && !kept.is_dense(t) ? kept.dropped[t] : acc(0);
    return needed;
  }

 private:
  bool pays(const Kept<K>& all) {
    const int64_t n = first.problem.n;
    for (int64_t i = 0; i < n; ++i) {
      offsets[i] = a.problem.token_offsets[i * s.n / n];
      labels[i] = a.problem.labels[i * s.n / n];
    }
    first.workspace = static_cast<char*>(a.workspace) + arena.used;
    const Shape<K> some(first.problem);
    Kept<K> kept(some, a.cache, a.cache_bytes);
    kept.room = std::min(kept.room, all.room - all.room / 4);  // others may need a third more than these
    Forward<K>(first, &kept).run();
    int64_t entries = 0, n_dense = 0;
    for (int64_t i = 0; i < some.panels * kept.pieces; ++i)
      if (kept.used[i] == Kept<K>::kFull) return false;
    for (int64_t i = 0; i < some.blocks * some.panels; ++i) entries += kept.segments[i].count;
    for (int64_t t = 0; t < n; ++t) {
      const acc *lse = static_cast<const acc*>(first.lse) + 2 * t, logp = static_cast<const acc*>(first.logps)[t];
      n_dense += kept.is_dense(t);
      log_others[t] = lse[0] + (lse[1] + std::log(-std::expm1(logp)));
      least[t] = kept.is_dense(t) ? -acc(INFINITY) : log_others[t] + acc(std::log(a.grad_filter));
    }
    const double share = double(entries) / (double(n) * double(s.v)), dense = double(n_dense) / double(n);
    // Of a product: entries, against all; a dense token makes its logits again, and then has all entries.
    return kEntryCost * share + (1 + kEntryCost) * dense < 1;
  }

  // Equal parts, as much as it takes for the squares of the shares to add up to no more than cut / tolerance: then what a
  // token is given back is no longer, in the 2-norm, than what it dropped may be. The rest is as the first tokens dropped it.
  void find_shares(const Kept<K>& all) {
    const double equal = 1 / double(s.v), most = a.grad_filter / a.tolerance;
    for (int64_t v = 0; v < s.v; ++v) all.share[v] = acc(equal);
    if (!first.problem.n || a.problem.softcap > 0 || most <= equal || Shape<K>(first.problem).panels * s.v > all.capacity())
      return;
    ForwardArgs again = first;
    again.cache = nullptr;
    again.cache_bytes = 0;
    Forward<K> call(again);
    acc* const sums = all.z;  // not in use yet
    call.dropped = {least, log_others, sums};
    call.run();
    double total = 0, squares = 0;
    for (int64_t v = 0; v < s.v; ++v) {
      double sum = 0;
      for (int64_t panel = 0; panel < call.s.panels; ++panel) sum += sums[panel * s.v + v];
      sums[v] = acc(sum);
      total += sum;
      squares += sum * sum;
    }
    if (!(total > 0)) return;
    const double found = squares / (total * total);
    const double part = found <= most ? 1 : std::sqrt((most - equal) / (found - equal));
    for (int64_t v = 0; v < s.v; ++v) all.share[v] = acc(part * sums[v] / total + (1 - part) * equal);
  }
};

// Bytes of workspace, or -1 if the jacobian has no room; computes nothing without a workspace.
template <class K>
static int64_t forward(const ForwardArgs& a) {
  if (a.grad_filter > 0) return Filtered<K>(a).run();
  Forward<K> call(a);
  if (a.jacobian && a.cache_bytes < call.s.jacobian_bytes()) return -1;
  if (a.workspace) call.run();
  return call.arena.used;
}
