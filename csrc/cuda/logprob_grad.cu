// Which instance of logprob_grad runs.
#include "cuda/logprob_grad.cuh"

#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace dpofast::cuda {
namespace {

template <class T, class G>
void grad(const GradArgs& a, void* stream) {
  using A = acc_t<T>;
  const Transform<A> t = make_transform<A>(a.temperature, a.logit_scale, a.softcap);
  auto* const kernel = is_plain(a) && !a.grad_entropy ? &logprob_grad_kernel<T, G, true> : &logprob_grad_kernel<T, G, false>;
  launch("logprob_grad", a.n, a.width, stream, kernel, a.n * a.splits, a, t);
}

}  // namespace

void launch_logprob_grad(DType x, DType out, const GradArgs& a, void* stream) {
  if (x == DType::f32 && out == DType::f32) return grad<float, float>(a, stream);
  if (x == DType::f32 && out == DType::bf16) return grad<float, bf16>(a, stream);
  if (x == DType::f32 && out == DType::f16) return grad<float, f16>(a, stream);
  if (x == DType::f64 && out == DType::f64) return grad<double, double>(a, stream);
  if (x == DType::bf16 && out == DType::bf16) return grad<bf16, bf16>(a, stream);
  if (x == DType::f16 && out == DType::f16) return grad<f16, f16>(a, stream);
  throw std::invalid_argument("dpofast: logprob_grad writes the type of the logits, or 16 bits from fp32");
}

}  // namespace dpofast::cuda
