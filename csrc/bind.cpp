// The Python module, but for its CUDA half (bind_cuda.cpp). Pointers arrive as integers (tensor.data_ptr()),
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

Problem read_problem(Args& d) {
  Problem a{};
  a.n = d.value<int64_t>("n");
  a.h = d.value<int64_t>("h");
  a.v = d.value<int64_t>("v");
  a.hidden = d.pointer("hidden");
  a.hidden_dtype = d.dtype("hidden_dtype");
  a.token_offsets = d.pointer<int64_t>("token_offsets");
  a.hidden_col_stride = d.value<int64_t>("hidden_col_stride");
  a.weight = d.pointer("weight");
  a.weight_dtype = d.dtype("weight_dtype");
  a.weight_row_stride = d.value<int64_t>("weight_row_stride");
  a.weight_col_stride = d.value<int64_t>("weight_col_stride");
  a.bias = d.pointer("bias");
  a.labels = d.pointer<int64_t>("labels");
  d.read_transform(a);
  a.block = d.value<int64_t>("block");
  a.threads = d.value<int>("threads");
  if (a.n < 1 || a.h < 1 || a.v < 1 || a.block < 2 || a.block % 2 || a.threads < 1)
    throw std::invalid_argument("dpofast._C: sizes must be positive and the block even");
  return a;
}

void check_filter(double grad_filter, const Problem& a, const void* stats) {
  if (grad_filter > 0 && (a.block > kFilteredRows || stats))
    throw std::invalid_argument(
        "dpofast._C: a filter takes blocks of at most 192 rows, no slice of a vocabulary, no sums to add to");
}

// Runs the kernel if the workspace is large enough; returns the bytes that it needs.
template <class KernelArgs>
int64_t run(int64_t (*kernel)(const KernelArgs&), KernelArgs& a, Args& d) {
  void* const workspace = d.pointer("workspace");
  const int64_t n_bytes = d.value<int64_t>("workspace_bytes");
  d.done();
  py::gil_scoped_release unlocked;
  const int64_t needed = kernel(a);
  if (needed < 0) throw std::invalid_argument("dpofast._C: the jacobian is larger than cache_bytes");
  if (workspace && needed <= n_bytes) {
    a.workspace = workspace;
    kernel(a);
  }
  return needed;
}

int64_t forward(const std::string& isa, const py::dict& args) {
  Args d(args);
  ForwardArgs a{};
  a.problem = read_problem(d);
  a.outputs = d.value<unsigned>("outputs");
  d.read_results(a);
  a.stats = d.pointer("stats");
  a.cache = d.pointer("cache");
  a.cache_bytes = d.value<int64_t>("cache_bytes");
  a.jacobian = d.pointer("jacobian");
  a.grad_filter = d.value<double>("grad_filter");
  a.tolerance = d.value<double>("tolerance");
  a.dropped_mass = d.pointer("dropped_mass");
  check_filter(a.grad_filter, a.problem, a.stats);
  return run(table(isa).forward, a, d);
}

int64_t backward(const std::string& isa, const py::dict& args) {
  Args d(args);
  BackwardArgs a{};
  a.problem = read_problem(d);
  a.logps = d.pointer("logps");
  a.lse = d.pointer("lse");
  a.entropy = d.pointer("entropy");
  a.grad_logps = d.pointer("grad_logps");
  a.grad_entropy = d.pointer("grad_entropy");
  a.cache = d.pointer("cache");
  a.cache_bytes = d.value<int64_t>("cache_bytes");
  a.jacobian = d.pointer("jacobian");
  a.grad_filter = d.value<double>("grad_filter");
  a.grad_hidden = d.pointer("grad_hidden");
  a.grad_hidden_dtype = d.dtype("grad_hidden_dtype");
  a.grad_positions = d.pointer<int64_t>("grad_positions");
  a.grad_weight = d.pointer("grad_weight");
  a.grad_weight_dtype = d.dtype("grad_weight_dtype");
  a.grad_bias = d.pointer("grad_bias");
  a.adds = d.value<bool>("adds");
  a.token_chunk = d.value<int64_t>("token_chunk");
  check_filter(a.grad_filter, a.problem, a.adds ? a.grad_weight : nullptr);
  return run(table(isa).backward, a, d);
}

