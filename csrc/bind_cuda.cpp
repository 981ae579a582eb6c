// The CUDA launchers in Python. The emulator's module (tests/emu) is made of this file, too.
#include "bind_cuda.h"

#include <iterator>

#include "bind_args.h"
#include "cuda/kernels.h"

namespace dpofast {
namespace {

using namespace cuda;

void read_tile(Args& d, TileArgs& a) {
  a.x = d.pointer("x");
  a.row_offsets = d.pointer<int64_t>("row_offsets");
  a.ld = d.value<int64_t>("ld");
  a.n = d.value<int64_t>("n");
  a.width = d.value<int64_t>("width");
  a.v0 = d.value<int64_t>("v0");
  a.bias = d.pointer("bias");
  a.labels = d.pointer<int64_t>("labels");
  d.read_transform(a);
  a.splits = d.value<int64_t>("splits");
  a.split_width = d.value<int64_t>("split_width");
}

void logprob_fold(const py::dict& args) {
  Args d(args);
  FoldArgs a{};
  read_tile(d, a);
  a.outputs = d.value<unsigned>("outputs");
  a.stats = d.pointer("stats");
  a.partials = d.pointer("partials");
  const DType x = d.dtype("dtype");
  void* const on = d.pointer("stream");
  d.done();
  py::gil_scoped_release unlocked;
  launch_logprob_fold(x, a, on);
}

void logprob_keep(const py::dict& args) {
  Args d(args);
  KeepArgs a{};
  read_tile(d, a);
  a.folds = d.value<bool>("folds");
  a.stats = d.pointer("stats");
  a.shift_before = d.pointer("shift_before");
  a.shift = d.pointer("shift");
  a.out = d.pointer("out");
  a.out_ld = d.value<int64_t>("out_ld");
  const DType x = d.dtype("dtype"), out = d.dtype("out_dtype");
  void* const on = d.pointer("stream");
  d.done();
  py::gil_scoped_release unlocked;
  launch_logprob_keep(x, out, a, on);
}

void logprob_seal(const py::dict& args) {
  Args d(args);
  SealArgs a{};
  a.stats = d.pointer("stats");
  a.lse = d.pointer("lse");
  a.shift = d.pointer("shift");
  a.labels = d.pointer<int64_t>("labels");
  a.n = d.value<int64_t>("n");
  a.width = d.value<int64_t>("width");
  d.read_transform(a);
  a.factor = d.pointer("factor");
  a.out = d.pointer("out");
  a.out_ld = d.value<int64_t>("out_ld");
  const DType acc = d.dtype("dtype"), out = d.dtype("out_dtype");
  void* const on = d.pointer("stream");
  d.done();
  py::gil_scoped_release unlocked;
  launch_logprob_seal(acc, out, a, on);
}

void scale_rows(const py::dict& args) {
  Args d(args);
  ScaleArgs a{};
  a.x = d.pointer("x");
  a.x_rows = d.pointer<int64_t>("x_rows");
  a.x_ld = d.value<int64_t>("x_ld");
  a.first = d.pointer("first");
  a.second = d.pointer("second");
  a.out = d.pointer("out");
  a.out_rows = d.pointer<int64_t>("out_rows");
  a.out_ld = d.value<int64_t>("out_ld");
  a.n = d.value<int64_t>("n");
  a.width = d.value<int64_t>("width");
  const DType x = d.dtype("dtype"), out = d.dtype("out_dtype");
  void* const on = d.pointer("stream");
  d.done();
  py::gil_scoped_release unlocked;
  launch_scale_rows(x, out, a, on);
}

void logprob_grad(const py::dict& args) {
  Args d(args);
  GradArgs a{};
  read_tile(d, a);
  a.logps = d.pointer("logps");
  a.lse = d.pointer("lse");
  a.grad_logps = d.pointer("grad_logps");
  a.entropy = d.pointer("entropy");
  a.grad_entropy = d.pointer("grad_entropy");
  a.out = d.pointer("out");
  a.out_offsets = d.pointer<int64_t>("out_offsets");
  a.out_ld = d.value<int64_t>("out_ld");
  const DType x = d.dtype("dtype"), out = d.dtype("out_dtype");
  void* const on = d.pointer("stream");
  d.done();
  py::gil_scoped_release unlocked;
  launch_logprob_grad(x, out, a, on);
}

void logprob_finish(const py::dict& args) {
  Args d(args);
  FinishArgs a{};
  a.stats = d.pointer("stats");
  a.labels = d.pointer<int64_t>("labels");
  a.n = d.value<int64_t>("n");
  a.v = d.value<int64_t>("v");
  d.read_results(a);
  const DType acc = d.dtype("dtype");
  void* const on = d.pointer("stream");
  d.done();
  py::gil_scoped_release unlocked;
  launch_logprob_finish(acc, a, on);
}

template <class Name>
Name named(Args& d, const char* key, int count) {
  const int i = d.value<int>(key);
  if (i < 0 || i >= count) throw std::invalid_argument(std::string("dpofast._C: unknown ") + key);
  return Name(i);
}

void sequence_dpo(const py::dict& args) {
  Args d(args);
  SequenceDpoArgs a{};
  a.logps = d.pointer("logps");
  a.cu_seqlens = d.pointer<int64_t>("cu_seqlens");
  a.labels = d.pointer<int64_t>("labels");
  a.ignore_index = d.value<int64_t>("ignore_index");
  a.pairs = d.value<int64_t>("pairs");
  a.width = d.value<int64_t>("width");
  a.ref_logps = d.pointer("ref_logps");
  a.loss = named<PairLoss>(d, "loss", int(std::size(kPairLosses)));
  a.options.label_smoothing = d.value<double>("label_smoothing");
  a.options.discopop_tau = d.value<double>("discopop_tau");
  a.options.simpo_gamma = d.value<double>("simpo_gamma");
  a.options.alphapo_alpha = d.value<double>("alphapo_alpha");
  a.options.dpop_lambda = d.value<double>("dpop_lambda");
  a.options.f_divergence = named<FDivergence>(d, "f_divergence", int(FDivergence::alpha_divergence) + 1);
  a.options.f_alpha_divergence_coef = d.value<double>("f_alpha_divergence_coef");
  a.options.beta = d.value<double>("beta_value");
  a.options.margin = d.value<double>("margin_value");
  a.beta = d.pointer("beta");
  a.margin = d.pointer("margin");
  a.weight = d.pointer("weight");
  a.losses = d.pointer("losses");
  a.sums = d.pointer("sums");
  a.lengths = d.pointer<int64_t>("lengths");
  a.coefficients = d.pointer("coefficients");
  const DType acc = d.dtype("dtype");
  void* const on = d.pointer("stream");
  d.done();
  py::gil_scoped_release unlocked;
  launch_sequence_dpo(acc, a, on);
}

py::tuple pair_losses() {
  py::tuple names(std::size(kPairLosses));
  for (size_t i = 0; i < names.size(); ++i) names[i] = kPairLosses[i];
  return names;
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("cuda_logprob_fold", &logprob_fold, py::arg("args"), "folds a tile of logits into running statistics");
  m.def("cuda_logprob_keep", &logprob_keep, py::arg("args"), "keeps the exponentials of a tile of logits in the cache");
  m.def("cuda_logprob_seal", &logprob_seal, py::arg("args"), "completes rows of the cache");
  m.def("cuda_scale_rows", &scale_rows, py::arg("args"), "rows times a number each, picked and put");
  m.def("cuda_logprob_grad", &logprob_grad, py::arg("args"), "turns a tile of logits into its gradient");
  m.def("cuda_logprob_finish", &logprob_finish, py::arg("args"), "results of rows from their statistics");
  m.def("cuda_sequence_dpo", &sequence_dpo, py::arg("args"), "log-probs of tokens to losses of pairs and gradients");
  m.attr("cuda_pair_losses") = pair_losses();  // those of cuda_sequence_dpo; args["loss"] is an index
}

}  // namespace dpofast
