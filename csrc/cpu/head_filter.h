// Included by isa_body.h only, within an instruction set's target region and namespace.
#if !defined(DPOFAST_ISA_REGION)
#error "included by isa_body.h, after isa_begin.h"
#endif

// What a filter keeps of the softmax: the entries that are more than `cut` of what the label leaves to the others,
//   p_v > cut (1 - p_label),   that is   z_v > log cut + log sum_{u != label} e^{z_u}.
// While the vocabulary goes past, the sum is that of what has been seen, which only grows: so a superset is kept, and
// what is too small in the end is thrown out of it. The label is no entry; its gradient is always exact.
//
// A token whose dropped mass is more than `tolerance` of 1 - p_label is a dense one: it keeps everything, by making its
// logits again in the backward (head_sparse.h). So is every token of a panel that has no room for what it should keep, also
// after what has turned out to be too small was thrown out of it.
#pragma once

constexpr int64_t kFilterHeader = 64;  // bytes of a cache: whether what follows was filtered (1) or is of exact gradients (0)

static_assert(kFilteredRows == kGroupRows);

template <class K>
struct Kept {
  using acc = typename K::acc;
  static_assert(kFilteredRows * Shape<K>::P <= 1 << 16);
  static constexpr acc kDense = -1;  // in place of a dropped mass

  struct Segment {  // the entries of a block and a panel, by row, then by token
    uint32_t first, count;
  };

  const Shape<K>& s;
  int64_t pieces, room;  // entries that a region has room for: one of each panel and piece, which one thread at a time fills
  acc* dropped;          // [n]: mass
  acc* share;            // [v]: of the dropped mass that is given back, what each row of the vocabulary gets; they add up to 1
  uint32_t* used;        // [panels, pieces]: entries in a region; kFull: more than there is room for
  Segment* segments;     // [blocks, panels]
  acc* z;                // [panels, pieces, room]
  uint16_t* places;      // likewise: row in the block * P + token in the panel
  int64_t bytes;         // without any room
  static constexpr uint32_t kFull = uint32_t(-1);

  // Without memory it only counts.
  Kept(const Shape<K>& shape, void* cache, int64_t cache_bytes) : s(shape) {
    Arena arena{cache ? static_cast<char*>(cache) + kFilterHeader : nullptr};
    const int64_t groups = ceil_div(s.v, kGroupRows);
    pieces = groups < kPieces ? groups : kPieces;
    const int64_t regions = s.panels * pieces;
    dropped = arena.take<acc>(s.n);
    share = arena.take<acc>(s.v);
    used = arena.take<uint32_t>(regions);
    segments = arena.take<Segment>(s.blocks * s.panels);
    bytes = kFilterHeader + arena.used + 128;
    const int64_t left = cache_bytes - bytes, most = s.P * round_up(ceil_div(groups, pieces) * kGroupRows, 2);
    room = left > 0 ? left / (regions * int64_t(sizeof(acc) + sizeof(uint16_t))) : 0;
    room = room < most ? room : most;
    z = arena.take<acc>(regions * room);
    places = arena.take<uint16_t>(regions * room);
  }

  int64_t piece_of(int64_t b) const { return b * s.block / kGroupRows % pieces; }
  int64_t capacity() const { return s.panels * pieces * room; }
  int64_t region_of(int64_t b, int64_t panel) const { return panel * pieces + piece_of(b); }
  Segment& segment(int64_t b, int64_t panel) const { return segments[b * s.panels + panel]; }
  bool is_dense(int64_t t) const { return dropped[t] == kDense; }

  void clear() const {
    for (int64_t i = 0; i < s.panels * pieces; ++i) used[i] = 0;
  }

  // Appends n entries; where there is no room, throws out those that are not more than `least` [P], what is known by now.
  void put(int64_t b, int64_t panel, const acc* from_z, const uint16_t* from_places, int64_t n, const acc* least) const {
    const int64_t region = region_of(b, panel);
    uint32_t& end = used[region];
    if (end != kFull && int64_t(end) + n > room) end = thin(b, panel, least);
    const bool fits = end != kFull && int64_t(end) + n <= room;
    segment(b, panel) = {fits ? end : 0, fits ? uint32_t(n) : 0};
    if (!fits) {
      end = kFull;
      return;
    }
    std::memcpy(z + region * room + end, from_z, size_t(n) * sizeof(acc));
    std::memcpy(places + region * room + end, from_places, size_t(n) * sizeof(uint16_t));
    end += uint32_t(n);
  }

  // Throws out of a region, which has entries of blocks before b, what is not more than `least`; returns what is left.
  uint32_t thin(int64_t b, int64_t panel, const acc* least) const {
    const int64_t at = region_of(b, panel) * room;
    uint32_t end = 0;
    for (int64_t before = 0; before < b; ++before) {
      if (piece_of(before) != piece_of(b)) continue;
      Segment& seg = segment(before, panel);
      const uint32_t first = end;
      for (uint32_t i = seg.first; i < seg.first + seg.count; ++i) {
        if (!(z[at + i] > least[places[at + i] % Shape<K>::P])) continue;
        z[at + end] = z[at + i];
        places[at + end++] = places[at + i];
      }
      seg = {first, end - first};
    }
    return end;
  }

  // Calls f(z, place) for the entries of a block and a panel.
  template <class F>
  void for_entries(int64_t b, int64_t panel, const F& f) const {
    const Segment seg = segment(b, panel);
    const int64_t at = region_of(b, panel) * room + seg.first;
    for (int64_t i = at; i < at + seg.count; ++i) f(z[i], places[i]);
  }

