// Included by isa_body.h only, within an instruction set's target region and namespace.
#if !defined(DPOFAST_ISA_REGION)
#error "included by isa_body.h, after isa_begin.h"
#endif

// linear_logprob backward from the entries that a filter kept (head_filter.h), in one call.
//
// The vocabulary is taken some blocks at a time, as many as have room for their entries, in two steps: the entries are brought
// into the order of the vocabulary's rows, {token, g} each; then both products go along these rows, kChunk columns of H at a
// time. So each row of W is read once and each row of d weight written once, and a chunk of all tokens' hidden states, or of
// their gradients, stays in a cache. A row's entries come in a fixed order, so that no sum depends on the threads: of the
// filtered tokens, then their labels, then of the tokens that keep everything, whose logits are made again.
//
// What a token dropped is given back to all rows of the vocabulary, in the shares that the forward found. Then the gradient of
// its logits adds up to zero, as the exact one does, and the error of d hidden is that of the dropped rows of W from their mean
// over these shares. Under a softcap, where the gradient does not add up to zero, nothing is given back.
#pragma once

template <class K>
struct Sparse {
  using acc = typename K::acc;
  using elem = typename K::elem;
  using V = typename K::Vec;
  using reg = typename V::reg;
  using Wide = std::conditional_t<K::unit == 1, K,
                                  WideKind<V, DType::f32, K::MR, K::NV>>;  // as K, with elements of the accumulator's type
  static constexpr int P = Shape<K>::P, kVectors = 8;
  static constexpr int64_t kChunk = kVectors * V::W;  // columns: sums and a row of W fill the registers

  const BackwardArgs& a;
  const Shape<K> s;
  const int threads;
  const Transform<V> transform;
  Arena arena;
  const int64_t ld, chunks;         // of rows of H columns, padded to whole chunks
  const int64_t room;               // entries at a time
  acc *coef, *spread;               // [n]: gradients that arrived, times the transform's scale; what all entries of g share
  const acc* share = nullptr;       // [v]: Kept
  acc *hidden, *grad;               // [n, ld]
  acc *shared_row, *spread_hidden;  // [ld]: sum of share * W's rows; sum of spread * hidden
  elem *dense_packed, *weight_rows;
  acc *tiles, *rows_scratch;
  int64_t *dense, *dense_offsets;  // tokens that keep everything, and where their hidden states are
  int64_t* label_blocks;           // [blocks]: filtered tokens whose label is in a block
  int64_t *first_blocks, *starts;  // of each group of blocks; where a block's entries start
  uint32_t *row_ends, *tokens;
  acc* g;
  int64_t n_dense = 0, groups = 0;
  acc spread_sum = 0;

  explicit Sparse(const BackwardArgs& args)
      : a(args),
        s(a.problem),
        threads(s.threads(2)),
        transform(a.problem.temperature, a.problem.logit_scale, a.problem.softcap),
        arena{static_cast<char*>(a.workspace)},
        ld(round_up(s.h, kChunk)),
        chunks(ld / kChunk),
        room(s.block * s.n) {
    coef = arena.take<acc>(s.n_padded);
    spread = arena.take<acc>(s.n_padded);
    hidden = arena.take<acc>(s.n * ld);
    grad = a.grad_hidden ? arena.take<acc>(s.n * ld) : nullptr;
    shared_row = arena.take<acc>(ld);
    spread_hidden = arena.take<acc>(ld);
    dense_packed = arena.take<elem>(s.h_padded * s.n_padded);
    weight_rows = s.weight_as_is() ? nullptr : arena.take<elem>(threads * s.block * s.h_padded);
    tiles = arena.take<acc>(threads * (s.tile_rows() + 1) * P);
    rows_scratch = arena.take<acc>(threads * scratch());
    dense = arena.take<int64_t>(s.n);
    dense_offsets = arena.take<int64_t>(s.n);
    label_blocks = arena.take<int64_t>(s.blocks);
    first_blocks = arena.take<int64_t>(s.blocks + 1);
    starts = arena.take<int64_t>(s.blocks);
    row_ends = arena.take<uint32_t>(s.blocks * s.block);
    tokens = arena.take<uint32_t>(room);
    g = arena.take<acc>(room);
  }

