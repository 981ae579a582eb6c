// logprob_keep: writes to the cache what a backward needs of a tile of logits [n, width], e = exp(z - shift), and where one
// block has a whole row of it, folds the tile into the running statistics on the way: one read and one write.
//
// A row keeps one shift for all its tiles: d logps / d x is then a factor of the row times e, and no pass goes over e
// again. Any shift does whose distance from the largest logit is far from what the exponent of e's type can hold. The
// first tile's maximum is taken; a row that outgrows it later has what was stored before scaled down, here, by the
// block that found out.
//
// With a softcap e is also multiplied by the slope dz/dx over its scale; the scale is in the row's factor.
// The label's entry is 0 until logprob_seal sets it.
#pragma once
#include "cuda/logprob_fold.cuh"

namespace dpofast::cuda {

// The largest e that may be stored. exp(40): sums of 2^31 of them, and their reciprocals times a small gradient, are
// far from the limits of eight bits of exponent.
template <class G>
constexpr double kLargestCached = 2.3e17;
template <>
constexpr double kLargestCached<f16> = 6e4;  // fp16 ends at 65504

// The block's sum or maximum of x, in every thread. `warps` is shared memory, kWarps of them.
template <class A, class F>
__device__ __forceinline__ A over_block(A x, A* warps, const F& both) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x = both(x, __shfl_xor_sync(kAll, x, lanes));
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  A all = warps[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) all = both(all, warps[w]);
  __syncthreads();  // `warps` is written again
  return all;
}

// One split of a row, and the passes that a block makes over it. Plain: no bias and no softcap.
template <class T, class G, bool kPlain>
struct CachedRow {
  using A = acc_t<T>;
  static constexpr int kVec = 16 / int(sizeof(G) < sizeof(T) ? sizeof(G) : sizeof(T));
  static constexpr int kAhead = kPlain ? 2 : 1;  // a second vector would not fit the registers beside tanh's

  const Transform<A>& transform;
  const T* x;
  const A* bias;
  G* out;  // of this tile
  int begin, end, label;

  __device__ __forceinline__ A z(int v, T value) const {
    if constexpr (kPlain) return transform.scale * widen(value);
    return transform(biased(widen(value), bias, v));
  }

  // The largest z that is not the label's.
  __device__ __forceinline__ A largest() const {
    A top = -A(INFINITY);
    for_vectors<kVec, kAhead>(x, begin, end, [&](int v, auto count, const T* some) {
#pragma unroll
      for (int i = 0; i < decltype(count)::value; ++i)
        if (v + i != label) top = larger(top, z(v + i, some[i]));
    });
    return top;
  }

  // Stores exp(z - shift); returns the thread's sum of them, and the label's z through `z_label` if it meets it.
  __device__ __forceinline__ A keep(A shift, A& z_label) const {
    A sum = 0;
    for_vectors<kVec, kAhead>(x, begin, end, [&](int v, auto count, const T* some) {
      constexpr int N = decltype(count)::value;
      A e[N], all[N];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        all[i] = kPlain ? 0 : z(v + i, some[i]);
        e[i] = quick_exp(kPlain ? scaled_minus(widen(some[i]), transform.scale, shift) : all[i] - shift);
      }
      if (unsigned(label - v) < unsigned(N)) {
#pragma unroll
        for (int i = 0; i < N; ++i)
          if (v + i == label) {
            z_label = z(v + i, some[i]);
            e[i] = 0;
          }
      }
#pragma unroll
      for (int i = 0; i < N; ++i) {
        sum += e[i];
        if constexpr (!kPlain) e[i] *= transform.slope_over_scale(all[i]);
      }
      store_vector(e, out + v);
    });
    return sum;
  }
};

