// finish.h, on top of the algebra of core/softmax.h.
#include "cpu/finish.h"

#include "core/softmax.h"

namespace dpofast::cpu {
namespace {

template <class T>
void finish(const Stats<T>& s, int64_t n, int64_t v, const RowOutputs& out) {
  auto at = [](const T* p, int64_t i) { return p ? p[i] : T(0); };
  auto low = [](const T* p, int64_t i) { return p ? p[i] : T(-INFINITY); };
  auto put = [](void* p, int64_t i, double x) {
    if (p) static_cast<T*>(p)[i] = T(x);
  };
  for (int64_t t = 0; t < n; ++t) {
    RowStats<double> row = empty_row<double>();
    for (int64_t piece = 0; piece < s.pieces; ++piece) {
      const int64_t i = piece * s.stride + t;
      merge_rows(row, RowStats<T>{s.m[i], s.sum[i], at(s.sum_x, i), at(s.sum_sq, i), at(s.sum_z, i), low(s.top, i),
                                  low(s.top_before, i)});
    }
    if (out.stats) {
      // m is only near the largest z; what is merged with others' says exactly which is the largest, where that is asked.
      merge_rows(row, RowStats<double>{row.top, 0, 0, 0, 0, row.top, row.top_before});
      const double values[kStats] = {row.m, row.sum, row.sum_x, row.sum_sq, row.sum_z, row.top_before, s.z_label[t]};
      for (int64_t i = 0; i < kStats; ++i) put(out.stats, i * n + t, values[i]);
      continue;
    }
    const RowResult r = finish_row(row, double(s.z_label[t]), double(v));
    put(out.logps, t, r.logp);
    put(out.lse, 2 * t, r.z_max);
    put(out.lse, 2 * t + 1, r.log_sum);
    put(out.entropy, t, r.entropy);
    put(out.log_sum_sq_probs, t, r.log_sum_sq_probs);
    put(out.mean_logits, t, r.mean_logits);
    if (out.is_top1) out.is_top1[t] = r.is_top1;
  }
}

}  // namespace

void finish_rows(const Stats<float>& stats, int64_t n, int64_t v, const RowOutputs& out) { finish(stats, n, v, out); }
void finish_rows(const Stats<double>& stats, int64_t n, int64_t v, const RowOutputs& out) { finish(stats, n, v, out); }

}  // namespace dpofast::cpu
