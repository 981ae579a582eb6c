// Included by isa_body.h only, within an instruction set's target region and namespace.
#if !defined(DPOFAST_ISA_REGION)
#error "included by isa_body.h, after isa_begin.h"
#endif

// How linear_logprob lays its operands out, and what both of its directions share.
//
// Everything is transposed: the logits of a block of vocabulary rows and a panel of tokens are
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
//
// Three sizes are fixed, because the bits of log-probs follow from them: a row's logits are folded kFoldRows at a
// time, in the order of the vocabulary, into the statistics of kPieces pieces, which take turns every kGroupRows. A
// block is a matter of memory and speed alone: any divisor of kGroupRows that is a multiple of kFoldRows, any multiple of
// kGroupRows, and the whole vocabulary where it is smaller give the same bits.
#pragma once

constexpr int64_t kFoldRows = 48;          // the least rows that a block of a large vocabulary has
constexpr int64_t kGroupRows = 192;        // deep enough that accumulators are loaded and stored rarely
constexpr int64_t kPieces = 8;             // so that few tokens still occupy many threads
constexpr int64_t kTileRows = kGroupRows;  // logits that a thread has at a time: they stay in an L1 or L2 cache

// Panels that one task takes against the same rows, which then come from the L3 cache or memory once for all of them; fewer
// where every thread would not have two tasks. Four were not compared with other numbers.
constexpr int64_t kPanelsTogether = 4;
constexpr int64_t panels_together(int64_t panels, int threads) {
  const int64_t share = panels / (2 * threads);
  return share < 1 ? 1 : share < kPanelsTogether ? share : kPanelsTogether;
}
// Rows that a task takes against its panels before the next: in fp32 and up to H 4096 they are 768 KiB, of an L2 cache.
constexpr int64_t kSlabRows = 48;

// Fewer operations than this are done sooner by one thread than another is started: about 0.1 ms of AVX2.
constexpr double kThreadFlops = 1e7;

struct Arena {  // hands out buffers, aligned to a cache line of 64 bytes; with no base it only counts
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
  const Problem& problem;
  int64_t n, h, v, block, h_padded, n_padded, panels, blocks;

  explicit Shape(const Problem& a)
      : problem(a),
        n(a.n),
        h(a.h),
        v(a.v),
        block(a.block),
        h_padded(round_up(a.h, K::unit)),
        n_padded(round_up(a.n, K::Vec::W)),
        panels(ceil_div(a.n, P)),
        blocks(ceil_div(a.v, a.block)) {}

  int64_t width(int64_t panel) const { return panel + 1 < panels ? P : n_padded - panel * P; }
  int64_t tokens(int64_t panel) const { return panel + 1 < panels ? P : n - panel * P; }
  int64_t rows(int64_t b) const { return b + 1 < blocks ? block : v - b * block; }
  int64_t tile_rows() const { return block < kTileRows ? block : kTileRows; }
  int64_t h_panels() const { return ceil_div(h, P); }
  // W's rows can be the A operand as they lie, if their elements are the product's.
  bool weight_as_is() const { return problem.weight_dtype == K::kElemType && problem.weight_col_stride == 1 && h_padded == h; }
  // Threads that `products` of n x h x v are worth. What else is done to a logit is taken for 16 terms of its sum; not tuned.
  int threads(double products) const {
    const double useful = 2.0 * double(n) * double(h + 16) * double(v) * products / kThreadFlops;
    return useful >= problem.threads ? problem.threads : useful > 1 ? int(useful) : 1;
  }

  int64_t cache_elems() const { return block * n_padded; }
  int64_t folds() const { return ceil_div(block, kFoldRows); }
  int64_t jacobian_bytes() const { return h * n_padded * int64_t(sizeof(typename K::acc)); }
  // Blocks, from the first on, whose exponentials a cache of so many bytes holds.
  int64_t cached_blocks(const void* cache, int64_t n_bytes) const {
    const int64_t fit = cache ? n_bytes / cache_per_block() : 0;
    return fit < blocks ? fit : blocks;
  }
  int64_t cache_per_block() const {
    return round_up(cache_elems() * int64_t(sizeof(typename K::cached)), 64) +
           round_up(folds() * n_padded * int64_t(sizeof(typename K::acc)), 64);
  }
};

