// Which instance of scale_rows runs.
#include "cuda/scale_rows.cuh"

#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace dpofast::cuda {
namespace {

template <class T, class G>
void scale(const ScaleArgs& a, void* stream) {
  using A = std::conditional_t<std::is_same<T, double>::value, double, acc_t<G>>;
  launch("scale_rows", a.n, a.width, stream, &scale_rows_kernel<T, G, A>, a.n, a);
}

template <class T>
void from(DType out, const ScaleArgs& a, void* stream) {
  switch (out) {
    case DType::f32: return scale<T, float>(a, stream);
    case DType::f64: return scale<T, double>(a, stream);
    case DType::bf16: return scale<T, bf16>(a, stream);
    case DType::f16: return scale<T, f16>(a, stream);
  }
}

}  // namespace

void launch_scale_rows(DType x, DType out, const ScaleArgs& a, void* stream) {
  switch (x) {
    case DType::f32: return from<float>(out, a, stream);
    case DType::f64: return from<double>(out, a, stream);
    case DType::bf16: return from<bf16>(out, a, stream);
    case DType::f16: return from<f16>(out, a, stream);
  }
}

}  // namespace dpofast::cuda
