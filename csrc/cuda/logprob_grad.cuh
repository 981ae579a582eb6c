// logprob_grad: turns a tile of logits [n, width] into d loss / d logits, in place or into a 16-bit buffer; also whole
// rows of logits, wherever they start. One read, one write.
//
//   p = exp(z - z_max - log_sum)
//   g = dz/dx * (c (onehot - p) - e p (log p + entropy))        c, e: incoming gradients of logps and entropy
//
// At the label c (1 - p) is -c expm1(logp), so that nothing cancels for a confident token. Without labels and with
// c = -1 the same kernel writes dz/dx exp(z - z_max): what a forward keeps while log_sum is not known yet.
#pragma once
#include "cuda/device.h"
#include "cuda/kernels.h"

namespace dpofast::cuda {

template <class A>
struct GradRow {
  A z_max, log_sum, c, e, entropy, own;

  __device__ __forceinline__ A value(A z, A p) const {
    A f = c;
    // log p = -inf where p = 0: a large finite number in its place makes that entry 0 and not NaN
    if (e != 0) f += e * (fmax(z - z_max - log_sum, A(kFloorLogp)) + entropy);
    return -p * f;
  }
};

template <class T, class G>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<T>)
    logprob_grad_kernel(const GradArgs a, const Transform<acc_t<T>> transform) {
  using A = acc_t<T>;
  auto at = [](const void* p, int64_t i) { return static_cast<const A*>(p)[i]; };
  const A* bias = static_cast<const A*>(a.bias);
  const int64_t jobs = a.n * a.splits;
  for (int64_t job = blockIdx.x; job < jobs; job += gridDim.x) {
    const int64_t row = job / a.splits, split = job - row * a.splits;
    const int64_t begin = split * a.part, end = begin + a.part < a.width ? begin + a.part : a.width;
    const T* x = static_cast<const T*>(a.x) + (a.row_offsets ? a.row_offsets[row] : row * a.ld);
    G* out = static_cast<G*>(a.out) + (a.out_offsets ? a.out_offsets[row] : row * a.out_ld);
    const int64_t label = a.labels ? a.labels[row] - a.v0 : -1;
    GradRow<A> r;
    r.z_max = at(a.z_max, row * a.lse_stride);
    if (r.z_max == -A(INFINITY)) r.z_max = a.log_sum ? r.z_max : 0;
    r.log_sum = a.log_sum ? at(a.log_sum, row * a.lse_stride) : 0;
    r.c = a.grad_logps ? at(a.grad_logps, row) : A(a.grad_logps_value);
    r.e = a.grad_entropy ? at(a.grad_entropy, row) : 0;
    r.entropy = a.grad_entropy ? at(a.entropy, row) : 0;
    const A logp = a.labels ? at(a.logps, row) : 0, p_label = exp_of(logp);
    r.own = r.c * -expm1_of(logp);
    if (r.e != 0 && p_label > 0) r.own -= r.e * p_label * (logp + r.entropy);

    for_elements(x, begin, end, [&](int64_t v, auto count, const T* some) {
      constexpr int N = decltype(count)::value;
      struct alignas(N * sizeof(G) < 16 ? N * sizeof(G) : 16) Vec {
        G x[N];
      } g;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        A logit = widen(some[i]);
        if (bias) logit += bias[v + i];
        const A z = transform(logit), p = exp_of(z - r.z_max - r.log_sum);
        const A value = v + i == label ? r.own : r.value(z, p);
        narrow(value * transform.slope(z), g.x[i]);
      }
      // The output's rows may be aligned otherwise than the input's.
      if (N > 1 && reinterpret_cast<uintptr_t>(out + v) % sizeof(Vec) == 0) {
        *reinterpret_cast<Vec*>(out + v) = g;
      } else {
#pragma unroll
        for (int i = 0; i < N; ++i) out[v + i] = g.x[i];
      }
    });
  }
}

}  // namespace dpofast::cuda
