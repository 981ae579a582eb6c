// sequence_dpo: from per-token log-probs to the loss of each pair and its gradient by every token, in one launch. One
// block a pair: it sums both completions, one thread evaluates the loss, and all write the tokens' coefficients.
//
// Sums and losses are double, whatever the tokens are: they are a few operations, and the summed log-probs of two long
// completions differ by little. A sum's order is that of its sequence's tokens, wherever the batch has them. The losses
// are those of dpofast/losses.py that a pair decides alone, and tests/backends/test_sequence_dpo.py holds them to that table.
#pragma once
#include "cuda/device.h"
#include "cuda/kernels.h"

namespace dpofast::cuda {

constexpr double kMaxExponent = 80;  // where losses.py cuts an f-divergence's exponent

// A loss, and its derivatives by what it compares of the chosen and of the rejected completion.
struct PairGrad {
  double loss, chosen, rejected;
};

// What a loss compares of a completion, and its derivative by the completion's summed log-prob.
struct Compared {
  double value, derivative;
};

// -log sigmoid(-x). Exact at both ends, and NaN stays NaN.
__device__ __forceinline__ double softplus(double x) { return fmax(x, 0.0) + log1p(exp(-fabs(x))); }

// Full relative precision at both ends: 1 - sigmoid(x) is never formed, sigmoid(-x) is.
__device__ __forceinline__ double sigmoid(double x) {
  const double e = exp(-fabs(x)), s = 1 / (1 + e);
  return x < 0 ? e * s : s;
}

__device__ __forceinline__ double sigmoid_derivative(double x) { return sigmoid(x) * sigmoid(-x); }

// A derivative that has vanished wins over a factor that has overflowed.
__device__ __forceinline__ double chain(double outer, double inner) { return outer == 0 ? 0 : outer * inner; }

// A loss f of x = scale (w - l) - shift, given f(x) and f'(x).
__device__ __forceinline__ PairGrad of_difference(double f, double derivative, double scale) {
  return {f, scale * derivative, -scale * derivative};
}

// -(1 - eps) log sigmoid(x) - eps log sigmoid(-x)
__device__ __forceinline__ PairGrad logistic(double x, double scale, double eps) {
  if (eps == 0) return of_difference(softplus(-x), -sigmoid(-x), scale);
  return of_difference((1 - eps) * softplus(-x) + eps * softplus(x), eps * sigmoid(x) - (1 - eps) * sigmoid(-x), scale);
}

// The losses. w and l are what `compared` says, of the chosen and of the rejected completion.

// logistic(beta (w - l) - margin)
__device__ __forceinline__ PairGrad sigmoid_loss(double w, double l, const PairOptions& o) {
  return logistic(o.beta * (w - l) - o.margin, o.beta, o.label_smoothing);
}

// max(0, 1 + margin - beta (w - l))
__device__ __forceinline__ PairGrad hinge_loss(double w, double l, const PairOptions& o) {
  const double x = 1 + o.margin - o.beta * (w - l);
  return x <= 0 ? PairGrad{0, 0, 0} : PairGrad{x, -o.beta, o.beta};  // so that NaN stays NaN
}

// (w - l - 1 / (2 beta))^2
__device__ __forceinline__ PairGrad ipo_loss(double w, double l, const PairOptions& o) {
  const double x = w - l - 1 / (2 * o.beta);
  return of_difference(x * x, 2 * x, 1);
}

// p (log p - log(1 - eps)) + q (log q - log eps), p = sigmoid(x), q = 1 - p, x = beta (w - l); and d/dx = p q (...)
__device__ __forceinline__ PairGrad exo_pair_loss(double w, double l, const PairOptions& o) {
  const double x = o.beta * (w - l), eps = o.label_smoothing;
  const double chosen = -softplus(-x) - log1p(-eps), rejected = -softplus(x) - log(eps);
  return of_difference(sigmoid(x) * chosen + sigmoid(-x) * rejected, sigmoid_derivative(x) * (chosen - rejected), o.beta);
}

// -log sigmoid(beta w) - (log sigmoid(-beta w) + log sigmoid(-beta l)) / 2
__device__ __forceinline__ PairGrad nca_pair_loss(double w, double l, const PairOptions& o) {
  const double c = o.beta * w, r = o.beta * l;
  return {softplus(-c) + 0.5 * (softplus(c) + softplus(r)), o.beta * (0.5 * sigmoid(c) - sigmoid(-c)),
          0.5 * o.beta * sigmoid(r)};
}

// (-(1 - eps) log sigmoid(x) + eps log sigmoid(-x)) / (1 - 2 eps), x = beta (w - l)
__device__ __forceinline__ PairGrad robust_loss(double w, double l, const PairOptions& o) {
  const double x = o.beta * (w - l), eps = o.label_smoothing, scale = 1 / (1 - 2 * eps);
  return of_difference(scale * ((1 - eps) * softplus(-x) - eps * softplus(x)),
                       -scale * ((1 - eps) * sigmoid(-x) + eps * sigmoid(x)), o.beta);
}

// -log sigmoid(beta w) - log sigmoid(-beta l)
__device__ __forceinline__ PairGrad bco_pair_loss(double w, double l, const PairOptions& o) {
  const double c = o.beta * w, r = o.beta * l;
  return {softplus(-c) + softplus(r), -o.beta * sigmoid(-c), o.beta * sigmoid(r)};
}

// (w - 1 / (2 beta))^2 + (l + 1 / (2 beta))^2
__device__ __forceinline__ PairGrad sppo_hard_loss(double w, double l, const PairOptions& o) {
  const double c = w - 0.5 / o.beta, r = l + 0.5 / o.beta;
  return {c * c + r * r, 2 * c, 2 * r};
}

// sigmoid(-beta w) + sigmoid(beta l)
__device__ __forceinline__ PairGrad apo_zero_loss(double w, double l, const PairOptions& o) {
  const double c = o.beta * w, r = o.beta * l;
  return {sigmoid(-c) + sigmoid(r), -o.beta * sigmoid_derivative(c), o.beta * sigmoid_derivative(r)};
}

// sigmoid(beta w) + sigmoid(-beta (w - l))
__device__ __forceinline__ PairGrad apo_down_loss(double w, double l, const PairOptions& o) {
  const double c = o.beta * w, x = o.beta * (w - l);
  return {sigmoid(c) + sigmoid(-x), o.beta * (sigmoid_derivative(c) - sigmoid_derivative(x)), o.beta * sigmoid_derivative(x)};
}

// -log sigmoid(x) sigmoid(-x / tau) + exp(log sigmoid(x / tau) - x), x = beta (w - l)
__device__ __forceinline__ PairGrad discopop_loss(double w, double l, const PairOptions& o) {
  const double x = o.beta * (w - l), tau = o.discopop_tau, y = x / tau;
  const double logistic = softplus(-x), exponential = exp(-softplus(-y) - x);
  const double derivative = exponential * (sigmoid(-y) / tau - 1) - sigmoid(-x) * sigmoid(-y);
  return of_difference(logistic * sigmoid(-y) + exponential, derivative - logistic * sigmoid_derivative(y) / tau, o.beta);
}

// -w
__device__ __forceinline__ PairGrad sft_norm_loss(double w) { return {-w, -1, 0}; }

// logistic(beta (w - l) - gamma - margin), for simpo and alphapo
__device__ __forceinline__ PairGrad simpo_loss(double w, double l, const PairOptions& o) {
  return logistic(o.beta * (w - l) - o.simpo_gamma - o.margin, o.beta, o.label_smoothing);
}

// -log sigmoid(beta (w - l - lambda max(0, -w)))
__device__ __forceinline__ PairGrad dpop_loss(double w, double l, const PairOptions& o) {
  const double penalty = w < 0 ? o.dpop_lambda : 0;
  const double x = o.beta * (w - l + penalty * w), derivative = -o.beta * sigmoid(-x);
  return {softplus(-x), derivative * (1 + penalty), -derivative};
}

// -log sigmoid(w - l) + sppo_hard
__device__ __forceinline__ PairGrad cal_dpo_loss(double w, double l, const PairOptions& o) {
  const PairGrad ranking = logistic(w - l, 1, 0), calibration = sppo_hard_loss(w, l, o);
  return {ranking.loss + calibration.loss, ranking.chosen + calibration.chosen, ranking.rejected + calibration.rejected};
}

__device__ __forceinline__ PairGrad pair_loss(PairLoss loss, double w, double l, const PairOptions& o) {
  switch (loss) {
    case PairLoss::sigmoid:
    case PairLoss::sigmoid_norm:
    case PairLoss::cpo: return sigmoid_loss(w, l, o);
    case PairLoss::hinge: return hinge_loss(w, l, o);
    case PairLoss::ipo: return ipo_loss(w, l, o);
    case PairLoss::exo_pair: return exo_pair_loss(w, l, o);
    case PairLoss::nca_pair: return nca_pair_loss(w, l, o);
    case PairLoss::robust: return robust_loss(w, l, o);
    case PairLoss::bco_pair: return bco_pair_loss(w, l, o);
    case PairLoss::sppo_hard: return sppo_hard_loss(w, l, o);
    case PairLoss::apo_zero: return apo_zero_loss(w, l, o);
    case PairLoss::apo_down: return apo_down_loss(w, l, o);
    case PairLoss::discopop: return discopop_loss(w, l, o);
    case PairLoss::sft_norm: return sft_norm_loss(w);
    case PairLoss::simpo:
    case PairLoss::alphapo: return simpo_loss(w, l, o);
    case PairLoss::dpop: return dpop_loss(w, l, o);
    case PairLoss::cal_dpo: return cal_dpo_loss(w, l, o);
  }
  return {};
}

// f'(exp(r)) of f-DPO, arXiv:2309.16240 table 1: with e = exp((alpha - 1) r), (e - 1) / (alpha - 1).
__device__ __forceinline__ Compared score(double r, const PairOptions& o) {
  if (o.f_divergence == FDivergence::js_divergence) return {log(2.0) - softplus(-r), sigmoid(-r)};
  // forward_kl is alpha = 0, and reverse_kl the limit at 1
  const double power = (o.f_divergence == FDivergence::forward_kl ? 0 : o.f_alpha_divergence_coef) - 1;
  if (o.f_divergence == FDivergence::reverse_kl || fabs(power) < 1e-6) return {r, 1};
  const double exponent = power * r;
  if (exponent > kMaxExponent) return {expm1(kMaxExponent) / power, 0};
  return {expm1(exponent) / power, exp(exponent)};
}

__device__ __forceinline__ Compared per_token(const Compared& x, double length) {
  return {x.value / length, x.derivative / length};
}

// What `loss` compares of a completion with `tokens` tokens, and ref = 0 where there is no reference.
__device__ __forceinline__ Compared compared(PairLoss loss, double logp, double ref, int64_t tokens, const PairOptions& o) {
  const double length = tokens > 1 ? double(tokens) : 1;
  switch (loss) {
    case PairLoss::sigmoid:
    case PairLoss::hinge:
    case PairLoss::exo_pair:
    case PairLoss::robust:
    case PairLoss::discopop: return score(logp - ref, o);
    case PairLoss::ipo:
    case PairLoss::sigmoid_norm: return per_token(score(logp - ref, o), length);
    case PairLoss::nca_pair:
    case PairLoss::bco_pair:
    case PairLoss::sppo_hard:
    case PairLoss::apo_zero:
    case PairLoss::apo_down:
    case PairLoss::dpop:
    case PairLoss::cal_dpo: return {logp - ref, 1};
    case PairLoss::cpo: return {logp, 1};
    case PairLoss::simpo:
    case PairLoss::sft_norm: return per_token({logp, 1}, length);
    case PairLoss::alphapo: {  // (1 - exp(-alpha a)) / alpha, a = logp / length
      const double exponent = -o.alphapo_alpha * (logp / length);
      return {-expm1(exponent) / o.alphapo_alpha, exp(exponent) / length};
    }
  }
  return {};
}

// The sums of both completions of a pair.
struct PairSums {
  double logps[2];
  int64_t tokens[2];
};

__device__ __forceinline__ void add(PairSums& a, const PairSums& b) {
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    a.logps[side] += b.logps[side];
    a.tokens[side] += b.tokens[side];
  }
}

