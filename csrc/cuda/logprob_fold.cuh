// logprob_fold: folds one tile of logits [n, width] into the running statistics of its n rows; also whole rows of
// logits, wherever they start. One read of the tile; the statistics are a handful of numbers per row.
//
// A row is cut into `splits`, one block each, when there are too few rows to fill the GPU. Then each block
// writes a partial, and logprob_merge adds them up in their order, so that the bits do not depend on timing.
#pragma once
#include "core/softmax.h"
#include "cuda/device.h"
#include "cuda/kernels.h"

namespace dpofast::cuda {

// The statistics of a piece of a row, some of its entries. RowStats without `top`, which m is: the exact maximum over entries
// that are not the label's.
template <class A>
struct Piece {
  A m, sum, sum_x, sum_sq, sum_z, top_before, z_label;
};

template <class A>
__device__ __forceinline__ Piece<A> empty_piece() {
  const A inf = A(INFINITY);
  return {-inf, 0, 0, 0, 0, -inf, -inf};
}

// A NaN is never the larger one, and lives on in `sum`.
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }

template <class A, bool kExtra>
__device__ __forceinline__ void merge_pieces(Piece<A>& a, const Piece<A>& b) {
  const A m = larger(a.m, b.m), none = -A(INFINITY);
  // exp(-inf - -inf) would be NaN; a piece whose m is -inf has sums of 0, or of NaN, which times 1 stay.
  const A da = a.m == none ? 0 : a.m - m, db = b.m == none ? 0 : b.m - m;
  const A fa = exp_of(da), fb = exp_of(db);
  if constexpr (kExtra) {
    a.sum_x = (a.sum_x + da * a.sum) * fa + (b.sum_x + db * b.sum) * fb;
    a.sum_sq = a.sum_sq * fa * fa + b.sum_sq * fb * fb;
    a.sum_z += b.sum_z;
    a.top_before = larger(a.top_before, b.top_before);
  }
  a.sum = a.sum * fa + b.sum * fb;
  a.m = m;
  // The label's logit is in at most one piece. NaN == -inf is false, so a NaN label stays, too.
  if (a.z_label == none) a.z_label = b.z_label;
}

template <class A, bool kExtra>
__device__ __forceinline__ Piece<A> shuffled(const Piece<A>& p, int lanes) {
  Piece<A> q = p;
  q.m = __shfl_xor_sync(kAll, p.m, lanes);
  q.sum = __shfl_xor_sync(kAll, p.sum, lanes);
  q.z_label = __shfl_xor_sync(kAll, p.z_label, lanes);
  if constexpr (kExtra) {
    q.sum_x = __shfl_xor_sync(kAll, p.sum_x, lanes);
    q.sum_sq = __shfl_xor_sync(kAll, p.sum_sq, lanes);
    q.sum_z = __shfl_xor_sync(kAll, p.sum_z, lanes);
    q.top_before = __shfl_xor_sync(kAll, p.top_before, lanes);
  }
  return q;
}

template <class A>
__device__ __forceinline__ Piece<A> load_piece(const A* stats, int64_t n, int64_t row) {
  const A* s = stats + row;
  return {s[kM * n], s[kSum * n], s[kSumX * n], s[kSumSq * n], s[kSumZ * n], s[kTopBefore * n], s[kZLabel * n]};
}

template <class A>
__device__ __forceinline__ void store_piece(A* stats, int64_t n, int64_t row, const Piece<A>& p) {
  A* s = stats + row;
  s[kM * n] = p.m;
  s[kSum * n] = p.sum;
  s[kSumX * n] = p.sum_x;
  s[kSumSq * n] = p.sum_sq;
  s[kSumZ * n] = p.sum_z;
  s[kTopBefore * n] = p.top_before;
  s[kZLabel * n] = p.z_label;
}