  // With the log-sum-exp known: throws out what is too small, and fills `dropped` for a panel.
  void finish(int64_t panel, const acc* logps, const acc* lse, double cut, double tolerance) const {
    constexpr int P = Shape<K>::P;
    const int64_t t0 = panel * P, tokens = s.tokens(panel);
    acc least[P], log_others[P], share[P];  // the cut on z; log sum_{u != label} e^{z_u}; of it, what is kept
    bool full = false;
    for (int64_t piece = 0; piece < pieces; ++piece) full |= used[panel * pieces + piece] == kFull;
    for (int64_t t = 0; t < tokens; ++t) {
      log_others[t] = lse[2 * (t0 + t)] + (lse[2 * (t0 + t) + 1] + std::log(-std::expm1(logps[t0 + t])));
      least[t] = log_others[t] + acc(std::log(cut));
      share[t] = 0;
    }
    for (int64_t b = 0; b < s.blocks; ++b) {
      Segment& seg = segment(b, panel);
      const int64_t at = region_of(b, panel) * room + seg.first;
      int64_t end = at;
      for (int64_t i = at; i < at + seg.count; ++i) {
        const int64_t t = places[i] % P;
        if (!(z[i] > least[t])) continue;
        share[t] += std::exp(z[i] - log_others[t]);
        z[end] = z[i];
        places[end++] = places[i];
      }
      seg.count = uint32_t(end - at);
    }
    for (int64_t t = 0; t < tokens; ++t) {
      const acc left = acc(1) - share[t] > acc(0) ? acc(1) - share[t] : acc(0);
      const acc mass = left * -std::expm1(logps[t0 + t]);
      // NaN passes no comparison: such a token is dense, and its gradients are NaN where they should be.
      dropped[t0 + t] = !full && left <= acc(tolerance) && mass >= 0 && share[t] >= 0 ? mass : kDense;
    }
  }
};

// The forward's part: what of a tile is kept.
template <class K>
struct Filter {
  using acc = typename K::acc;
  using V = typename K::Vec;
  using reg = typename V::reg;
  static constexpr int P = Shape<K>::P;
  static constexpr acc kSafety = acc(0.01);  // the running sums and the last one round differently

  const Kept<K>& kept;
  const Stats<acc> stats;
  const double cut;
  const int64_t own;  // entries of a thread's scratch
  // The m and sum of each piece after an even and an odd round of the pieces, [2, pieces, stride]. A tile reads what the round
  // before left: nobody writes there while it is read, and it is the same for any number of threads.
  acc *m, *sum;
  acc* found_z;  // a thread's own: the entries of a tile
  uint16_t* found_places;

  Filter(const Kept<K>& store, const Stats<acc>& running, double at, int threads, Arena& arena)
      : kept(store), stats(running), cut(at), own(store.s.tile_rows() * P) {
    m = arena.take<acc>(2 * stats.pieces * stats.stride);
    sum = arena.take<acc>(2 * stats.pieces * stats.stride);
    found_z = arena.take<acc>(threads * own);
    found_places = arena.take<uint16_t>(threads * own);
  }

  void clear() const {
    kept.clear();
    for (int64_t i = 0; i < 2 * stats.pieces * stats.stride; ++i) m[i] = -acc(INFINITY), sum[i] = 0;
  }

  // Keeps what matters of logits c [rows, width], which were folded into the statistics: all of block b for a panel.
  DPOFAST_NOINLINE void operator()(const acc* c, int64_t width, int64_t rows, int64_t b, int64_t panel, int thread) const {
    acc least[P];
    cuts(least, width, b, panel);
    acc* const z = found_z + thread * own;
    uint16_t* const places = found_places + thread * own;
    int64_t n = 0;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t t = 0; t < width; t += V::W)
        for (unsigned lanes = V::greater(V::load(c + r * width + t), V::load(least + t)); lanes; lanes &= lanes - 1) {
          const int64_t token = t + __builtin_ctz(lanes);
          z[n] = c[r * width + token];
          places[n++] = uint16_t(r * P + token);
        }
    kept.put(b, panel, z, places, n, least);
  }

 private:
  // The least z worth keeping, as far as is known, of each token of a panel; and what is known now of the tile's own piece.
  void cuts(acc* least, int64_t width, int64_t b, int64_t panel) const {
    const int64_t t0 = panel * P, group = b * kept.s.block / kGroupRows, own_piece = group % stats.pieces;
    const int64_t round = group / stats.pieces, tokens = kept.s.tokens(panel);
    auto at = [&](int64_t of_round, int64_t piece) { return ((of_round & 1) * stats.pieces + piece) * stats.stride + t0; };
    for (int64_t t = 0; t < width; t += V::W) {
      const int64_t now = own_piece * stats.stride + t0 + t, next = at(round, own_piece) + t;
      const reg m_now = V::load(stats.m + now), sum_now = V::load(stats.sum + now);
      V::store(m + next, m_now);
      V::store(sum + next, sum_now);
      reg top = m_now;
      for (int64_t piece = 0; piece < stats.pieces; ++piece)
        if (piece != own_piece) top = V::max(top, V::load(m + at(round + 1, piece) + t));
      top = V::finite_max(top);
      reg total = V::mul(sum_now, V::exp(V::sub(m_now, top)));
      for (int64_t piece = 0; piece < stats.pieces; ++piece)
        if (piece != own_piece)
          total = V::fma(V::load(sum + at(round + 1, piece) + t), V::exp(V::sub(V::load(m + at(round + 1, piece) + t), top)),
                         total);
      acc of_top[V::W], of_total[V::W];
      V::store(of_top, top);
      V::store(of_total, total);
      for (int64_t i = 0; i < V::W; ++i)
        least[t + i] = t + i < tokens ? of_top[i] + acc(std::log(cut * double(of_total[i]))) - kSafety : acc(INFINITY);
    }
  }
};
