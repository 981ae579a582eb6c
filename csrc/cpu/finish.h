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

// Where the results go, those that are not null; the same fields as ForwardArgs and LogitsArgs.
struct RowOutputs {
  void *logps, *lse, *entropy, *log_sum_sq_probs, *mean_logits;
  uint8_t* is_top1;
  void* stats;  // [kStats, n]: the statistics themselves, for rows of which this is only a slice; or null
};

void finish_rows(const Stats<float>& stats, int64_t n, int64_t v, const RowOutputs& out);
void finish_rows(const Stats<double>& stats, int64_t n, int64_t v, const RowOutputs& out);

}  // namespace dpofast::cpu
