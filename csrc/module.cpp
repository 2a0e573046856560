// The native module. Its functions are bound in csrc/*/bind.cpp.
#include "common/bind.h"
#include "common/sources.h"

PYBIND11_MODULE(_native, m) {
  m.doc() = "Kernels behind reca_kernels; call the functions of reca_kernels instead.";
  m.attr("sources") = reca::sources();
  for (const auto bind : reca::bindings()) bind(m);
}
