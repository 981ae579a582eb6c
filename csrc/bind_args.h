// How bindings read their arguments: one dict a call, pointers as integers, None for a null pointer.
#pragma once
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "core/softmax.h"
#include "core/types.h"

namespace dpofast {
namespace py = pybind11;

inline DType dtype(int code) {
  if (code < 0 || code > int(DType::f16)) throw std::invalid_argument("dpofast._C: unknown dtype code");
  return DType(code);
}

// Every key must be there, and every key that is there must be asked for: `done` says so.
class Args {
 public:
  explicit Args(const py::dict& d) : dict_(d) {}

  template <class T = void>
  T* pointer(const char* key) {
    const py::handle x = get(key);
    return x.is_none() ? nullptr : reinterpret_cast<T*>(x.cast<uintptr_t>());
  }

  template <class T>
  T value(const char* key) {
    return get(key).cast<T>();
  }

  DType dtype(const char* key) { return dpofast::dtype(value<int>(key)); }

  // Fields that several kernels' arguments have under the same names.
  template <class A>
  void read_transform(A& a) {
    a.temperature = value<double>("temperature");
    a.logit_scale = value<double>("logit_scale");
    a.softcap = value<double>("softcap");
  }

  void read_results(Results& a) {
    a.logps = pointer("logps");
    a.lse = pointer("lse");
    for (int i = 0; i < kOutputs; ++i) a.statistics[i] = pointer(kOutputNames[i]);
  }

  void done() const {
    if (keys_.size() == dict_.size()) return;
    for (const auto& item : dict_) {
      const std::string key = item.first.cast<std::string>();
      bool known = false;
      for (const char* k : keys_) known |= key == k;
      if (!known) throw std::invalid_argument("dpofast._C: unknown argument " + key);
    }
  }

 private:
  py::handle get(const char* key) {
    PyObject* const x = PyDict_GetItemString(dict_.ptr(), key);
    if (!x) throw std::invalid_argument(std::string("dpofast._C: missing argument ") + key);
    keys_.push_back(key);  // each is asked for once
    return x;
  }

  const py::dict& dict_;
  std::vector<const char*> keys_;
};

}  // namespace dpofast
