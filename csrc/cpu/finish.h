// Makes the results of each row from the running statistics of the vocabulary's pieces. Compiled once, for
// the baseline instruction set: it touches n numbers, not n x v.
#pragma once
#include "cpu/kernels.h"

namespace dpofast::cpu {

// Arrays [pieces, stride]; those that no output needs are null.
template <class T>
struct Stats {
  T *m, *sum, *sum_x, *sum_sq, *sum_z, *top, *top_before;
  T* z_label;  // [stride]
  int64_t pieces, stride;
};

struct RowOutputs : Results {
  void* stats;  // [kStats, n]: the statistics themselves, for rows of which this is only a slice; or null
};

// Results go to rows first.. of `out`.
void finish_rows(const Stats<float>& stats, int64_t n, int64_t v, const RowOutputs& out, int64_t first = 0);
void finish_rows(const Stats<double>& stats, int64_t n, int64_t v, const RowOutputs& out, int64_t first = 0);

}  // namespace dpofast::cpu
