// Which instance of logprob_fold runs, and logprob_merge after it where rows are split.
#include "cuda/logprob_fold.cuh"

#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace dpofast::cuda {
namespace {

template <class T>
void fold(const FoldArgs& a, void* stream) {
  using A = acc_t<T>;
  const Transform<A> t = make_transform<A>(a.temperature, a.logit_scale, a.softcap);
  auto* const kernel = a.outputs     ? &logprob_fold_kernel<T, true, false>
                       : is_plain(a) ? &logprob_fold_kernel<T, false, true>
                                     : &logprob_fold_kernel<T, false, false>;
  launch("logprob_fold", a.n, a.width, stream, kernel, a.n * a.splits, a, t);
  if (a.splits <= 1) return;
  auto* const merge = a.outputs ? &logprob_merge_kernel<A, true> : &logprob_merge_kernel<A, false>;
  launch("logprob_merge", a.n, a.width, stream, merge, ceil_div(a.n, kThreads), a);
}

}  // namespace

void launch_logprob_fold(DType x, const FoldArgs& a, void* stream) {
  switch (x) {
    case DType::f32: return fold<float>(a, stream);
    case DType::f64: return fold<double>(a, stream);
    case DType::bf16: return fold<bf16>(a, stream);
    case DType::f16: return fold<f16>(a, stream);
  }
}

}  // namespace dpofast::cuda