// exp(z - shift) of one vocabulary block for all tokens, panel after panel, and the shifts [folds, n_padded] of each fold.
template <class K>
struct CacheBlock {
  typename K::cached* e;
  typename K::acc* shift;
  CacheBlock(const Shape<K>& s, void* cache, int64_t b) {
    char* at = static_cast<char*>(cache) + b * s.cache_per_block();
    e = reinterpret_cast<typename K::cached*>(at);
    shift = reinterpret_cast<typename K::acc*>(at + round_up(s.cache_elems() * int64_t(sizeof(typename K::cached)), 64));
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
    return as_is ? static_cast<const elem*>(s.problem.weight) + b * s.block * s.problem.weight_row_stride
                 : converted[b % kBuffers];
  }
  int64_t ld_rows() const { return as_is ? s.problem.weight_row_stride : s.h_padded; }
  const elem* transposed_of(int64_t b) const { return transposed[b % kBuffers]; }  // [h, block]

  void prepare(int64_t b, int64_t task) const {
    const int64_t r0 = task * kRows, rows = s.rows(b), r1 = r0 + kRows < rows ? r0 + kRows : rows;
    if (!as_is)
      for (int64_t r = r0; r < r1; ++r)
        read_row<K>(s.problem.weight, s.problem.weight_dtype, (b * s.block + r) * s.problem.weight_row_stride,
                    s.problem.weight_col_stride, s.h, s.h_padded, converted[b % kBuffers] + r * s.h_padded);
    if (!need_transposed) return;
    if (r1 > r0) transpose<K>(rows_of(b) + r0 * ld_rows(), ld_rows(), r1 - r0, s.h, transposed[b % kBuffers] + r0, s.block);
    for (int64_t r = rows; r < round_up(rows, 2) && r / kRows == task; ++r)  // the last block's odd row
      for (int64_t k = 0; k < s.h; ++k) transposed[b % kBuffers][k * s.block + r] = elem(0);
  }

 private:
  static constexpr int64_t kRows = 32;  // of a task: whole tiles of every kind's transposition; a block makes six tasks
};

// The hidden rows of a panel, packed as the B operand of z^T: [h_padded / unit][tokens][unit].
template <class K>
static void pack_tokens(const Shape<K>& s, typename K::elem* out, typename K::elem* row, int64_t panel) {
  const int64_t width = s.width(panel);
  for (int64_t t = 0; t < width; ++t) {
    // Lanes without a token repeat the last one: zeros would make NaN of an infinite weight, and 0 times that is not 0.
    if (t < s.tokens(panel))
      read_row<K>(s.problem.hidden, s.problem.hidden_dtype, s.problem.token_offsets[panel * s.P + t],
                  s.problem.hidden_col_stride, s.h, s.h_padded, row);
    put_column<K>(out, width, t, row, s.h_padded);
  }
}

// The logits of rows r0.. of block b for one packed panel of tokens, before the transform: c [rows, width].
template <class K>
static void logits_tile(const Shape<K>& s, const WeightBlocks<K>& w, const typename K::elem* packed, int64_t b, int64_t r0,
                        int64_t rows, int64_t width, typename K::acc* c) {
  gemm_panel<K>(w.rows_of(b) + r0 * w.ld_rows(), w.ld_rows(), rows, packed, width, int(width / K::Vec::W), s.h_padded, c, width,
                false);
}

// Calls f(first, rows) for slabs of rows.
template <class K, class F>
static void for_slabs(int64_t rows, const F& f) {
  constexpr int64_t slab = kSlabRows / K::MR * K::MR;
  for (int64_t r = 0; r < rows; r += slab) f(r, rows - r < slab ? rows - r : slab);
}

// Logits c [rows, width] of vocabulary v0.., in place: the bias [v] or null, then the transform. A row of -inf is put
// behind an odd number of them.
template <class K>
static void transform_tile(const Transform<typename K::Vec>& transform, const typename K::acc* bias, int64_t v0,
                           typename K::acc* c, int64_t width, int64_t rows) {
  using V = typename K::Vec;
  for (int64_t t = 0; rows % 2 && t < width; ++t) c[rows * width + t] = -typename K::acc(INFINITY);
  if (!bias && transform.is_identity()) return;
  for (int64_t r = 0; r < rows; ++r) {
    const auto b = V::set1(bias ? bias[v0 + r] : typename K::acc(0));
    typename K::acc* row = c + r * width;
    for (int64_t t = 0; t < width; t += V::W) V::store(row + t, transform.apply(V::add(V::load(row + t), b)));
  }
}

// Calls f(first row, rows) for the tiles of a block.
template <class K, class F>
static void for_tiles(const Shape<K>& s, int64_t b, const F& f) {
  for (int64_t r0 = 0, rows = s.rows(b); r0 < rows; r0 += kTileRows) f(r0, rows - r0 < kTileRows ? rows - r0 : kTileRows);
}