  void run(const Kept<K>& kept) {
    share = kept.share;
    prepare(kept);
    Problem some = a.problem;
    some.n = n_dense;
    some.token_offsets = dense_offsets;
    const Shape<K> of_dense(some);
    const int64_t token_tasks = ceil_div(s.n, kTokens);
    auto group_of = [](int64_t step) { return (step - 2) / 2; };
    for_steps(
        threads, 2 + 2 * groups + 1,
        [&](int64_t step) {
          if (step == 0) return token_tasks + (n_dense ? of_dense.panels : 0);
          if (step == 1) return chunks;
          if (group_of(step) == groups) return grad ? token_tasks : 0;
          if (step % 2 == 0) return blocks_of(group_of(step));
          return (grad ? chunks : 0) + (a.grad_weight ? row_tasks_of(group_of(step)) : 0);
        },
        [&](int64_t step, int64_t i, int thread) {
          acc* const row = rows_scratch + thread * scratch();
          if (step == 0 && i < token_tasks) return widen(i);
          if (step == 0)
            return pack_tokens<K>(of_dense, dense_packed + (i - token_tasks) * P * s.h_padded, reinterpret_cast<elem*>(row),
                                  i - token_tasks);
          if (step == 1) return sum_spread(i);
          const int64_t group = group_of(step);
          if (group == groups) return write_hidden(i, row);
          if (step % 2 == 0) return order(kept, of_dense, first_blocks[group] + i, thread);
          if (grad && i < chunks) return hidden_grad(group, i, row);
          weight_grad(group, i - (grad ? chunks : 0), row);
        });
  }

 private:
  static constexpr int64_t kTokens = 64, kBlocks = 4;  // of a task; not tuned
  int64_t scratch() const { return ld > P ? ld : P; }
  int64_t blocks_of(int64_t group) const { return first_blocks[group + 1] - first_blocks[group]; }
  int64_t row_tasks_of(int64_t group) const { return ceil_div(blocks_of(group), kBlocks) * chunks; }
  // Of the entries of block b, those of its row r.
  int64_t row_start(int64_t b, int64_t r) const { return r ? row_ends[b * s.block + r - 1] : starts[b]; }
  int64_t row_end(int64_t b, int64_t r) const { return row_ends[b * s.block + r]; }

  // Finds the dense tokens, and as many blocks for each group as there is room for.
  void prepare(const Kept<K>& kept) {
    for (int64_t b = 0; b < s.blocks; ++b) label_blocks[b] = 0;
    for (int64_t t = 0; t < s.n; ++t) {
      coef[t] = transform.scale * static_cast<const acc*>(a.grad_logps)[t];
      spread[t] = 0;
      if (kept.is_dense(t)) {
        dense_offsets[n_dense] = a.problem.token_offsets[t];
        dense[n_dense++] = t;
        continue;
      }
      ++label_blocks[a.problem.labels[t] / s.block];
      if (!transform.has_cap) spread[t] = -coef[t] * kept.dropped[t];
      spread_sum += spread[t];
    }
    int64_t n = 0;
    for (int64_t b = 0; b < s.blocks; ++b) {
      int64_t of_block = label_blocks[b] + s.rows(b) * n_dense;
      for (int64_t panel = 0; panel < s.panels; ++panel) of_block += kept.segment(b, panel).count;
      if (b == 0 || n + of_block > room) {
        first_blocks[groups++] = b;
        n = 0;
      }
      starts[b] = n;
      n += of_block;
    }
    first_blocks[groups] = s.blocks;
    for (int64_t k = 0; k < ld; ++k) shared_row[k] = spread_hidden[k] = 0;
  }

  void widen(int64_t task) const {
    const int64_t t1 = (task + 1) * kTokens < s.n ? (task + 1) * kTokens : s.n;
    for (int64_t t = task * kTokens; t < t1; ++t) {
      read_row<Wide>(s.problem.hidden, s.problem.hidden_dtype, s.problem.token_offsets[t], s.problem.hidden_col_stride, s.h, ld,
                     hidden + t * ld);
      for (int64_t k = 0; grad && k < ld; ++k) grad[t * ld + k] = 0;
    }
  }

  void sum_spread(int64_t chunk) const {
    acc* const sum = spread_hidden + chunk * kChunk;
    for (int64_t t = 0; t < s.n; ++t)
      for (int64_t k = 0; spread[t] != 0 && k < kChunk; ++k) sum[k] += spread[t] * hidden[t * ld + chunk * kChunk + k];
  }

