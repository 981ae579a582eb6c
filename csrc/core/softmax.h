// The algebra of an online softmax whose label entry is kept apart, for one row.
//
// Every backend streams the vocabulary past each token and folds all entries *but the label's* into
// `RowStats`. Keeping the label apart is what makes a confident token exact: log p = -softplus(d)
// with d = lse(others) - z_label has full relative precision even when p is within 1e-30 of 1, where
// z_label - lse(all) would be rounding noise, and so has 1 - p = -expm1(log p).
#pragma once
#include <cmath>

#include "core/types.h"

namespace dpofast {

// Statistics that a caller may ask for beside the log-probs: bits of `outputs`, with the names, and in the order, of
// STATISTICS in dpofast/reference.py. One that the numbers of a row determine is told of here and nowhere else in C++.
enum Output : unsigned { kEntropy = 1, kLogSumSqProbs = 2, kMeanLogits = 4, kIsTop1 = 8 };
constexpr const char* kOutputNames[] = {"entropy", "log_sum_sq_probs", "mean_logits", "is_top1"};
constexpr int kOutputs = sizeof kOutputNames / sizeof *kOutputNames;
constexpr unsigned kBoolean = kIsTop1;  // those stored as bytes; the others are numbers of the accumulator's type

DPOFAST_HD constexpr int place_of(Output output) {
  int place = 0;
  while (1u << place != unsigned(output)) ++place;
  return place;
}

// Where the results of n rows go, [n] each, but for lse [n, 2]: the largest z, and log sum exp(z - it). Null: not wanted.
struct Results {
  void *logps, *lse;
  void* statistics[kOutputs];

  void*& of(Output output) { return statistics[place_of(output)]; }
  const void* of(Output output) const { return statistics[place_of(output)]; }
};

// Over entries v != label.
template <class T>
struct RowStats {
  T m;           // a number near max z_v, that sums are relative to
  T sum;         // sum exp(z_v - m)
  T sum_x;       // sum exp(z_v - m) (z_v - m), for the entropy
  T sum_sq;      // sum exp(z_v - m)^2
  T sum_z;       // sum z_v over every v, the label included, for the mean
  T top;         // max z_v
  T top_before;  // max z_v over v < label
};

// What one row amounts to once every entry is folded in.
struct RowResult {
  double logp, z_max, log_sum;  // lse = z_max + log_sum
  double statistics[kOutputs];
};

template <class T>
DPOFAST_HD inline RowStats<T> empty_row() {
  const T inf = T(INFINITY);
  return {-inf, 0, 0, 0, 0, -inf, -inf};
}

// Folds b into a, in double so that the number of pieces does not show.
template <class T>
DPOFAST_HD inline void merge_rows(RowStats<double>& a, const RowStats<T>& b) {
  a.sum_z += double(b.sum_z);
  a.top = a.top > double(b.top) ? a.top : double(b.top);
  a.top_before = a.top_before > double(b.top_before) ? a.top_before : double(b.top_before);
  // An empty or all -inf piece adds nothing; written so that a NaN sum is not skipped.
  if (double(b.m) == -INFINITY && double(b.sum) == 0) return;
  const double m = a.m > double(b.m) ? a.m : double(b.m);
  const double fa = a.sum == 0 ? 0 : exp(a.m - m), fb = exp(double(b.m) - m);
  const double da = a.sum == 0 ? 0 : a.m - m, db = double(b.m) - m;
  a.sum_x = (a.sum_x + da * a.sum) * fa + (double(b.sum_x) + db * double(b.sum)) * fb;
  a.sum_sq = a.sum_sq * fa * fa + double(b.sum_sq) * fb * fb;
  a.sum = a.sum * fa + double(b.sum) * fb;
  a.m = m;
}

DPOFAST_HD inline RowResult finish_row(const RowStats<double>& s, double z_label, double n_vocab) {
  RowResult r;
  // +inf anywhere makes log_softmax NaN, as in PyTorch: inf - inf. So does -inf everywhere.
  const double d = z_label == INFINITY ? NAN : s.sum == 0 ? -INFINITY - z_label : s.m - z_label + log(s.sum);
  r.logp = d > 0 ? -(d + log1p(exp(-d))) : -log1p(exp(d));
  r.z_max = z_label > s.m ? z_label : s.m;
  r.log_sum = log(s.sum * exp(s.m - r.z_max) + exp(z_label - r.z_max));
  if (s.sum == 0) r.log_sum = z_label - r.z_max;
  const double to_z = s.m - r.z_max - r.log_sum;
  const double p = exp(r.logp), to_p = s.sum == 0 ? 0 : exp(to_z);
  const double others = s.sum == 0 ? 0 : to_p * (s.sum_x + s.sum * to_z);
  // Each term is >= 0, so nothing cancels; 0 log 0 is 0.
  r.statistics[place_of(kEntropy)] = -((p == 0 ? 0 : p * r.logp) + others);
  r.statistics[place_of(kLogSumSqProbs)] = log(to_p * to_p * s.sum_sq + p * p);
  // A label that is none has a z of NaN, and its row no result.
  r.statistics[place_of(kMeanLogits)] = z_label != z_label ? z_label : s.sum_z / n_vocab;
  r.statistics[place_of(kIsTop1)] = z_label >= s.top && z_label > s.top_before;
  return r;
}

// Writes what is wanted of one row, numbers as T.
template <class T>
DPOFAST_HD inline void write_row(const Results& out, int64_t row, const RowResult& r) {
  if (out.logps) static_cast<T*>(out.logps)[row] = T(r.logp);
  if (out.lse) static_cast<T*>(out.lse)[2 * row] = T(r.z_max), static_cast<T*>(out.lse)[2 * row + 1] = T(r.log_sum);
  for (int i = 0; i < kOutputs; ++i) {
    if (!out.statistics[i]) continue;
    if (kBoolean >> i & 1) static_cast<uint8_t*>(out.statistics[i])[row] = r.statistics[i] != 0;
    else static_cast<T*>(out.statistics[i])[row] = T(r.statistics[i]);
  }
}

}  // namespace dpofast
