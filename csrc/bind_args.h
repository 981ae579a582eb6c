// How bindings read their arguments: one dict a call, pointers as integers, None for a null pointer.
#pragma once
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "core/types.h"

namespace dpofast {
namespace py = pybind11;

template <class T = void>
T* pointer(const py::dict& d, const char* key) {
  return d.contains(key) && !d[key].is_none() ? reinterpret_cast<T*>(d[key].cast<uintptr_t>()) : nullptr;
}

template <class T>
T value(const py::dict& d, const char* key) {
  if (!d.contains(key)) throw std::invalid_argument(std::string("dpofast._C: missing argument ") + key);
  return d[key].cast<T>();
}

inline DType dtype(int code) {
  if (code < 0 || code > int(DType::f16)) throw std::invalid_argument("dpofast._C: unknown dtype code");
  return DType(code);
}

inline DType dtype(const py::dict& d, const char* key) { return dtype(value<int>(d, key)); }

// Fields that several kernels' arguments have under the same names.
template <class Args>
void read_transform(const py::dict& d, Args& a) {
  a.temperature = value<double>(d, "temperature");
  a.logit_scale = value<double>(d, "logit_scale");
  a.softcap = value<double>(d, "softcap");
}

template <class Args>
void read_results(const py::dict& d, Args& a) {
  a.logps = pointer(d, "logps");
  a.lse = pointer(d, "lse");
  a.entropy = pointer(d, "entropy");
  a.log_sum_sq_probs = pointer(d, "log_sum_sq_probs");
  a.mean_logits = pointer(d, "mean_logits");
  a.is_top1 = pointer<uint8_t>(d, "is_top1");
}

}  // namespace dpofast
