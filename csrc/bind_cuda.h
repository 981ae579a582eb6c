// The launchers of csrc/cuda as functions of a Python module.
#pragma once
#include <pybind11/pybind11.h>

namespace dpofast {
void bind_cuda(pybind11::module_& m);
}