LogitsArgs read_logits(const py::dict& args) {
  Args d(args);
  LogitsArgs a{};
  a.n = d.value<int64_t>("n");
  a.v = d.value<int64_t>("v");
  a.logits = d.pointer("logits");
  a.dtype = d.dtype("dtype");
  a.row_offsets = d.pointer<int64_t>("row_offsets");
  a.labels = d.pointer<int64_t>("labels");
  d.read_transform(a);
  a.outputs = d.value<unsigned>("outputs");
  d.read_results(a);
  a.grad_logps = d.pointer("grad_logps");
  a.grad_entropy = d.pointer("grad_entropy");
  a.grad_logits = d.pointer("grad_logits");
  a.grad_offsets = d.pointer<int64_t>("grad_offsets");
  a.threads = d.value<int>("threads");
  d.done();
  if (a.n < 1 || a.v < 1 || a.threads < 1) throw std::invalid_argument("dpofast._C: sizes must be positive");
  return a;
}

void logits_forward(const std::string& isa, const py::dict& d) {
  const LogitsArgs a = read_logits(d);
  const Table& t = table(isa);
  py::gil_scoped_release unlocked;
  t.logits_forward(a);
}

void logits_backward(const std::string& isa, const py::dict& d) {
  const LogitsArgs a = read_logits(d);
  const Table& t = table(isa);
  py::gil_scoped_release unlocked;
  t.logits_backward(a);
}

// The numbers that Python has to use (dpofast/contract.py).
py::dict contract() {
  py::dict dtypes, outputs, stats;
  dtypes["f32"] = int(DType::f32);
  dtypes["f64"] = int(DType::f64);
  dtypes["bf16"] = int(DType::bf16);
  dtypes["f16"] = int(DType::f16);
  for (int i = 0; i < kOutputs; ++i) outputs[kOutputNames[i]] = 1 << i;
  stats["M"] = int(kM);
  stats["SUM"] = int(kSum);
  stats["SUM_X"] = int(kSumX);
  stats["SUM_SQ"] = int(kSumSq);
  stats["SUM_Z"] = int(kSumZ);
  stats["TOP_BEFORE"] = int(kTopBefore);
  stats["Z_LABEL"] = int(kZLabel);
  stats["COUNT"] = int(kStats);
  py::dict all;
  all["dtypes"] = dtypes, all["outputs"] = outputs, all["stats"] = stats, all["floor_logp"] = kFloorLogp;
  return all;
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
  m.def("cpu_linear_logprob_forward", &forward, py::arg("isa"), py::arg("args"),
        "linear_logprob forward; returns the bytes of workspace that it needs, and does nothing with fewer");
  m.def("cpu_linear_logprob_backward", &backward, py::arg("isa"), py::arg("args"), "linear_logprob backward; likewise");
  m.def("cpu_logits_forward", &logits_forward, py::arg("isa"), py::arg("args"), "logprob forward");
  m.def("cpu_logits_backward", &logits_backward, py::arg("isa"), py::arg("args"), "logprob backward");
  m.def(
      "traits",
      [](const std::string& isa, int hidden, int weight) {
        const Traits t = table(isa).traits(dtype(hidden), dtype(weight));
        return py::make_tuple(t.vector, t.panel, t.unit, t.elem_size, t.acc_size, t.cached_size);
      },
      py::arg("isa"), py::arg("hidden_dtype"), py::arg("weight_dtype"),
      "(tokens in a vector, tokens in a panel, k in a dot-product step, bytes of a product's element, of an accumulator, of a "
      "cached exponential)");
  m.def(
      "peak",
      [](const std::string& isa, int hidden, int weight) {
        std::vector<char> work(kPeakBytes);
        const Peak peak = table(isa).peak(dtype(hidden), dtype(weight), work.data());
        return py::make_tuple(peak.hardware, peak.micro_kernel);
      },
      py::arg("isa"), py::arg("hidden_dtype"), py::arg("weight_dtype"),
      "flop/s of one thread: (of a loop of independent multiply-adds, of the micro-kernel)");
  m.def("contract", &contract, "the codes of dtypes, the bits of outputs and the rows of statistics");
  m.def("cpu_isas", &cpu_isas, "instruction sets that are compiled in and that this machine has, best first");
  m.def("cpu_features", &cpu_features, "CPU features that decide among them");
#if defined(DPOFAST_CUDA_ARCHS)
  bind_cuda(m);
#endif
  m.def("build_info", &build_info, "how this module was built");
}
