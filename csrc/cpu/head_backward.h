// Included by isa_body.h only, within an instruction set's target region and namespace.
#if !defined(DPOFAST_ISA_REGION)
#error "included by isa_body.h, after isa_begin.h"
#endif

// linear_logprob backward, in one call: d hidden, d weight and d bias from what the forward kept, or from logits made again.
//
// Tokens are taken a window at a time, and the vocabulary a group of blocks at a time: for each group, for each window, for
// each block. Ordinarily there is one of each. Where memory is short, packed and widened copies of tokens exist for a
// window only, and the sums of d weight for a group only (for none, if d weight has the accumulator's type and is its own).
#pragma once

// grad_hidden rows of one panel from sums [h, width]: each token's column, scaled.
template <class K>
static void write_tokens(const Shape<K>& s, const BackwardArgs& a, int64_t panel, const typename K::acc* sums,
                         const typename K::acc* scale, typename K::acc* row) {
  const int64_t width = s.width(panel);
  for (int64_t t = 0; t < s.tokens(panel); ++t) {
    const int64_t token = panel * s.P + t;
    const typename K::acc c = scale ? scale[token] : typename K::acc(1);
    for (int64_t k = 0; k < s.h; ++k) row[k] = c * sums[k * width + t];
    write_row<K>(a.grad_hidden, a.grad_hidden_dtype, a.grad_positions[token] * s.h, row, s.h);
  }
}

template <class K>
struct Backward {
  using acc = typename K::acc;
  using elem = typename K::elem;
  using V = typename K::Vec;

  const BackwardArgs& a;
  const Shape<K> s;
  const int64_t cached_blocks;
  const bool to_weight, to_hidden, recomputes, direct;  // direct: d weight has the accumulator's type
  const int64_t window, windows;                        // tokens in a window, a multiple of a panel's; windows
  const int64_t group, groups;                          // blocks in a group; groups
  const int threads;
  Arena arena;
  const WeightBlocks<K> w;
  GradTiles<K> g;
  const Transform<V> transform;
  const int64_t depth, column_panel;       // hidden as the B operand of d weight: panels of P columns, [window / unit][P][unit]
  const int64_t weight_ld;                 // of the sums of d weight
  const int64_t weight_span, hidden_span;  // panels in a task of d weight, of d hidden
  acc *tiles, *token_scratch, *sums, *weight_sums;  // d hidden's sums: panel after panel of [h, tokens]
  elem *packed, *columns;

  explicit Backward(const BackwardArgs& args)
      : a(args),
        s(a.problem),
        cached_blocks(s.cached_blocks(a.cache, a.cache_bytes)),
        to_weight(a.grad_weight || a.grad_bias),
        to_hidden(a.grad_hidden),
        recomputes(cached_blocks < s.blocks),
        direct(a.grad_weight_dtype == (sizeof(acc) == 8 ? DType::f64 : DType::f32)),
        window(a.token_chunk && a.token_chunk < s.n_padded ? round_up(a.token_chunk, s.P) : s.n_padded),
        windows(ceil_div(s.n, window)),
        // A group has as many rows of the head as a window has tokens: then neither is packed often.
        group(windows == 1 || direct || !a.grad_weight || window / s.block >= s.blocks ? s.blocks
              : window > s.block                                                       ? window / s.block
                                                                                       : 1),
        groups(ceil_div(s.blocks, group)),
        threads(s.threads(recomputes + to_weight + to_hidden)),
        arena{static_cast<char*>(a.workspace)},
        w(s, recomputes, to_hidden, arena),
        g(s, window, to_weight, to_hidden, a.grad_entropy != nullptr, arena),
        transform(a.problem.temperature, a.problem.logit_scale, a.problem.softcap),
        depth(round_up(window < s.n ? window : s.n, K::unit)),
        column_panel(depth * s.P),
        weight_ld(s.h_panels() * s.P),
        weight_span(direct || windows > 1 ? panels_together(s.h_panels(), threads) : 1),
        hidden_span(panels_together(ceil_div(window, s.P), threads)) {
    tiles = arena.take<acc>(threads * tile_size());
    token_scratch = arena.take<acc>(threads * token_size());
    packed = recomputes ? arena.take<elem>(s.h_padded * window) : nullptr;
    sums = to_hidden ? arena.take<acc>(s.h * s.n_padded) : nullptr;
    columns = a.grad_weight ? arena.take<elem>(s.h_panels() * column_panel) : nullptr;
    weight_sums = a.grad_weight && windows > 1 && !direct ? arena.take<acc>(group * s.block * weight_ld) : nullptr;
  }

