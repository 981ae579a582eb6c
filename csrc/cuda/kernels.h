// What the CUDA kernels take, and their launchers: for the bindings and the emulator. Needs no CUDA header.
//
// Pointers are the device's. "acc" is the accumulator's type: double for fp64 logits, else float.
#pragma once
#include <cstdint>

#include "core/softmax.h"
#include "core/types.h"

namespace dpofast::cuda {

// A tile of logits, or whole rows of them, and how blocks share it.
struct TileArgs {
  const void* x;               // [n, width]: row i starts at x + (row_offsets ? row_offsets[i] : i * ld)
  const int64_t* row_offsets;  // [n] or null, in elements
  int64_t ld, n, width;
  int64_t v0;                                // vocabulary number of the first column
  const void* bias;                          // [width] of acc, or null
  const int64_t* labels;                     // [n]
  double temperature, logit_scale, softcap;  // softcap 0: none
  int64_t splits, split_width;               // a row is cut into `splits` splits of so many columns, a block each
};

// Whether z is logit_scale / temperature times the logit.
inline bool is_plain(const TileArgs& a) { return !a.bias && a.softcap == 0; }

struct FoldArgs : TileArgs {
  unsigned outputs;  // bits of Output
  void* stats;       // [kStats, n], read and written
  void* partials;    // [splits, kStats, n] where splits > 1
};

// A tile whose rows are a.ld apart, and the cache that keeps exp(z - shift) of it.
struct KeepArgs : TileArgs {
  bool folds;                // also folds the tile into stats, with splits 1; else stats has it
  void* stats;               // [kStats, n]
  const void* shift_before;  // [n] of acc: each row's shift up to this tile; null: this is the first
  void* shift;               // [n] of acc: from this tile on; not shift_before
  void* out;                 // the cache's first row, at vocabulary number 0
  int64_t out_ld;
};

struct SealArgs {
  const void* stats;        // [kStats, n]
  const void *lse, *shift;  // [n, 2] and [n] of acc
  const int64_t* labels;
  int64_t n, width;  // tokens, and columns of the cache
  double temperature, logit_scale, softcap;
  void* factor;  // [n] of acc
  void* out;     // [n, width], the cache
  int64_t out_ld;
};

// out[out_rows[i]] = x[x_rows[i]] * first[i] * second[i], rounded once; no rows: those in order; no factors: 1.
struct ScaleArgs {
  const void* x;
  const int64_t* x_rows;
  int64_t x_ld;
  const void *first, *second;  // [n] of acc, which is double where x or out is
  void* out;
  const int64_t* out_rows;
  int64_t out_ld, n, width;
};

struct GradArgs : TileArgs {
  // Per row, of acc; null: see each.
  const void *logps, *lse;   // [n], and [n, 2]: z_max and log_sum
  const void* grad_logps;    // null: 0 for every row
  const void* entropy;       // needed with grad_entropy
  const void* grad_entropy;  // null: none
  void* out;                 // as x, of x's type or of a 16-bit one; may be x
  const int64_t* out_offsets;
  int64_t out_ld;
};

struct FinishArgs : Results {
  const void* stats;      // [kStats, n]
  const int64_t* labels;  // [n]; one outside [0, v) makes every result of its row NaN, or false
  int64_t n, v;
};

// The losses that a pair decides alone, and their names in dpofast/losses.py.
enum class PairLoss : int {
  sigmoid,
  hinge,
  ipo,
  exo_pair,
  nca_pair,
  robust,
  bco_pair,
  sppo_hard,
  apo_zero,
  apo_down,
  discopop,
  sigmoid_norm,
  sft_norm,
  simpo,
  alphapo,
  cpo,
  dpop,
  cal_dpo,
};
constexpr const char* kPairLosses[] = {
    "sigmoid",  "hinge",    "ipo",          "exo_pair", "nca_pair", "robust",  "bco_pair", "sppo_hard", "apo_zero",
    "apo_down", "discopop", "sigmoid_norm", "sft_norm", "simpo",    "alphapo", "cpo",      "dpop",      "cal_dpo",
};
static_assert(sizeof kPairLosses / sizeof *kPairLosses == size_t(PairLoss::cal_dpo) + 1, "one name a loss");

// In the order of F_DIVERGENCES in dpofast/losses.py.
enum class FDivergence : int { reverse_kl, forward_kl, js_divergence, alpha_divergence };

// A loss reads those that dpofast/losses.py defines for it; a margin or label_smoothing that it defines may be 0.
struct PairOptions {
  double beta, margin, label_smoothing, discopop_tau, simpo_gamma, alphapo_alpha, dpop_lambda;
  FDivergence f_divergence;
  double f_alpha_divergence_coef;
};

// A batch of 2 `pairs` sequences, all chosen ones and then all rejected ones.
struct SequenceDpoArgs {
  const void* logps;          // of acc; sequence i holds tokens cu_seqlens[i] .. cu_seqlens[i + 1), or `width` tokens
  const int64_t* cu_seqlens;  // [2 pairs + 1] or null
  const int64_t* labels;      // as logps; tokens with ignore_index do not count
  int64_t ignore_index, pairs, width;
  const void* ref_logps;  // [2 pairs] of acc, or null where the loss has no reference
  PairLoss loss;
  PairOptions options;
  // [pairs] of acc, or null: `options` has it for all pairs, and the weight is 1.
  const void *beta, *margin, *weight;
  void *losses, *sums;  // [pairs], times the weight, and [2 pairs], of acc
  int64_t* lengths;     // [2 pairs], tokens that count
  void* coefficients;   // as logps, of acc: d mean(losses) / d logps, 0 for tokens that do not count
};

// `x`, `out`: types of logits and of what is written in their stead. `stream` is a cudaStream_t.
void launch_logprob_fold(DType x, const FoldArgs&, void* stream);
void launch_logprob_keep(DType x, DType out, const KeepArgs&, void* stream);
void launch_logprob_seal(DType acc, DType out, const SealArgs&, void* stream);
void launch_scale_rows(DType x, DType out, const ScaleArgs&, void* stream);
void launch_logprob_grad(DType x, DType out, const GradArgs&, void* stream);
void launch_logprob_finish(DType acc, const FinishArgs&, void* stream);
void launch_sequence_dpo(DType acc, const SequenceDpoArgs&, void* stream);

}  // namespace dpofast::cuda
