// The Python module: the only file that knows Python. Pointers arrive as integers (tensor.data_ptr()),
// arguments were checked in Python; the GIL is released while a kernel runs.
#include <pybind11/stl.h>

#include <vector>

#include "bind_args.h"
#include "bind_cuda.h"
#include "cpu/kernels.h"

using namespace dpofast;
using namespace dpofast::cpu;

namespace {

const Table& table(const std::string& isa) {
  const Table* t = find(isa.c_str());
  if (!t) throw std::invalid_argument("dpofast._C: instruction set '" + isa + "' is not available on this machine");
  return *t;
}

Head head(const py::dict& d) {
  Head a{};
  a.n = value<int64_t>(d, "n");
  a.h = value<int64_t>(d, "h");
  a.v = value<int64_t>(d, "v");
  a.hidden = pointer(d, "hidden");
  a.hidden_dtype = dtype(d, "hidden_dtype");
  a.row_offsets = pointer<int64_t>(d, "row_offsets");
  a.hidden_col_stride = value<int64_t>(d, "hidden_col_stride");
  a.weight = pointer(d, "weight");
  a.weight_dtype = dtype(d, "weight_dtype");
  a.weight_row_stride = value<int64_t>(d, "weight_row_stride");
  a.weight_col_stride = value<int64_t>(d, "weight_col_stride");
  a.bias = pointer(d, "bias");
  a.labels = pointer<int64_t>(d, "labels");
  read_transform(d, a);
  a.block = value<int64_t>(d, "block");
  a.threads = value<int>(d, "threads");
  if (a.n < 1 || a.h < 1 || a.v < 1 || a.block < 2 || a.block % 2 || a.threads < 1)
    throw std::invalid_argument("dpofast._C: sizes must be positive and the block even");
  return a;
}

// Runs the kernel if the workspace is large enough; returns the bytes that it needs.
template <class Args>
int64_t run(int64_t (*kernel)(const Args&), Args& a, const py::dict& d) {
  void* const workspace = pointer(d, "workspace");
  const int64_t n_bytes = workspace ? value<int64_t>(d, "workspace_bytes") : 0;
  py::gil_scoped_release unlocked;
  const int64_t needed = kernel(a);
  if (workspace && needed <= n_bytes) {
    a.workspace = workspace;
    kernel(a);
  }
  return needed;
}

int64_t forward(const std::string& isa, const py::dict& d) {
  ForwardArgs a{};
  a.head = head(d);
  a.outputs = value<unsigned>(d, "outputs");
  read_results(d, a);
  a.stats = pointer(d, "stats");
  a.cache = pointer(d, "cache");
  a.cached_blocks = value<int64_t>(d, "cached_blocks");
  a.jacobian = pointer(d, "jacobian");
  return run(table(isa).forward, a, d);
}

int64_t backward(const std::string& isa, const py::dict& d) {
  BackwardArgs a{};
  a.head = head(d);
  a.logps = pointer(d, "logps");
  a.lse = pointer(d, "lse");
  a.entropy = pointer(d, "entropy");
  a.grad_logps = pointer(d, "grad_logps");
  a.grad_entropy = pointer(d, "grad_entropy");
  a.cache = pointer(d, "cache");
  a.cached_blocks = value<int64_t>(d, "cached_blocks");
  a.jacobian = pointer(d, "jacobian");
  a.grad_hidden = pointer(d, "grad_hidden");
  a.grad_hidden_dtype = dtype(d, "grad_hidden_dtype");
  a.grad_rows = pointer<int64_t>(d, "grad_rows");
  a.grad_weight = pointer(d, "grad_weight");
  a.grad_bias = pointer(d, "grad_bias");
  a.token_chunk = value<int64_t>(d, "token_chunk");
  return run(table(isa).backward, a, d);
}

RowsArgs rows(const py::dict& d) {
  RowsArgs a{};
  a.n = value<int64_t>(d, "n");
  a.v = value<int64_t>(d, "v");
  a.logits = pointer(d, "logits");
  a.dtype = dtype(d, "dtype");
  a.row_offsets = pointer<int64_t>(d, "row_offsets");
  a.labels = pointer<int64_t>(d, "labels");
  read_transform(d, a);
  a.outputs = value<unsigned>(d, "outputs");
  read_results(d, a);
  a.grad_logps = pointer(d, "grad_logps");
  a.grad_entropy = pointer(d, "grad_entropy");
  a.grad_logits = pointer(d, "grad_logits");
  a.grad_offsets = pointer<int64_t>(d, "grad_offsets");
  a.threads = value<int>(d, "threads");
  return a;
}

void rows_forward(const std::string& isa, const py::dict& d) {
  const RowsArgs a = rows(d);
  const Table& t = table(isa);
  py::gil_scoped_release unlocked;
  t.rows_forward(a);
}

void rows_backward(const std::string& isa, const py::dict& d) {
  const RowsArgs a = rows(d);
  const Table& t = table(isa);
  py::gil_scoped_release unlocked;
  t.rows_backward(a);
}

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (const Table* const* t = tables(); *t; ++t) names.push_back((*t)->name);
  return names;
}