  void run() {
    g.load_coefficients(a, transform.scale);
    for_steps(
        threads, groups * group_steps() + 1, [&](int64_t step) { return n_tasks(at(step)); },
        [&](int64_t step, int64_t i, int thread) { task(at(step), i, thread); });
  }

 private:
  // Where a step is. In stage i + 1 of a window, block i of the group is prepared, g of block i - lead is made, and block
  // i - lead - 1 multiplied; stage 0 packs the window's tokens. A group ends with a step that writes its d weight, and
  // all of them with one that writes d hidden.
  struct At {
    int64_t group, window, stage;  // window == windows: the group's end
  };
  int64_t lead() const { return w.as_is ? 0 : 1; }
  int64_t window_steps() const { return group + lead() + 2; }
  int64_t group_steps() const { return windows * window_steps() + 1; }
  At at(int64_t step) const {
    const int64_t in_group = step % group_steps();
    return {step / group_steps(), in_group / window_steps(), in_group % window_steps()};
  }
  Window window_of(const At& x) const {
    const int64_t t0 = x.window * window, t1 = t0 + window < s.n ? t0 + window : s.n;
    return {t0, t1, ceil_div(t1 - t0, s.P)};
  }
  int64_t tile_size() const { return (s.tile_rows() + 1) * s.P; }
  int64_t token_size() const { return s.h_padded > s.P ? s.h_padded : s.P; }
  elem* elem_row(int thread) const {  // never used together with the row of accumulators, and elem is no larger
    return reinterpret_cast<elem*>(token_scratch + thread * token_size());
  }

  int64_t group_blocks(int64_t at_group) const {
    const int64_t left = s.blocks - at_group * group;
    return left < group ? left : group;
  }
  int64_t weight_tasks() const { return a.grad_weight ? ceil_div(s.h_panels(), weight_span) : 0; }
  int64_t bias_tasks() const { return a.grad_bias ? 1 : 0; }
  // Rows of d hidden^T in a task: a few panels still make tasks for all threads. 128 tiles were not compared with others.
  static constexpr int64_t kHiddenRows = 128 * K::MR;
  int64_t hidden_chunks() const { return ceil_div(s.h, kHiddenRows); }
  int64_t hidden_tasks(const Window& win) const { return to_hidden ? ceil_div(win.panels, hidden_span) * hidden_chunks() : 0; }

  int64_t n_tasks(const At& x) const {
    if (x.group == groups) return to_hidden ? s.panels : 0;
    const int64_t blocks = group_blocks(x.group);
    if (x.window == windows) return weight_sums ? blocks : 0;
    const Window win = window_of(x);
    const int64_t panels = win.panels, preparing = x.stage - 1, making = preparing - lead(), using_b = making - 1;
    if (x.stage == 0) return panels;
    int64_t n = 0;
    if (using_b >= 0 && using_b < blocks) n += weight_tasks() + bias_tasks() + hidden_tasks(win);
    if (making >= 0 && making < blocks) n += panels;
    if (preparing < blocks) n += w.tasks();
    return n;
  }

  void task(const At& x, int64_t i, int thread) const {
    if (x.group == groups) return write_hidden(i, thread);
    const int64_t first = x.group * group, blocks = group_blocks(x.group);
    if (x.window == windows) return write_weight(first + i, i);
    const Window win = window_of(x);
    if (x.stage == 0) return pack(win, i, thread);
    const int64_t preparing = x.stage - 1, making = preparing - lead(), using_b = making - 1;
    if (using_b >= 0 && using_b < blocks) {
      if (i < weight_tasks()) return weight_grad(first + using_b, using_b, win, i * weight_span, thread);
      i -= weight_tasks();
      if (i < bias_tasks()) return bias_grad(first + using_b, win);
      i -= bias_tasks();
      if (i < hidden_tasks(win))
        return hidden_grad(first + using_b, win, i / hidden_chunks() * hidden_span, i % hidden_chunks());
      i -= hidden_tasks(win);
    }
    if (making >= 0 && making < blocks) {
      if (i < win.panels) return make_g(first + making, win, i, thread);
      i -= win.panels;
    }
    w.prepare(first + preparing, i);
  }