  // Brings the entries of block b into the order of its rows.
  void order(const Kept<K>& kept, const Shape<K>& of_dense, int64_t b, int thread) const {
    uint32_t* const end = row_ends + b * s.block;  // at first, how many entries a row has; then where its next one goes
    const int64_t rows = s.rows(b), v0 = b * s.block;
    for (int64_t r = 0; r < rows; ++r) end[r] = uint32_t(n_dense);
    for (int64_t panel = 0; panel < s.panels; ++panel)
      kept.for_entries(b, panel, [&](acc, int64_t place) { end[place / P] += !kept.is_dense(panel * P + place % P); });
    auto for_labels = [&](const auto& f) {
      for (int64_t t = 0; label_blocks[b] && t < s.n; ++t) {
        const int64_t l = s.problem.labels[t] - v0;
        if (uint64_t(l) < uint64_t(rows) && !kept.is_dense(t)) f(t, l);
      }
    };
    for_labels([&](int64_t, int64_t l) { ++end[l]; });
    uint32_t at = uint32_t(starts[b]);
    for (int64_t r = 0; r < rows; ++r) {
      const uint32_t n = end[r];
      end[r] = at;
      at += n;
    }
    auto put = [&](int64_t r, int64_t t, acc x) {
      tokens[end[r]] = uint32_t(t);
      g[end[r]++] = x;
    };
    for (int64_t panel = 0; panel < s.panels; ++panel)
      kept.for_entries(b, panel, [&](acc z, int64_t place) {
        const int64_t t = panel * P + place % P;
        const acc* lse = static_cast<const acc*>(a.lse) + 2 * t;
        if (!kept.is_dense(t)) put(place / P, t, -coef[t] * std::exp(z - lse[0] - lse[1]) * transform.slope_over_scale(z));
      });
    for_labels([&](int64_t t, int64_t l) { put(l, t, label_grad(t)); });
    if (n_dense) put_dense(of_dense, b, thread, put);
    if (!a.grad_bias) return;
    for (int64_t r = 0; r < rows; ++r) {
      acc sum = share[v0 + r] * spread_sum;
      for (int64_t i = row_start(b, r); i < row_end(b, r); ++i) sum += g[i];
      static_cast<acc*>(a.grad_bias)[v0 + r] = sum;
    }
  }

  // (1 - p) c, with 1 - p from log p, so that nothing cancels.
  acc label_grad(int64_t t) const {
    const acc logp = static_cast<const acc*>(a.logps)[t], *lse = static_cast<const acc*>(a.lse) + 2 * t;
    return -std::expm1(logp) * coef[t] * transform.slope_over_scale(lse[0] + (lse[1] + logp));
  }

  // All entries of block b for the tokens that keep everything.
  template <class Put>
  void put_dense(const Shape<K>& of_dense, int64_t b, int thread, const Put& put) const {
    const int64_t rows = s.rows(b), v0 = b * s.block;
    const elem* operand = static_cast<const elem*>(s.problem.weight) + v0 * s.problem.weight_row_stride;
    int64_t ld_operand = s.problem.weight_row_stride;
    if (weight_rows) {
      elem* const converted = weight_rows + thread * s.block * s.h_padded;
      for (int64_t r = 0; r < rows; ++r)
        read_row<K>(s.problem.weight, s.problem.weight_dtype, (v0 + r) * s.problem.weight_row_stride,
                    s.problem.weight_col_stride, s.h, s.h_padded, converted + r * s.h_padded);
      operand = converted;
      ld_operand = s.h_padded;
    }
    acc* const c = tiles + thread * (s.tile_rows() + 1) * P;
    for (int64_t panel = 0; panel < of_dense.panels; ++panel) {
      const int64_t width = of_dense.width(panel);
      gemm_panel<K>(operand, ld_operand, rows, dense_packed + panel * P * s.h_padded, width, int(width / V::W), s.h_padded, c,
                    width, false);
      transform_tile<K>(transform, static_cast<const acc*>(s.problem.bias), v0, c, width, rows);
      for (int64_t i = 0; i < of_dense.tokens(panel); ++i) {
        const int64_t t = dense[panel * P + i], l = s.problem.labels[t] - v0;
        const acc* lse = static_cast<const acc*>(a.lse) + 2 * t;
        for (int64_t r = 0; r < rows; ++r) {
          const acc z = c[r * width + i];
          put(r, t, r == l ? label_grad(t) : -coef[t] * std::exp(z - lse[0] - lse[1]) * transform.slope_over_scale(z));
        }
      }
    }
  }

  // Calls f(row of the vocabulary, first entry, one past the last) for the rows of some blocks.
  template <class F>
  void for_rows(int64_t first, int64_t last, const F& f) const {
    for (int64_t b = first; b < last; ++b)
      for (int64_t r = 0; r < s.rows(b); ++r) f(b * s.block + r, row_start(b, r), row_end(b, r));
  }