__device__ __forceinline__ PairSums shuffled(const PairSums& s, int lanes) {
  PairSums other;
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    other.logps[side] = __shfl_xor_sync(kAll, s.logps[side], lanes);
    other.tokens[side] = __shfl_xor_sync(kAll, s.tokens[side], lanes);
  }
  return other;
}

__device__ __forceinline__ bool counts(const SequenceDpoArgs& a, int64_t token) { return a.labels[token] != a.ignore_index; }

// visit(token) for the tokens of one sequence that are this thread's
template <class F>
__device__ __forceinline__ void for_tokens(const SequenceDpoArgs& a, int64_t sequence, const F& visit) {
  const int64_t begin = a.cu_seqlens ? a.cu_seqlens[sequence] : sequence * a.width;
  const int64_t end = a.cu_seqlens ? a.cu_seqlens[sequence + 1] : begin + a.width;
  for (int64_t token = begin + threadIdx.x; token < end; token += kThreads) visit(token);
}

template <class T>
__device__ __forceinline__ double element(const void* x, int64_t i, double otherwise) {
  return x ? double(static_cast<const T*>(x)[i]) : otherwise;
}

// Two blocks a multiprocessor leave a thread 128 registers; left to itself nvcc takes 64 and spills on sm_86 and sm_89.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) sequence_dpo_kernel(const SequenceDpoArgs a) {
  DPOFAST_SHARED(PairSums, warps, kWarps);
  DPOFAST_SHARED(T, coefficients, 2);
  const T* const logps = static_cast<const T*>(a.logps);
  const int64_t pair = blockIdx.x;
  PairSums sums = {};
