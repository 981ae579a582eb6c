// The CUDA launchers on the emulator, as a Python module: the backend "cuda:emu" of the tests.
#include <pybind11/pybind11.h>

#include "bind_cuda.h"
#include "cuda_emu.h"

PYBIND11_MODULE(_emu, m) {
  m.doc() = "csrc/cuda on the CPU";
  dpofast::bind_cuda(m);
  m.def(
      "set_seed", [](uint64_t seed) { emu::seed = seed; }, pybind11::arg("seed"),
      "of the order in which threads and blocks run");
}
