// The CUDA launchers in Python. The emulator's module (tests/emu) is made of this file, too.
#include "bind_cuda.h"

#include <iterator>

#include "bind_args.h"
#include "cuda/kernels.h"

namespace dpofast {
namespace {

using namespace cuda;

void* stream(const py::dict& d) { return pointer(d, "stream"); }

void read_tile(const py::dict& d, TileArgs& a) {
  a.x = pointer(d, "x");
  a.row_offsets = pointer<int64_t>(d, "row_offsets");
  a.ld = value<int64_t>(d, "ld");
  a.n = value<int64_t>(d, "n");
  a.width = value<int64_t>(d, "width");
  a.v0 = value<int64_t>(d, "v0");
  a.bias = pointer(d, "bias");
  a.labels = pointer<int64_t>(d, "labels");
  read_transform(d, a);
  a.splits = value<int64_t>(d, "splits");
  a.part = value<int64_t>(d, "part");
}

void logprob_fold(const py::dict& d) {
  FoldArgs a{};
  read_tile(d, a);
  a.outputs = value<unsigned>(d, "outputs");
  a.stats = pointer(d, "stats");
  a.partials = pointer(d, "partials");
  const DType x = dtype(d, "dtype");
  void* const on = stream(d);
  py::gil_scoped_release unlocked;
  launch_logprob_fold(x, a, on);
}

void logprob_grad(const py::dict& d) {
  GradArgs a{};
  read_tile(d, a);
  a.z_max = pointer(d, "z_max");
  a.log_sum = pointer(d, "log_sum");
  a.lse_stride = value<int64_t>(d, "lse_stride");
  a.logps = pointer(d, "logps");
  a.grad_logps = pointer(d, "grad_logps");
  a.grad_logps_value = value<double>(d, "grad_logps_value");
  a.entropy = pointer(d, "entropy");
  a.grad_entropy = pointer(d, "grad_entropy");
  a.out = pointer(d, "out");
  a.out_offsets = pointer<int64_t>(d, "out_offsets");
  a.out_ld = value<int64_t>(d, "out_ld");
  a.cut = value<double>(d, "cut");
  a.dropped = pointer(d, "dropped");
  const DType x = dtype(d, "dtype"), out = dtype(d, "out_dtype");
  void* const on = stream(d);
  py::gil_scoped_release unlocked;
  launch_logprob_grad(x, out, a.dropped != nullptr, a, on);
}

void logprob_finish(const py::dict& d) {
  FinishArgs a{};
  a.stats = pointer(d, "stats");
  a.labels = pointer<int64_t>(d, "labels");
  a.n = value<int64_t>(d, "n");
  a.v = value<int64_t>(d, "v");
  read_results(d, a);
  const DType acc = dtype(d, "dtype");
  void* const on = stream(d);
  py::gil_scoped_release unlocked;
  launch_logprob_finish(acc, a, on);
}

template <class Name>
Name named(const py::dict& d, const char* key, int count) {
  const int i = value<int>(d, key);
  if (i < 0 || i >= count) throw std::invalid_argument(std::string("dpofast._C: unknown ") + key);
  return Name(i);
}

void sequence_dpo(const py::dict& d) {
  SequenceDpoArgs a{};
  a.logps = pointer(d, "logps");
  a.cu_seqlens = pointer<int64_t>(d, "cu_seqlens");
  a.labels = pointer<int64_t>(d, "labels");
  a.mask = pointer<uint8_t>(d, "mask");
  a.ignore_index = value<int64_t>(d, "ignore_index");
  a.pairs = value<int64_t>(d, "pairs");
  a.width = value<int64_t>(d, "width");
  a.ref_logps = pointer(d, "ref_logps");
  a.loss = named<PairLoss>(d, "loss", int(std::size(kPairLosses)));
  a.options.label_smoothing = value<double>(d, "label_smoothing");
  a.options.discopop_tau = value<double>(d, "discopop_tau");
  a.options.simpo_gamma = value<double>(d, "simpo_gamma");
  a.options.alphapo_alpha = value<double>(d, "alphapo_alpha");
  a.options.dpop_lambda = value<double>(d, "dpop_lambda");
  a.options.f_divergence = named<FDivergence>(d, "f_divergence", int(FDivergence::alpha_divergence) + 1);
  a.options.f_alpha_divergence_coef = value<double>(d, "f_alpha_divergence_coef");
  a.options.beta = value<double>(d, "beta_value");
  a.options.margin = value<double>(d, "margin_value");
  a.beta = pointer(d, "beta");
  a.margin = pointer(d, "margin");
  a.weight = pointer(d, "weight");
  a.losses = pointer(d, "losses");
  a.sums = pointer(d, "sums");
  a.lengths = pointer<int64_t>(d, "lengths");
  a.coefficients = pointer(d, "coefficients");
  const DType acc = dtype(d, "dtype");
  void* const on = stream(d);
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
  m.def("cuda_logprob_grad", &logprob_grad, py::arg("args"), "turns a tile of logits into its gradient");
  m.def("cuda_logprob_finish", &logprob_finish, py::arg("args"), "results of rows from their statistics");
  m.def("cuda_sequence_dpo", &sequence_dpo, py::arg("args"), "log-probs of tokens to losses of pairs and gradients");
  m.attr("cuda_pair_losses") = pair_losses();  // those of cuda_sequence_dpo; args["loss"] is an index
}

}  // namespace dpofast
