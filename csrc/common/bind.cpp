// Bindings for instruction sets, and checks of values before a kernel runs.
#include "common/bind.h"

#include <optional>
#include <string>

#include "common/isa.h"

namespace {

const char* const isa_names[] = {"baseline", "avx2", "avx512"};

const char* name_of(reca::Isa isa) { return isa_names[static_cast<int>(isa)]; }

void set_isa(const std::string& name) {
  for (int i = 0; i <= static_cast<int>(reca::best_isa()); ++i) {
    if (name == isa_names[i]) return reca::set_isa(static_cast<reca::Isa>(i));
  }
  throw std::invalid_argument("instruction set '" + name + "' is not available: this processor supports baseline to " +
                              name_of(reca::best_isa()));
}

template <typename T>
int64_t first_outside(const T* index, int64_t count, int64_t low, int64_t high, std::optional<int64_t> skipped) {
  for (int64_t i = 0; i < count; ++i) {
    if ((index[i] < low || index[i] >= high) && index[i] != skipped) return i;
  }
  return -1;
}

// The position of the first value that is neither in [low, high) nor `skipped`; -1 if there is none.
int64_t index_outside(uint64_t index, bool is_int64, int64_t count, int64_t low, int64_t high,
                      std::optional<int64_t> skipped) {
  return is_int64 ? first_outside(reinterpret_cast<const int64_t*>(index), count, low, high, skipped)
                  : first_outside(reinterpret_cast<const int32_t*>(index), count, low, high, skipped);
}

// Whether every exponent has a zero bit: the exponents of NaN and infinity are all ones.
template <typename T>
bool finite(const T* bits, int64_t count, T exponent) {
  for (int64_t begin = 0; begin < count; begin += 4096) {
    const int64_t end = begin + 4096 < count ? begin + 4096 : count;
    T found = 0;
    for (int64_t i = begin; i < end; ++i) found |= (bits[i] & exponent) == exponent;
    if (found) return false;
  }
  return true;
}

bool all_finite(int dtype, uint64_t data, int64_t count) {
  const auto* const halves = reinterpret_cast<const uint16_t*>(data);
  switch (static_cast<reca::DType>(dtype)) {
    case reca::DType::f32: return finite<uint32_t>(reinterpret_cast<const uint32_t*>(data), count, 0x7f800000);
    case reca::DType::bf16: return finite<uint16_t>(halves, count, 0x7f80);
    case reca::DType::f16: return finite<uint16_t>(halves, count, 0x7c00);
  }
  return false;
}

}  // namespace

RECA_BIND(m) {
#ifdef RECA_CUDA_ARCHS
  m.attr("cuda_archs") = RECA_CUDA_ARCHS;
#else
  m.attr("cuda_archs") = "";
#endif
  m.def("best_isa", [] { return name_of(reca::best_isa()); });
  m.def("current_isa", [] { return name_of(reca::current_isa()); });
  m.def("set_isa", &set_isa, reca::py::arg("name"));
  m.def("index_outside", &index_outside);
  m.def("all_finite", &all_finite);
}
