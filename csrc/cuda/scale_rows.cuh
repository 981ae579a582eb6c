// scale_rows: rows of a matrix times a number each, from rows that are picked and to rows that are picked, in any two
// types and rounded once: hidden's tokens times their gradients, and the sums of d hidden back to their places.
#pragma once
#include "cuda/device.h"
#include "cuda/kernels.h"

namespace dpofast::cuda {

// One block a row.
template <class T, class G, class A>
__global__ void __launch_bounds__(kThreads) scale_rows_kernel(const ScaleArgs a) {
  constexpr int kVec = 16 / int(sizeof(G) < sizeof(T) ? sizeof(G) : sizeof(T));
  for (int64_t row = blockIdx.x; row < a.n; row += gridDim.x) {
    const T* x = static_cast<const T*>(a.x) + (a.x_rows ? a.x_rows[row] : row) * a.x_ld;
    G* out = static_cast<G*>(a.out) + (a.out_rows ? a.out_rows[row] : row) * a.out_ld;
    A scale = 1;
    for (const void* factors : {a.first, a.second})
      if (factors) scale *= static_cast<const A*>(factors)[row];
    for_vectors<kVec>(x, 0, int(a.width), [&](int v, auto count, const T* some) {
      constexpr int N = decltype(count)::value;
      A y[N];
#pragma unroll
      for (int i = 0; i < N; ++i) y[i] = A(widen(some[i])) * scale;
      store_vector(y, out + v);
    });
  }
}

}  // namespace dpofast::cuda
