// logprob_grad: turns a tile of logits [n, width] into d loss / d logits, in place or into a 16-bit buffer; also whole
// rows of logits, wherever they start. One read, one write.
//
//   p = exp(z - z_max - log_sum)
//   g = dz/dx * (c (onehot - p) - d_entropy p (log p + entropy))        c: the incoming gradient of logps, d_entropy: of the
//   entropy
//
// At the label c (1 - p) is -c expm1(logp), so that nothing cancels for a confident token.
#pragma once
#include "cuda/device.h"
#include "cuda/kernels.h"

namespace dpofast::cuda {

// What a row's entries of g are made with.
template <class A, bool kPlain>
struct GradRow {
  A z_max, log_sum, c, d_entropy, entropy;

  // g of an entry that is not the label's, from its logit x. Plain: no bias, no softcap, and no gradient of the
  // entropy.
  __device__ __forceinline__ A value(A x, const Transform<A>& transform) const {
    if constexpr (kPlain) {
      return quick_exp(scaled_minus(x, transform.scale, z_max) - log_sum) * c;  // c: times -dz/dx
    } else {
      const A z = transform(x), log_p = z - z_max - log_sum;
      A f = c;
      // log p = -inf where p = 0: a large finite number in its place makes that entry 0 and not NaN
      if (d_entropy != 0) f += d_entropy * (fmax(log_p, A(kFloorLogp)) + entropy);
      return -quick_exp(log_p) * f * transform.slope(z);
    }
  }
};

template <class T, class G, bool kPlain>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<T>)
    logprob_grad_kernel(const GradArgs a, const Transform<acc_t<T>> transform) {
  using A = acc_t<T>;
  constexpr int kVec = 16 / int(sizeof(G) < sizeof(T) ? sizeof(G) : sizeof(T));
  auto at = [](const void* p, int64_t i) { return static_cast<const A*>(p)[i]; };
  const A* bias = static_cast<const A*>(a.bias);
  const int64_t jobs = a.n * a.splits;
  for (int64_t job = blockIdx.x; job < jobs; job += gridDim.x) {
    const int64_t row = job / a.splits, split = job - row * a.splits;
    const int64_t begin = split * a.split_width, end = begin + a.split_width < a.width ? begin + a.split_width : a.width;
    const T* x = static_cast<const T*>(a.x) + (a.row_offsets ? a.row_offsets[row] : row * a.ld);
    G* out = static_cast<G*>(a.out) + (a.out_offsets ? a.out_offsets[row] : row * a.out_ld);
    const int64_t place = a.labels[row] - a.v0;
    const int label = place >= 0 && place < a.width ? int(place) : -1;
    const A logp = at(a.logps, row), p_label = exp_of(logp), c = a.grad_logps ? at(a.grad_logps, row) : 0;
    GradRow<A, kPlain> r;
    r.z_max = at(a.lse, 2 * row);
    r.log_sum = at(a.lse, 2 * row + 1);
    r.c = kPlain ? -c * transform.scale : c;
    r.d_entropy = a.grad_entropy ? at(a.grad_entropy, row) : 0;
    r.entropy = a.grad_entropy ? at(a.entropy, row) : 0;
    A own = c * -expm1_of(logp);
    if (r.d_entropy != 0 && p_label > 0) own -= r.d_entropy * p_label * (logp + r.entropy);

    for_vectors<kVec>(x, int(begin), int(end), [&](int v, auto count, const T* some) {
      constexpr int N = decltype(count)::value;
      A g[N];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const A logit = widen(some[i]);
        g[i] = r.value(kPlain ? logit : biased(logit, bias, v + i), transform);
      }
      if (unsigned(label - v) < unsigned(N)) {
#pragma unroll
        for (int i = 0; i < N; ++i)
          if (v + i == label) {
            const A logit = widen(some[i]);
            g[i] = own * (kPlain ? transform.scale : transform.slope(transform(biased(logit, bias, v + i))));
          }
      }
      store_vector(g, out + v);
    });
  }
}

}  // namespace dpofast::cuda