  void pack(const Window& win, int64_t panel, int thread) const {
    elem* const row = elem_row(thread);
    if (recomputes) pack_tokens<K>(s, packed + panel * s.P * s.h_padded, row, win.t0 / s.P + panel);
    if (!columns) return;
    const int64_t from = panel * s.P, tokens = win.t1 - win.t0;
    const int64_t to = panel + 1 < win.panels ? from + s.P : round_up(tokens, K::unit);
    for (int64_t t = from; t < to; ++t) {
      if (t < tokens)
        read_row<K>(s.problem.hidden, s.problem.hidden_dtype, s.problem.token_offsets[win.t0 + t], s.problem.hidden_col_stride,
                    s.h, s.h_padded, row);
      else
        for (int64_t k = 0; k < s.h; ++k) row[k] = elem(0);
      put_row<K>(columns, s.P, column_panel, t, row, s.h);
    }
  }

  void make_g(int64_t b, const Window& win, int64_t panel, int thread) const {
    if (b < cached_blocks) {
      g.from_cache(CacheBlock<K>(s, const_cast<void*>(a.cache), b), b, win, panel);
    } else {
      acc* const c = tiles + thread * tile_size();
      const int64_t width = s.width(win.t0 / s.P + panel);
      for_tiles(s, b, [&](int64_t r0, int64_t n_rows) {
        logits_tile<K>(s, w, packed + panel * s.P * s.h_padded, b, r0, n_rows, width, c);
        transform_tile<K>(transform, static_cast<const acc*>(a.problem.bias), b * s.block + r0, c, width, n_rows);
        g.from_logits(c, b, r0, n_rows, win, panel, transform);
      });
    }
    g.patch_labels(b, win, panel, static_cast<const acc*>(a.logps), transform);
  }

  // Panels of P columns of d weight of block b, the in_group-th of its group. Where there are several windows they are added
  // to its sums; d weight itself may be these. What is read of g then serves all panels of the task.
  void weight_grad(int64_t b, int64_t in_group, const Window& win, int64_t first, int thread) const {
    const int64_t last = first + weight_span < s.h_panels() ? first + weight_span : s.h_panels();
    const int64_t k = round_up(win.t1 - win.t0, K::unit);
    auto slice = [&](int64_t r0, int64_t n_rows, int64_t panel, int64_t k0, int64_t k_depth, acc* c, int64_t ldc, bool add) {
      gemm_slice<K>(g.rows_of(b) + r0 * g.ld, g.ld, n_rows, columns + panel * column_panel, s.P, K::NV, k0, k_depth, c, ldc,
                    add);
    };
    for_tiles(s, b, [&](int64_t r0, int64_t n_rows) {
      const int64_t v0 = b * s.block + r0;
      for_depths<K>(k, [&](int64_t k0, int64_t k_depth) {
        for (int64_t panel = first; panel < last; ++panel) {
          if (weight_sums)
            slice(r0, n_rows, panel, k0, k_depth, weight_sums + (in_group * s.block + r0) * weight_ld + panel * s.P, weight_ld,
                  win.t0 > 0);
          else if (direct && whole(panel))
            slice(r0, n_rows, panel, k0, k_depth, static_cast<acc*>(a.grad_weight) + v0 * s.h + panel * s.P, s.h, adds(win));
        }
      });
      for (int64_t panel = first; panel < last && !weight_sums; ++panel) {
        if (direct && whole(panel)) continue;
        acc* const tile = tiles + thread * tile_size();
        for_depths<K>(k, [&](int64_t k0, int64_t k_depth) { slice(r0, n_rows, panel, k0, k_depth, tile, s.P, false); });
        write_tile(tile, v0, n_rows, panel, adds(win));
      }
    });
  }
  bool adds(const Window& win) const { return a.adds || win.t0 > 0; }  // to the head's gradients; else they are written
  bool whole(int64_t panel) const { return (panel + 1) * s.P <= s.h; }