template <bool kExtra, bool kPlain, class A, class T, int N>
__device__ __forceinline__ void add_elements(Piece<A>& p, const Transform<A>& transform, const A* bias, int label, int v,
                                             const T* x, std::integral_constant<int, N>) {
  const A none = -A(INFINITY);
  A z[N], top = none;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    z[i] = kPlain ? transform.scale * widen(x[i]) : transform(biased(widen(x[i]), bias, v + i));
    if constexpr (kExtra) {
      p.sum_z += z[i];
      if (v + i < label) p.top_before = larger(p.top_before, z[i]);
    }
  }
  if (unsigned(label - v) < unsigned(N)) {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (v + i == label) {
        p.z_label = z[i];
        z[i] = none;
      }
  }
#pragma unroll
  for (int i = 0; i < N; ++i) top = larger(top, z[i]);
  if (top > p.m) {
    const A d = p.m == none ? 0 : p.m - top, f = quick_exp(d);
    if constexpr (kExtra) {
      p.sum_x = (p.sum_x + d * p.sum) * f;
      p.sum_sq *= f * f;
    }
    p.sum *= f;
    p.m = top;
  }
  const A m = p.m == none ? 0 : p.m;  // all -inf so far: exp(-inf - 0) is 0, and a NaN stays one
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const A d = z[i] - m, e = quick_exp(d);
    p.sum += e;
    if constexpr (kExtra) {
      p.sum_x += e == 0 ? 0 : e * d;
      p.sum_sq += e * e;
    }
  }
}

template <class T, bool kExtra, bool kPlain>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<T>)
    logprob_fold_kernel(const FoldArgs a, const Transform<acc_t<T>> transform) {
  using A = acc_t<T>;
  DPOFAST_SHARED(Piece<A>, warps, kWarps);
  const A* bias = static_cast<const A*>(a.bias);
  const int64_t jobs = a.n * a.splits;
  for (int64_t job = blockIdx.x; job < jobs; job += gridDim.x) {
    const int64_t row = job / a.splits, split = job - row * a.splits;
    const int64_t begin = split * a.split_width, end = begin + a.split_width < a.width ? begin + a.split_width : a.width;
    const T* x = static_cast<const T*>(a.x) + (a.row_offsets ? a.row_offsets[row] : row * a.ld);
    const int64_t at = a.labels[row] - a.v0;
    const int label = at < 0 ? -1 : at < a.width ? int(at) : int(a.width);  // before this tile, in it or after it
    Piece<A> p = empty_piece<A>();
    for_vectors<16 / int(sizeof(T))>(x, int(begin), int(end), [&](int v, auto count, const T* some) {
      add_elements<kExtra, kPlain>(p, transform, bias, label, v, some, count);
    });
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      const Piece<A> other = shuffled<A, kExtra>(p, lanes);
      merge_pieces<A, kExtra>(p, other);
    }
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = p;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int w = 1; w < kWarps; ++w) merge_pieces<A, kExtra>(p, warps[w]);
      A* stats = static_cast<A*>(a.splits > 1 ? a.partials : a.stats);
      if (a.splits > 1) {
        store_piece(stats + split * kStats * a.n, a.n, row, p);
      } else {
        Piece<A> total = load_piece(stats, a.n, row);
        merge_pieces<A, kExtra>(total, p);
        store_piece(stats, a.n, row, total);
      }
    }
    __syncthreads();  // `warps` is written again for the next row
  }
}

// Adds the partials of each row to its running statistics, in order.
template <class A, bool kExtra>
__global__ void __launch_bounds__(kThreads) logprob_merge_kernel(const FoldArgs a) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= a.n) return;
  Piece<A> total = load_piece(static_cast<const A*>(a.stats), a.n, row);
  for (int64_t split = 0; split < a.splits; ++split)
    merge_pieces<A, kExtra>(total, load_piece(static_cast<const A*>(a.partials) + split * kStats * a.n, a.n, row));
  store_piece(static_cast<A*>(a.stats), a.n, row, total);
}

}  // namespace dpofast::cuda
