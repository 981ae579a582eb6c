// The CUDA launchers in Python. The emulator's module (tests/emu) is made of this file, too.
#include "bind_cuda.h"

#include "bind_args.h"
#include "cuda/kernels.h"

namespace dpofast {
namespace {

using namespace cuda;

void* stream(const py::dict& d) { return pointer(d, "stream"); }

void logprob_fold(const py::dict& d) {
  FoldArgs a{};
  a.x = pointer(d, "x");
  a.row_offsets = pointer<int64_t>(d, "row_offsets");
  a.ld = value<int64_t>(d, "ld");
  a.n = value<int64_t>(d, "n");
  a.width = value<int64_t>(d, "width");
  a.v0 = value<int64_t>(d, "v0");
  a.bias = pointer(d, "bias");
  a.labels = pointer<int64_t>(d, "labels");
  a.temperature = value<double>(d, "temperature");
  a.logit_scale = value<double>(d, "logit_scale");
  a.softcap = value<double>(d, "softcap");
  a.outputs = value<unsigned>(d, "outputs");
  a.stats = pointer(d, "stats");
  a.partials = pointer(d, "partials");
  a.splits = value<int64_t>(d, "splits");
  a.part = value<int64_t>(d, "part");
  const DType x = dtype(d, "dtype");
  void* const on = stream(d);
  py::gil_scoped_release unlocked;
  launch_logprob_fold(x, a, on);
}

void logprob_grad(const py::dict& d) {
  GradArgs a{};
  a.x = pointer(d, "x");
  a.row_offsets = pointer<int64_t>(d, "row_offsets");
  a.ld = value<int64_t>(d, "ld");
  a.n = value<int64_t>(d, "n");
  a.width = value<int64_t>(d, "width");
  a.v0 = value<int64_t>(d, "v0");
  a.bias = pointer(d, "bias");
  a.labels = pointer<int64_t>(d, "labels");
  a.temperature = value<double>(d, "temperature");
  a.logit_scale = value<double>(d, "logit_scale");
  a.softcap = value<double>(d, "softcap");
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
  a.splits = value<int64_t>(d, "splits");
  a.part = value<int64_t>(d, "part");
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
  a.logps = pointer(d, "logps");
  a.lse = pointer(d, "lse");
  a.entropy = pointer(d, "entropy");
  a.log_sum_sq_probs = pointer(d, "log_sum_sq_probs");
  a.mean_logits = pointer(d, "mean_logits");
  a.is_top1 = pointer<uint8_t>(d, "is_top1");
  const DType acc = dtype(d, "dtype");
  void* const on = stream(d);
  py::gil_scoped_release unlocked;
  launch_logprob_finish(acc, a, on);
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("cuda_logprob_fold", &logprob_fold, py::arg("args"), "folds a tile of logits into running statistics");
  m.def("cuda_logprob_grad", &logprob_grad, py::arg("args"), "turns a tile of logits into its gradient");
  m.def("cuda_logprob_finish", &logprob_finish, py::arg("args"), "results of rows from their statistics");
}

}  // namespace dpofast
