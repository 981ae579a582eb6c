// Which instances of logprob_keep and logprob_seal run.
#include "cuda/logprob_keep.cuh"

#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace dpofast::cuda {
namespace {

template <class T, class G, bool kPlain>
void keep(const KeepArgs& a, const Transform<acc_t<T>>& t, void* stream) {
  auto* const kernel = a.folds ? &logprob_keep_kernel<T, G, kPlain, true> : &logprob_keep_kernel<T, G, kPlain, false>;
  launch("logprob_keep", a.n, a.width, stream, kernel, a.n * a.splits, a, t);
}

template <class T, class G>
void keep(const KeepArgs& a, void* stream) {
  const auto t = make_transform<acc_t<T>>(a.temperature, a.logit_scale, a.softcap);
  is_plain(a) ? keep<T, G, true>(a, t, stream) : keep<T, G, false>(a, t, stream);
}

template <class A, class G>
void seal(const SealArgs& a, void* stream) {
  const auto t = make_transform<A>(a.temperature, a.logit_scale, a.softcap);
  launch("logprob_seal", a.n, a.width, stream, &logprob_seal_kernel<A, G>, ceil_div(a.n, kWarps), a, t);
}

}  // namespace

void launch_logprob_keep(DType x, DType out, const KeepArgs& a, void* stream) {
  if (a.folds && a.splits > 1) throw std::invalid_argument("dpofast: logprob_keep folds whole rows only");
  if (x == DType::f32 && out == DType::f32) return keep<float, float>(a, stream);
  if (x == DType::f32 && out == DType::bf16) return keep<float, bf16>(a, stream);
  if (x == DType::f32 && out == DType::f16) return keep<float, f16>(a, stream);
  if (x == DType::f64 && out == DType::f64) return keep<double, double>(a, stream);
  throw std::invalid_argument("dpofast: logprob_keep reads fp32 or fp64 and writes that or 16 bits from fp32");
}

void launch_logprob_seal(DType acc, DType out, const SealArgs& a, void* stream) {
  if (acc == DType::f64) return seal<double, double>(a, stream);
  if (out == DType::f32) return seal<float, float>(a, stream);
  if (out == DType::bf16) return seal<float, bf16>(a, stream);
  return seal<float, f16>(a, stream);
}

}  // namespace dpofast::cuda
