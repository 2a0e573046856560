// Bindings of launchers as Python functions. Tensors are passed as addresses, dtypes as numbers, structs as tuples of
// their fields. Python allocates and checks the tensors, and keeps them alive during the call.
//
// csrc/<op>/bind.cpp declares the fields of structs and the launchers:
//
//     template <>
//     struct reca::FromPython<Args> : reca::FromTuple<Args, DType, const void*, int64_t> {};
//
//     RECA_BIND(m) { RECA_BIND_LAUNCHER(m, f); }       // reca::f and reca::cuda::f, chosen by the Launch, as m.f
//
// module.cpp runs every RECA_BIND that is linked.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/philox.h"
#include "common/types.h"

namespace reca {

namespace py = pybind11;

// ---- registration ----

inline std::vector<void (*)(py::module_&)>& bindings() {
  static std::vector<void (*)(py::module_&)> all;
  return all;
}

struct Binding {
  explicit Binding(void (*bind)(py::module_&)) { bindings().push_back(bind); }
};

// Each has unique names: several bind.cpp may be compiled as one translation unit.
#define RECA_BIND(m) RECA_BIND_EXPANDED(m, __COUNTER__)
#define RECA_BIND_EXPANDED(m, number) RECA_BIND_NUMBERED(m, number)
#define RECA_BIND_NUMBERED(m, number) RECA_BIND_NAMED(m, bind_##number, binding_##number)
#define RECA_BIND_NAMED(m, bind, binding)    \
  static void bind(reca::py::module_& m);    \
  static const reca::Binding binding(&bind); \
  static void bind(reca::py::module_& m)

// ---- arguments ----

// Argument is the type that Python passes for a T. get() converts it to T, or to an owner that converts to T.
template <typename T>
struct FromPython {
  static_assert(std::is_arithmetic_v<T> || std::is_enum_v<T>, "specialise FromPython with the fields of this struct");
  using Argument = typename std::conditional_t<std::is_enum_v<T>, std::underlying_type<T>, std::common_type<T>>::type;
  static T get(Argument x) { return static_cast<T>(x); }
};

template <typename T>
struct FromPython<T*> {  // 0: no tensor
  using Argument = uint64_t;
  static T* get(Argument address) { return reinterpret_cast<T*>(address); }
};

template <typename T>
struct FromPython<const T&> : FromPython<T> {};

template <typename T, typename... Fields>
struct FromTuple {
  using Argument = std::tuple<typename FromPython<Fields>::Argument...>;
  static T get(const Argument& x) { return get(x, std::index_sequence_for<Fields...>()); }

 private:
  template <size_t... i>
  static T get(const Argument& x, std::index_sequence<i...>) {
    return T{FromPython<Fields>::get(std::get<i>(x))...};
  }
};

template <>
struct FromPython<Launch> : FromTuple<Launch, int, void*, int> {};
template <>
struct FromPython<NoiseAddress> : FromTuple<NoiseAddress, const uint64_t*, const int64_t*, uint32_t> {};

// A list of structs, for `const List&` with List{const T*, count}.
template <typename List, typename T>
struct FromList {
  using Argument = std::vector<typename FromPython<T>::Argument>;
  struct Owner {
    std::vector<T> items;
    operator List() const { return {items.data(), static_cast<int64_t>(items.size())}; }
  };
  static Owner get(const Argument& list) {
    Owner owner;
    for (const auto& item : list) owner.items.push_back(FromPython<T>::get(item));
    return owner;
  }
};

// ---- launchers ----

template <typename Signature>
struct Launcher;

template <typename... Parameters>
struct Launcher<void(Parameters...)> {
  // host, device: call the host or the device function with values of FromPython<Parameters>::get.
  template <typename Host, typename Device>
  static void bind(py::module_& m, const char* name, const Host& host, const Device& device) {
    m.def(name, [host, device](const typename FromPython<Parameters>::Argument&... arguments) {
      const Launch on = FromPython<Launch>::get(std::get<sizeof...(Parameters) - 1>(std::tie(arguments...)));
      if (on.device < 0) {
        py::gil_scoped_release release;
        host(FromPython<Parameters>::get(arguments)...);
      } else {
        device(FromPython<Parameters>::get(arguments)...);
      }
    });
  }
};

#ifdef RECA_CUDA_ARCHS
#define RECA_CALL_CUDA(f) [](const auto&... arguments) { reca::cuda::f(arguments...); }
#else
#define RECA_CALL_CUDA(f) \
  [](const auto&...) { throw std::runtime_error(#f ": the native module was built without CUDA"); }
#endif
#define RECA_CALL_HOST(f) [](const auto&... arguments) { reca::f(arguments...); }

// Lambdas, not function pointers: tests/kernels/emulated.py links the device side only.
#define RECA_BIND_LAUNCHER(m, f) \
  reca::Launcher<decltype(reca::f)>::bind(m, #f, RECA_CALL_HOST(f), RECA_CALL_CUDA(f))

// For functions that exist only on the host, or only on devices.
#define RECA_BIND_HOST_LAUNCHER(m, f)     \
  reca::Launcher<decltype(reca::f)>::bind( \
      m, #f, RECA_CALL_HOST(f), [](const auto&...) { throw std::runtime_error(#f " runs on the host"); })
#define RECA_BIND_CUDA_LAUNCHER(m, f)                                                                        \
  reca::Launcher<decltype(reca::cuda::f)>::bind(                                                             \
      m, #f, [](const auto&...) { throw std::runtime_error(#f " runs on CUDA devices"); }, RECA_CALL_CUDA(f))

}  // namespace reca