template <class T, class G, bool kPlain, bool kFold>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<T>)
    logprob_keep_kernel(const KeepArgs a, const Transform<acc_t<T>> transform) {
  using A = acc_t<T>;
  DPOFAST_SHARED(A, warps, kWarps);
  DPOFAST_SHARED(A, label_z, 1);
  const auto sum_of = [](A x, A y) { return x + y; };
  const auto max_of = [](A x, A y) { return larger(x, y); };
  const A none = -A(INFINITY), most = A(kLargestCached<G>);
  const int64_t jobs = a.n * a.splits;
  for (int64_t job = blockIdx.x; job < jobs; job += gridDim.x) {
    const int64_t row = job / a.splits, split = job - row * a.splits;
    const int64_t begin = split * a.split_width, end = begin + a.split_width < a.width ? begin + a.split_width : a.width;
    const int64_t label = a.labels[row] - a.v0;
    G* const first = static_cast<G*>(a.out) + row * a.out_ld;
    const CachedRow<T, G, kPlain> mine = {
        transform, static_cast<const T*>(a.x) + row * a.ld,        static_cast<const A*>(a.bias), first + a.v0, int(begin),
        int(end),  label >= 0 && label < a.width ? int(label) : -1};
    A* const stats = static_cast<A*>(a.stats) + row;
    const A before = a.shift_before ? static_cast<const A*>(a.shift_before)[row] : none;

    A shift = before;
    if constexpr (kFold) {
      if (shift == none) shift = over_block(mine.largest(), warps, max_of);
    } else {  // the tile is folded in: stats has the largest z so far
      const A m = stats[kM * a.n];
      if (shift == none || quick_exp(m - shift) > most) shift = m;
    }
    if (threadIdx.x == 0) label_z[0] = none;
    __syncthreads();
    A z_label = none;
    A sum = mine.keep(shift == none ? 0 : shift, z_label);
    if (z_label != none) label_z[0] = z_label;  // at most one thread; a NaN is not none
    if constexpr (kFold) {
      sum = over_block(sum, warps, sum_of);
      if (!(sum <= most)) {  // too large for G somewhere, or a NaN, which stays one
        const A top = over_block(mine.largest(), warps, max_of);
        if (top > shift) {
          shift = top;
          sum = over_block(mine.keep(shift, z_label), warps, sum_of);
        }
      }
      if (threadIdx.x == 0) {
        Piece<A> total = load_piece(static_cast<const A*>(a.stats), a.n, row), p = empty_piece<A>();
        p.m = shift, p.sum = sum, p.z_label = label_z[0];
        merge_pieces<A, false>(total, p);
        store_piece(static_cast<A*>(a.stats), a.n, row, total);
      }
    }
    if (shift != before && before != none) {  // what the tiles before stored, this block's share of it
      const A factor = quick_exp(before - shift);
      for (int64_t v = split * kThreads + threadIdx.x; v < a.v0; v += a.splits * kThreads) {
        G less;
        narrow(widen(first[v]) * factor, less);
        first[v] = less;
      }
    }
    if (split == 0 && threadIdx.x == 0) static_cast<A*>(a.shift)[row] = shift;
    __syncthreads();  // label_z is written again for the next row
  }
}

// Once the whole vocabulary is folded in: the factor of each row, and the label's entry. One warp a row.
//
//   d logps / d x = factor e     factor = -dz/dx exp(shift - lse)     e[label] = -(sum of the others)
template <class A, class G>
__global__ void __launch_bounds__(kThreads) logprob_seal_kernel(const SealArgs a, const Transform<A> transform) {
  const int lane = threadIdx.x % 32;
  for (int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32; row < a.n; row += int64_t(gridDim.x) * kWarps) {
    const Piece<A> p = load_piece(static_cast<const A*>(a.stats), a.n, row);
    const A* const lse = static_cast<const A*>(a.lse) + 2 * row;
    G* const e = static_cast<G*>(a.out) + row * a.out_ld;
    A shift = static_cast<const A*>(a.shift)[row];
    if (quick_exp(p.m - shift) > A(kLargestCached<G>)) {  // outgrown by a tile that is not cached
      const A factor = quick_exp(shift - p.m);
      for (int64_t v = lane; v < a.width; v += 32) {
        G less;
        narrow(widen(e[v]) * factor, less);
        e[v] = less;
      }
      shift = p.m;
    }
    __syncwarp();
    if (lane != 0) continue;
    // No other token is possible: every e is 0. And if the label is not, either, nothing is.
    const bool none = shift == -A(INFINITY);
    const int64_t label = a.labels[row];
    if (label >= 0 && label < a.width)
      narrow(none ? 0 : -p.sum * exp_of(p.m - shift) * transform.slope_over_scale(p.z_label), e[label]);
    const A factor = none ? (p.z_label == -A(INFINITY) ? A(NAN) : A(0)) : -exp_of((shift - lse[0]) - lse[1]);
    static_cast<A*>(a.factor)[row] = factor * transform.scale;
  }
}

}  // namespace dpofast::cuda