  // A tile of d weight, rounded; `add`: to what is there, which then has the accumulator's type.
  void write_tile(acc* tile, int64_t v0, int64_t n_rows, int64_t panel, bool add) const {
    const int64_t k0 = panel * s.P, width = s.h - k0 < s.P ? s.h - k0 : s.P;
    for (int64_t r = 0; r < n_rows; ++r) {
      acc* const row = tile + r * s.P;
      const int64_t at = (v0 + r) * s.h + k0;
      for (int64_t i = 0; add && i < width; ++i) row[i] += static_cast<const acc*>(a.grad_weight)[at + i];
      write_row<K>(a.grad_weight, a.grad_weight_dtype, at, row, width);
    }
  }
  void write_weight(int64_t b, int64_t in_group) const {
    for (int64_t r = 0; r < s.rows(b); ++r)
      write_row<K>(a.grad_weight, a.grad_weight_dtype, (b * s.block + r) * s.h,
                   weight_sums + (in_group * s.block + r) * weight_ld, s.h);
  }

  void bias_grad(int64_t b, const Window& win) const {
    for (int64_t r = 0; r < s.rows(b); ++r) {
      typename V::reg sum = V::set1(0);
      for (int64_t t = 0; t < win.t1 - win.t0; t += V::W) sum = V::add(sum, K::load(g.rows_of(b) + r * g.ld + t));
      acc& out = static_cast<acc*>(a.grad_bias)[b * s.block + r];
      out = adds(win) ? out + V::reduce_add(sum) : V::reduce_add(sum);
    }
  }

  void hidden_grad(int64_t b, const Window& win, int64_t first, int64_t chunk) const {
    const int64_t h0 = chunk * kHiddenRows, n_rows = s.h - h0 < kHiddenRows ? s.h - h0 : kHiddenRows;
    const int64_t last = first + hidden_span < win.panels ? first + hidden_span : win.panels;
    for_slabs<K>(n_rows, [&](int64_t slab, int64_t slab_rows) {
      for (int64_t panel = first; panel < last; ++panel) {
        const int64_t t0 = win.t0 + panel * s.P, width = s.width(t0 / s.P), k0 = h0 + slab;
        gemm_panel<K>(w.transposed_of(b) + k0 * s.block, s.block, slab_rows, g.panel_of(b, panel), width, int(width / V::W),
                      round_up(s.rows(b), K::unit), sums + t0 * s.h + k0 * width, width, b > 0);
      }
    });
  }
  void write_hidden(int64_t panel, int thread) const {
    write_tokens<K>(s, a, panel, sums + panel * s.P * s.h, nullptr, token_scratch + thread * token_size());
  }
};

// d hidden from the jacobian that the forward left: a row scaling of it.
template <class K>
static int64_t scale_jacobian(const BackwardArgs& a) {
  using acc = typename K::acc;
  const Shape<K> s(a.problem);
  if (a.cache_bytes < s.jacobian_bytes()) return -1;
  const int threads = s.threads(1.0 / double(s.v));
  Arena arena{static_cast<char*>(a.workspace)};
  acc* token_scratch = arena.take<acc>(threads * s.h_padded);
  acc* row_scale = arena.take<acc>(s.n_padded);
  if (!a.workspace) return arena.used;
  const acc scale = Transform<typename K::Vec>(a.problem.temperature, a.problem.logit_scale, a.problem.softcap).scale;
  for (int64_t t = 0; t < s.n; ++t) row_scale[t] = scale * static_cast<const acc*>(a.grad_logps)[t];
  for_tasks(threads, s.panels, [&](int64_t panel, int thread) {
    write_tokens<K>(s, a, panel, static_cast<const acc*>(a.jacobian) + panel * s.P * s.h, row_scale,
                    token_scratch + thread * s.h_padded);
  });
  return arena.used;
}

// From a cache that a forward with a filter left.
template <class K>
static int64_t filtered_backward(const BackwardArgs& a) {
  BackwardArgs exact = a;
  exact.cache = static_cast<const char*>(a.cache) + kFilterHeader;
  exact.cache_bytes -= kFilterHeader;
  Backward<K> dense(exact);
  Sparse<K> sparse(a);
  if (a.workspace) {
    if (*static_cast<const int64_t*>(a.cache)) sparse.run(Kept<K>(sparse.s, const_cast<void*>(a.cache), a.cache_bytes));
    else dense.run();
  }
  return std::max(dense.arena.used, sparse.arena.used);
}

// Bytes of workspace, or -1 if the jacobian is too small; computes nothing without a workspace.
template <class K>
static int64_t backward(const BackwardArgs& a) {
  if (a.jacobian) return scale_jacobian<K>(a);
  if (a.grad_filter > 0 && a.cache) return filtered_backward<K>(a);
  Backward<K> call(a);
  if (a.workspace) call.run();
  return call.arena.used;
}