  // grad[t] += g W_v for a chunk of columns, with the row in registers.
  DPOFAST_NOINLINE void hidden_grad(int64_t group, int64_t chunk, acc* scratch_row) const {
    const int64_t k0 = chunk * kChunk, n = s.h - k0 < kChunk ? s.h - k0 : kChunk;
    const bool direct = s.problem.weight_dtype == Wide::kElemType && s.problem.weight_col_stride == 1 && n == kChunk;
    reg sum[kVectors];
    DPOFAST_UNROLL
    for (int j = 0; j < kVectors; ++j) sum[j] = V::load(shared_row + k0 + j * V::W);
    for_rows(first_blocks[group], first_blocks[group + 1], [&](int64_t v, int64_t first, int64_t last) {
      const int64_t offset = v * s.problem.weight_row_stride + k0 * s.problem.weight_col_stride;
      const acc* from = scratch_row;
      if (direct) from = static_cast<const acc*>(s.problem.weight) + offset;
      else
        read_row<Wide>(s.problem.weight, s.problem.weight_dtype, offset, s.problem.weight_col_stride, n, kChunk, scratch_row);
      DPOFAST_UNROLL
      for (int j = 0; j < kVectors; ++j) sum[j] = V::fma(V::set1(share[v]), V::load(from + j * V::W), sum[j]);
      add_row(from, first, last, grad + k0);
    });
    DPOFAST_UNROLL
    for (int j = 0; j < kVectors; ++j) V::store(shared_row + k0 + j * V::W, sum[j]);
  }
  DPOFAST_NOINLINE void add_row(const acc* from, int64_t first, int64_t last, acc* to) const {
    reg row[kVectors];
    DPOFAST_UNROLL
    for (int j = 0; j < kVectors; ++j) row[j] = V::load(from + j * V::W);
    for (int64_t i = first; i < last; ++i) {
      const reg x = V::set1(g[i]);
      acc* const out = to + int64_t(tokens[i]) * ld;
      DPOFAST_UNROLL
      for (int j = 0; j < kVectors; ++j) V::store(out + j * V::W, V::fma(x, row[j], V::load(out + j * V::W)));
    }
  }

  // d weight's rows of some blocks, for a chunk of columns.
  DPOFAST_NOINLINE void weight_grad(int64_t group, int64_t task, acc* scratch_row) const {
    const int64_t sets = ceil_div(blocks_of(group), kBlocks), k0 = task / sets * kChunk;
    const int64_t first_block = first_blocks[group] + task % sets * kBlocks, after = first_blocks[group + 1];
    const int64_t last_block = first_block + kBlocks < after ? first_block + kBlocks : after;
    const int64_t n = s.h - k0 < kChunk ? s.h - k0 : kChunk;
    for_rows(first_block, last_block, [&](int64_t v, int64_t first, int64_t last) {
      sum_rows(share[v], first, last, k0, scratch_row);
      write_row<K>(a.grad_weight, a.grad_weight_dtype, v * s.h + k0, scratch_row, n);
    });
  }
  DPOFAST_NOINLINE void sum_rows(acc part, int64_t first, int64_t last, int64_t k0, acc* out) const {
    reg sum[kVectors];
    DPOFAST_UNROLL
    for (int j = 0; j < kVectors; ++j) sum[j] = V::mul(V::set1(part), V::load(spread_hidden + k0 + j * V::W));
    for (int64_t i = first; i < last; ++i) {
      const reg x = V::set1(g[i]);
      const acc* const from = hidden + int64_t(tokens[i]) * ld + k0;
      DPOFAST_UNROLL
      for (int j = 0; j < kVectors; ++j) sum[j] = V::fma(x, V::load(from + j * V::W), sum[j]);
    }
    DPOFAST_UNROLL
    for (int j = 0; j < kVectors; ++j) V::store(out + j * V::W, sum[j]);
  }

  void write_hidden(int64_t task, acc* row) const {
    const int64_t t1 = (task + 1) * kTokens < s.n ? (task + 1) * kTokens : s.n;
    for (int64_t t = task * kTokens; t < t1; ++t) {
      for (int64_t k = 0; k < s.h; ++k) row[k] = grad[t * ld + k] + spread[t] * shared_row[k];
      write_row<K>(a.grad_hidden, a.grad_hidden_dtype, a.grad_positions[t] * s.h, row, s.h);
    }
  }
};
