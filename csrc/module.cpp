// The native module: csrc/*/bind.cpp hold its functions.
#include "common/bind.h"

PYBIND11_MODULE(_native, m) {
  m.doc() = "Kernels behind reca_kernels; call the functions of reca_kernels instead.";
  for (const auto bind : reca::bindings()) bind(m);
}
