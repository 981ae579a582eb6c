// The CPU kernels as the rest of the library sees them: argument structs, one table of functions per
// instruction set, and the choice among the tables. Kernels allocate nothing: the caller asks for the
// workspace size first (workspace == nullptr) and passes a buffer of it.
#pragma once
#include "core/softmax.h"
#include "core/types.h"

namespace dpofast::cpu {

// hidden [n, h] (rows gathered by offset), weight [v, h], labels [n]; n counts completion tokens only.
struct Problem {
  int64_t n, h, v;
  const void* hidden;
  DType hidden_dtype;
  const int64_t* token_offsets;  // [n], in elements from `hidden`
  int64_t hidden_col_stride;
  const void* weight;
  DType weight_dtype;
  int64_t weight_row_stride, weight_col_stride;
  const void* bias;       // [v] in the accumulator's type, or null
  const int64_t* labels;  // [n]; not in [0, v) where the weight is a slice of a vocabulary and the label's row elsewhere
  double temperature, logit_scale, softcap;  // softcap 0: none
  int64_t block;                             // vocabulary rows per block; a multiple of 2 (cpu/head_layout.h)
  int threads;
};

// Results are in the accumulator's type (fp32; fp64 when an input is fp64). The two parts of lse added up would lose
// what tells the p of a row apart when logits share an offset.
struct ForwardArgs : Results {
  Problem problem;
  unsigned outputs;
  void* stats;                    // [kStats, n], in place of all of the above: of a slice of the vocabulary; or null
  void* cache;                    // exp(z - m) of as many blocks as fit, for the backward; or null
  void* jacobian;                 // d logps / d hidden, in panels; or null
  int64_t cache_bytes;            // of either
  double grad_filter, tolerance;  // with a cache: what the backward may leave out (cpu/head_filter.h); 0: nothing
  void* dropped_mass;             // [n], with grad_filter; or null
  void* workspace;
};

struct BackwardArgs {
  Problem problem;
  const void *logps, *lse, *entropy;      // from the forward; entropy only with grad_entropy
  const void *grad_logps, *grad_entropy;  // [n]; grad_entropy may be null
  const void* cache;                      // what the forward left there, or null
  const void* jacobian;                   // not null: grad_hidden is a row scaling of it
  int64_t cache_bytes;                    // of either
  double grad_filter;                     // as the forward had it
  void* grad_hidden;                      // contiguous rows; or null
  DType grad_hidden_dtype;
  const int64_t* grad_positions;  // [n] row numbers in grad_hidden
  void* grad_weight;              // [v, h] contiguous; or null
  DType grad_weight_dtype;        // weight's, or the accumulator's
  void* grad_bias;                // accumulator's type, [v]; or null
  bool adds;                      // to what is in grad_bias and in grad_weight, which then has the accumulator's type
  int64_t token_chunk;            // with grad_weight or grad_bias: tokens packed at a time; 0: all
  void* workspace;
};

// The op `logprob`: the same passes over logits that exist already. logits [n, v] gathered by offset, unit column stride.
struct LogitsArgs : Results {  // of the backward, what the forward left
  int64_t n, v;
  const void* logits;
  DType dtype;
  const int64_t* row_offsets;
  const int64_t* labels;
  double temperature, logit_scale, softcap;
  unsigned outputs;
  const void *grad_logps, *grad_entropy;  // backward only
  void* grad_logits;                      // backward only; logits' dtype; may be `logits` itself
  const int64_t* grad_offsets;            // backward only, [n]
  int threads;
};

// What sizes depend on, for a plan: vector and panel widths (tokens), k per dot-product step, bytes.
struct Traits {
  int64_t vector, panel, unit, elem_size, acc_size, cached_size;
};

// Flop/s of one thread: of a loop of independent multiply-adds, and of the micro-kernel on operands in the L1 and L2 caches.
struct Peak {
  double hardware, micro_kernel;
};
constexpr int64_t kPeakBytes = 1 << 20;  // of memory that `peak` works in, zeroed by the caller

struct Table {
  const char* name;
  int64_t (*forward)(const ForwardArgs&);    // bytes of workspace; -1: the jacobian is larger than cache_bytes
  int64_t (*backward)(const BackwardArgs&);  // likewise
  void (*logits_forward)(const LogitsArgs&);
  void (*logits_backward)(const LogitsArgs&);
  Traits (*traits)(DType hidden, DType weight);
  Peak (*peak)(DType hidden, DType weight, char* work);
};

constexpr int64_t kFilteredRows = 192;  // of a block, at most, with grad_filter: cpu/head_filter.h counts places in 16 bits

// Instruction sets that are compiled in and that this machine has, best first; ends with nullptr.
const Table* const* tables();
const Table* find(const char* name);  // nullptr if not available

extern const Table kScalar;
#if defined(__x86_64__)
extern const Table kAvx2, kAvx512, kAvx512Bf16;
#elif defined(__aarch64__)
extern const Table kNeon;
#endif

}  // namespace dpofast::cpu
