#include "cuda/scale_rows.cuh"

#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace dpofast::cuda {
namespace {

template <class T, class G, class A>
void scale(const ScaleArgs& a, void* stream) {
  launch("scale_rows", a.n, a.width, stream, &scale_rows_kernel<T, G, A>, a.n, a);
}

// Where an operand or a result is fp64, so is the accumulator.
template <class T>
void from(DType out, const ScaleArgs& a, void* stream) {
  switch (out) {
    case DType::f32: return scale<T, float, float>(a, stream);
    case DType::bf16: return scale<T, bf16, float>(a, stream);
    case DType::f16: return scale<T, f16, float>(a, stream);
    case DType::f64: return scale<T, double, double>(a, stream);
  }
}

void from_double(DType out, const ScaleArgs& a, void* stream) {
  switch (out) {
    case DType::f32: return scale<double, float, double>(a, stream);
    case DType::bf16: return scale<double, bf16, double>(a, stream);
    case DType::f16: return scale<double, f16, double>(a, stream);
    case DType::f64: return scale<double, double, double>(a, stream);
  }
}

}  // namespace

void launch_scale_rows(DType x, DType out, const ScaleArgs& a, void* stream) {
  switch (x) {
    case DType::f32: return from<float>(out, a, stream);
    case DType::bf16: return from<bf16>(out, a, stream);
    case DType::f16: return from<f16>(out, a, stream);
    case DType::f64: return from_double(out, a, stream);
  }
}

}  // namespace dpofast::cuda