py::dict cpu_features() {
  py::dict d;
#if defined(__x86_64__)
  __builtin_cpu_init();
#define DPOFAST_FEATURE(name) d[name] = bool(__builtin_cpu_supports(name))
  DPOFAST_FEATURE("avx2");
  DPOFAST_FEATURE("fma");
  DPOFAST_FEATURE("avx512f");
  DPOFAST_FEATURE("avx512bw");
  DPOFAST_FEATURE("avx512dq");
  DPOFAST_FEATURE("avx512vl");
  DPOFAST_FEATURE("avx512bf16");
#undef DPOFAST_FEATURE
#endif
  return d;
}

py::dict build_info() {
  py::dict d;
#if defined(DPOFAST_VERSION)
  d["version"] = DPOFAST_VERSION;
#endif
#if defined(DPOFAST_BUILD_FLAGS)
  d["flags"] = DPOFAST_BUILD_FLAGS;
#endif
#if defined(__clang__)
  d["compiler"] = __VERSION__;  // names itself
#else
  d["compiler"] = "gcc " __VERSION__;
#endif
  d["cpp_standard"] = int64_t(__cplusplus);
#if defined(DPOFAST_CUDA_ARCHS)
  d["cuda_archs"] = DPOFAST_CUDA_ARCHS;
  d["cuda_compiler"] = DPOFAST_CUDA_COMPILER;
#endif
  return d;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "dpofast's compiled kernels; takes addresses, sizes and strides, knows no framework";
  m.def("forward", &forward, py::arg("isa"), py::arg("args"),
        "linear_logprob forward; returns the bytes of workspace that it needs, and does nothing with fewer");
  m.def("backward", &backward, py::arg("isa"), py::arg("args"), "linear_logprob backward; likewise");
  m.def("rows_forward", &rows_forward, py::arg("isa"), py::arg("args"), "logprob forward");
  m.def("rows_backward", &rows_backward, py::arg("isa"), py::arg("args"), "logprob backward");
  m.def(
      "traits",
      [](const std::string& isa, int hidden, int weight) {
        const Traits t = table(isa).traits(dtype(hidden), dtype(weight));
        return py::make_tuple(t.vector, t.panel, t.unit, t.elem_size, t.acc_size, t.cached_size);
      },
      py::arg("isa"), py::arg("hidden_dtype"), py::arg("weight_dtype"),
      "(tokens in a vector, tokens in a panel, k in a dot-product step, bytes of a product's element, of an accumulator, of a "
      "kept exponential)");
  m.def(
      "peak",
      [](const std::string& isa, int hidden, int weight) {
        std::vector<char> work(kPeakBytes);
        const Peak peak = table(isa).peak(dtype(hidden), dtype(weight), work.data());
        return py::make_tuple(peak.hardware, peak.micro_kernel);
      },
      py::arg("isa"), py::arg("hidden_dtype"), py::arg("weight_dtype"), "flop/s of one thread: (of a loop of independent multiply-adds, of the micro-kernel)");
  m.def("cpu_isas", &cpu_isas, "instruction sets that are compiled in and that this machine has, best first");
  m.def("cpu_features", &cpu_features, "CPU features that decide among them");
#if defined(DPOFAST_CUDA_ARCHS)
  bind_cuda(m);
#endif
  m.def("build_info", &build_info, "how this module was built");
}
