// finish.h, on top of the algebra of core/softmax.h.
#include "cpu/finish.h"

#include "core/softmax.h"

namespace dpofast::cpu {
namespace {

template <class T>
void finish(const Stats<T>& s, int64_t n, int64_t v, const RowOutputs& out, int64_t first) {
  auto at = [](const T* p, int64_t i) { return p ? p[i] : T(0); };
  auto low = [](const T* p, int64_t i) { return p ? p[i] : T(-INFINITY); };
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
      for (int64_t i = 0; i < kStats; ++i) static_cast<T*>(out.stats)[i * n + t] = T(values[i]);
      continue;
    }
    write_row<T>(out, first + t, finish_row(row, double(s.z_label[t]), double(v)));
  }
}

}  // namespace

void finish_rows(const Stats<float>& stats, int64_t n, int64_t v, const RowOutputs& out, int64_t first) {
  finish(stats, n, v, out, first);
}
void finish_rows(const Stats<double>& stats, int64_t n, int64_t v, const RowOutputs& out, int64_t first) {
  finish(stats, n, v, out, first);
}

}  // namespace dpofast::cpu
