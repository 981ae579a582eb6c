// Which instance of logprob_finish runs.
#include "cuda/logprob_finish.cuh"

#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace dpofast::cuda {

void launch_logprob_finish(DType acc, const FinishArgs& a, void* stream) {
  auto* const kernel = acc == DType::f64 ? &logprob_finish_kernel<double> : &logprob_finish_kernel<float>;
  launch("logprob_finish", a.n, 1, stream, kernel, ceil_div(a.n, kThreads), a);
}

}  // namespace dpofast::cuda
