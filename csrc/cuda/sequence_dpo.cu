// Which instance of sequence_dpo runs.
#include "cuda/sequence_dpo.cuh"

#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace dpofast::cuda {

void launch_sequence_dpo(DType acc, const SequenceDpoArgs& a, void* stream) {
  if (a.pairs > kMaxBlocks) throw std::invalid_argument("dpofast: sequence_dpo takes at most 2^31 - 1 pairs");
  auto* const kernel = acc == DType::f64 ? &sequence_dpo_kernel<double> : &sequence_dpo_kernel<float>;
  launch("sequence_dpo", a.pairs, a.width, stream, kernel, a.pairs, a);
}

}  // namespace dpofast::cuda
