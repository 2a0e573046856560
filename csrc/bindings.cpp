// The only file that knows Python. Tensors arrive as addresses; Python has allocated them and checked them.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "reca/isa.h"
#include "reca/types.h"

namespace py = pybind11;

namespace {

const char* const isa_names[] = {"baseline", "avx2", "avx512"};

const char* name_of(reca::Isa isa) { return isa_names[static_cast<int>(isa)]; }

void set_isa(const std::string& name) {
  for (int i = 0; i <= static_cast<int>(reca::best_isa()); ++i) {
    if (name == isa_names[i]) return reca::set_isa(static_cast<reca::Isa>(i));
  }
  throw std::invalid_argument("instruction set '" + name + "': this processor runs baseline up to " +
                              name_of(reca::best_isa()));
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Kernels behind reca_kernels; call the functions of reca_kernels instead.";
#ifdef RECA_CUDA_ARCHS
  m.attr("cuda_archs") = RECA_CUDA_ARCHS;
#else
  m.attr("cuda_archs") = "";
#endif
  m.def("best_isa", [] { return name_of(reca::best_isa()); });
  m.def("current_isa", [] { return name_of(reca::current_isa()); });
  m.def("set_isa", &set_isa, py::arg("name"));
}
