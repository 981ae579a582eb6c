// logprob_finish: what the running statistics of each row amount to once its whole vocabulary is folded in. One thread
// a row, in double, with the algebra that the CPU uses (core/softmax.h).
#pragma once
#include "core/softmax.h"
#include "cuda/logprob_fold.cuh"

namespace dpofast::cuda {

template <class A>
__global__ void __launch_bounds__(kThreads) logprob_finish_kernel(const FinishArgs a) {
  const int64_t row = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= a.n) return;
  const Piece<A> p = load_piece(static_cast<const A*>(a.stats), a.n, row);
  const RowStats<double> s = {p.m, p.sum, p.sum_x, p.sum_sq, p.sum_z, p.m, p.top_before};
  const bool valid = a.labels[row] >= 0 && a.labels[row] < a.v;
  const RowResult r = finish_row(s, valid ? double(p.z_label) : double(NAN), double(a.v));
  write_row<A>(a, row, r);
}

}  // namespace dpofast::cuda
