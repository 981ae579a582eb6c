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
  auto put = [&](void* to, int64_t i, double x) {
    if (to) static_cast<A*>(to)[i] = A(x);
  };
  put(a.logps, row, r.logp);
  put(a.lse, 2 * row, r.z_max);
  put(a.lse, 2 * row + 1, r.log_sum);
  put(a.entropy, row, r.entropy);
  put(a.log_sum_sq_probs, row, r.log_sum_sq_probs);
  put(a.mean_logits, row, valid ? r.mean_logits : double(NAN));
  if (a.is_top1) a.is_top1[row] = r.is_top1;
}

}  // namespace dpofast::cuda