#pragma unroll
  for (int side = 0; side < 2; ++side)
    for_tokens(a, pair + side * a.pairs, [&](int64_t token) {
      if (!counts(a, token)) return;
      sums.logps[side] += double(logps[token]);
      ++sums.tokens[side];
    });
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const PairSums other = shuffled(sums, lanes);
    add(sums, other);
  }
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sums;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kWarps; ++w) add(sums, warps[w]);
    PairOptions o = a.options;
    o.beta = element<T>(a.beta, pair, o.beta);
    o.margin = element<T>(a.margin, pair, o.margin);
    Compared of[2];
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int64_t sequence = pair + side * a.pairs;
      const double ref = element<T>(a.ref_logps, sequence, 0);
      of[side] = compared(a.loss, sums.logps[side], ref, sums.tokens[side], o);
      static_cast<T*>(a.sums)[sequence] = T(sums.logps[side]);
      a.lengths[sequence] = sums.tokens[side];
    }
    const PairGrad grad = pair_loss(a.loss, of[0].value, of[1].value, o);
    const double weight = element<T>(a.weight, pair, 1), share = weight / double(a.pairs);  // of the batch's mean
    static_cast<T*>(a.losses)[pair] = T(weight * grad.loss);
    coefficients[0] = T(share * chain(grad.chosen, of[0].derivative));
    coefficients[1] = T(share * chain(grad.rejected, of[1].derivative));
  }
  __syncthreads();
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    const T coefficient = coefficients[side];
    for_tokens(a, pair + side * a.pairs,
               [&](int64_t token) { static_cast<T*>(a.coefficients)[token] = counts(a, token) ? coefficient : T(0); });
  }
}

}  // namespace dpofast::cuda
