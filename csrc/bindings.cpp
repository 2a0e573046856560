// The only file that knows Python. Tensors arrive as addresses; Python has allocated them and checked them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "reca/cross_entropy.h"
#include "reca/diffusion_loss.h"
#include "reca/flow_matching.h"
#include "reca/isa.h"
#include "reca/noise.h"
#include "reca/template_concat.h"
#include "reca/types.h"

namespace py = pybind11;

namespace {

using Address = uint64_t;  // of a tensor's first element; 0: none

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

const char* const isa_names[] = {"baseline", "avx2", "avx512"};

const char* name_of(reca::Isa isa) { return isa_names[static_cast<int>(isa)]; }

void set_isa(const std::string& name) {
  for (int i = 0; i <= static_cast<int>(reca::best_isa()); ++i) {
    if (name == isa_names[i]) return reca::set_isa(static_cast<reca::Isa>(i));
  }
  throw std::invalid_argument("instruction set '" + name + "': this processor runs baseline up to " +
                              name_of(reca::best_isa()));
}

// ---- cross-entropy ----

reca::CrossEntropy cross_entropy(int dtype, Address logits, int64_t row_stride, int64_t rows, int64_t classes,
                                 Address labels, bool labels_are_int64, int64_t ignore_index, float label_smoothing,
                                 float z_loss, float softcap, int threads) {
  return {static_cast<reca::DType>(dtype), at<void>(logits), row_stride, rows, classes, at<void>(labels),
          labels_are_int64, ignore_index, label_smoothing, z_loss, softcap, threads};
}

// The loss in rows' order, so that it does not depend on threads; and how many rows carry a label.
int64_t reduce_losses(const reca::CrossEntropy& args, Address losses, bool mean, Address loss) {
  const float* values = at<float>(losses);
  double total = 0;
  int64_t count = 0;
  for (int64_t r = 0; r < args.rows; ++r) {
    const int64_t label = args.labels_are_int64 ? static_cast<const int64_t*>(args.labels)[r]
                                                : static_cast<const int32_t*>(args.labels)[r];
    if (label == args.ignore_index) continue;
    total += values[r];
    ++count;
  }
  *at<float>(loss) = float(mean && count > 0 ? total / double(count) : total);
  return count;
}

// ---- values that are looked at before a kernel runs ----

template <typename T>
int64_t first_outside(const T* index, int64_t count, int64_t low, int64_t high, std::optional<int64_t> skipped) {
  for (int64_t i = 0; i < count; ++i) {
    if ((index[i] < low || index[i] >= high) && index[i] != skipped) return i;
  }
  return -1;
}

// The first place of a number that is neither in [low, high) nor `skipped`; -1: none.
int64_t index_outside(Address index, bool is_int64, int64_t count, int64_t low, int64_t high,
                      std::optional<int64_t> skipped) {
  return is_int64 ? first_outside(at<int64_t>(index), count, low, high, skipped)
                  : first_outside(at<int32_t>(index), count, low, high, skipped);
}

// Whether all exponents have a zero: those of NaN and infinity are ones throughout.
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

bool all_finite(int dtype, Address data, int64_t count) {
  switch (static_cast<reca::DType>(dtype)) {
    case reca::DType::f32: return finite<uint32_t>(at<uint32_t>(data), count, 0x7f800000);
    case reca::DType::bf16: return finite<uint16_t>(at<uint16_t>(data), count, 0x7f80);
    case reca::DType::f16: return finite<uint16_t>(at<uint16_t>(data), count, 0x7c00);
  }
  return false;
}

// ---- template_concat ----

reca::Source source(int dtype, Address rows, int64_t row_stride, int64_t count, Address index, bool is_int64,
                    bool flipped) {
  return {static_cast<reca::DType>(dtype), at<void>(rows), row_stride, count, {at<void>(index), is_int64, flipped}};
}

std::vector<reca::Source> sources_of(const py::list& list) {
  std::vector<reca::Source> sources;
  for (const py::handle& item : list) sources.push_back(item.cast<reca::Source>());
  return sources;
}

// ---- noise, flow matching, diffusion ----

struct FlowCall {  // owns the list of images that its struct points to
  std::vector<reca::FlowImage> images;
  reca::FlowMatching args;
};

FlowCall flow_matching(int x0_dtype, const std::vector<std::tuple<Address, int64_t, int64_t, int64_t>>& places,
                       int64_t channels, int64_t patch, Address t, uint64_t seed, Address sample_ids, uint32_t stream,
                       int noise_dtype, Address given_noise, int threads) {
  FlowCall call;
  for (const auto& [x0, height, width, offset] : places) call.images.push_back({at<void>(x0), height, width, offset});
  call.args = {static_cast<reca::DType>(x0_dtype), nullptr, int64_t(places.size()), channels, patch, at<float>(t),
               {seed, at<int64_t>(sample_ids), stream}, static_cast<reca::DType>(noise_dtype), at<void>(given_noise),
               threads};
  return call;
}

reca::Diffusion diffusion(int x0_dtype, Address x0, Address rows, Address t, Address table, int64_t count,
                          int64_t channels, uint64_t seed, Address sample_ids, uint32_t stream, int noise_dtype,
                          Address given_noise, int threads) {
  return {static_cast<reca::DType>(x0_dtype), at<void>(x0), at<int64_t>(rows), at<int64_t>(t), at<float>(table), count,
          channels, {seed, at<int64_t>(sample_ids), stream}, static_cast<reca::DType>(noise_dtype),
          at<void>(given_noise), threads};
}

#ifdef RECA_CUDA_ARCHS
void bind_cuda_cross_entropy(py::module_& m) {
  using reca::CrossEntropy;
  m.def("masked_cross_entropy_forward", [](const CrossEntropy& args, Address losses, Address stats, int device,
                                           Address stream) {
    reca::cuda::masked_cross_entropy_forward(args, at<float>(losses), at<float>(stats), {device, at<void>(stream)});
  });
  m.def("masked_cross_entropy_backward", [](const CrossEntropy& args, Address stats, Address grad, int64_t grad_stride,
                                            Address scale, Address gradient, int64_t gradient_stride, int device,
                                            Address stream) {
    reca::cuda::masked_cross_entropy_backward(args, at<float>(stats), at<float>(grad), grad_stride, at<float>(scale),
                                              at<void>(gradient), gradient_stride, {device, at<void>(stream)});
  });
  m.def("reduce_losses", [](Address losses, Address labels, bool labels_are_int64, int64_t rows, int64_t ignore_index,
                            bool mean, Address loss, Address scale, int device, Address stream) {
    reca::cuda::reduce_losses(at<float>(losses), at<void>(labels), labels_are_int64, rows, ignore_index, mean,
                              at<float>(loss), at<float>(scale), {device, at<void>(stream)});
  });
}

void bind_cuda_linear_cross_entropy(py::module_& m) {
  m.def("masked_linear_cross_entropy_rows", [](const reca::CrossEntropy& loss, Address rows, Address bias,
                                               Address row_grad, Address scale, Address losses, Address dropped,
                                               bool gradient, int64_t low, int64_t high, int device, Address stream) {
    reca::cuda::masked_linear_cross_entropy_rows(
        {const_cast<void*>(loss.logits), loss.row_stride, loss.rows, loss.classes, at<void>(bias),
         static_cast<const int64_t*>(loss.labels), at<int64_t>(rows), at<float>(row_grad), at<float>(scale),
         at<float>(losses), at<float>(dropped), gradient, low, high},
        loss, {device, at<void>(stream)});
  });
  m.def("pick_rows", [](Address labels, bool labels_are_int64, int64_t count, int64_t ignore_index, bool mean, int64_t most,
                        Address losses, Address rows, Address row_labels, Address scale, int device, Address stream) {
    reca::cuda::pick_rows(at<void>(labels), labels_are_int64, count, ignore_index, mean, most, at<float>(losses),
                          at<int64_t>(rows), at<int64_t>(row_labels), at<float>(scale), {device, at<void>(stream)});
  });
  m.def("copy_rows", [](int from, Address source, int64_t source_stride, Address source_rows, int to, Address out,
                        int64_t out_stride, Address out_rows, int64_t count, int64_t width, int device, Address stream) {
    reca::cuda::copy_rows(static_cast<reca::DType>(from), at<void>(source), source_stride, at<int64_t>(source_rows),
                          static_cast<reca::DType>(to), at<void>(out), out_stride, at<int64_t>(out_rows), count, width,
                          {device, at<void>(stream)});
  });
  m.def("scale", [](int dtype, Address x, Address factor, Address out, int64_t count, int device, Address stream) {
    reca::cuda::scale(static_cast<reca::DType>(dtype), at<void>(x), at<float>(factor), at<void>(out), count,
                      {device, at<void>(stream)});
  });
}

// The launchers of csrc/cuda under the names of their CPU twins. Each ends with (device, stream) of the tensors; stream
// is a cudaStream_t as a number. They share no class with the CPU: tests replace this submodule by one that is emulated.
void bind_cuda(py::module_ m) {
  using Stream = Address;
  bind_cuda_cross_entropy(m);
  bind_cuda_linear_cross_entropy(m);
  m.def("philox_fill", [](Address seed, Address sample_ids, uint32_t stream, int64_t samples, int64_t n, int law,
                          Address out, int device, Stream on) {
    reca::cuda::philox_fill({at<uint64_t>(seed), at<int64_t>(sample_ids), stream}, samples, n, law, at<float>(out),
                            {device, at<void>(on)});
  });

  using reca::cuda::FlowMatching;
  struct Flow {  // owns the list that its struct points to
    std::vector<reca::cuda::FlowRun> runs;
    FlowMatching args;
  };
  py::class_<Flow>(m, "FlowMatching", py::module_local())
      .def(py::init([](int x0_dtype, const std::vector<std::tuple<Address, int64_t, int64_t, int64_t>>& runs,
                       int64_t channels, int64_t patch, Address t, Address seed, Address sample_ids, uint32_t stream,
                       Address given_noise, int64_t tiles) {
        Flow flow;
        for (const auto& [x0, images, height, width] : runs) flow.runs.push_back({at<void>(x0), images, height, width});
        flow.args = {static_cast<reca::DType>(x0_dtype), nullptr, int64_t(runs.size()), channels, patch, at<float>(t),
                     {at<uint64_t>(seed), at<int64_t>(sample_ids), stream}, at<float>(given_noise),
                     tiles};
        return flow;
      }));
  m.attr("flow_tile") = reca::cuda::flow_tile;
  m.def("flow_matching_prepare", [](Flow& flow, int dtype, Address x_t, int device, Stream on) {
    flow.args.runs = flow.runs.data();
    reca::cuda::flow_matching_prepare(flow.args, static_cast<reca::DType>(dtype), at<void>(x_t),
                                      {device, at<void>(on)});
  });
  m.def("flow_matching_loss", [](Flow& flow, int dtype, Address pred, Address gradient, Address losses, Address partial,
                                 int device, Stream on) {
    flow.args.runs = flow.runs.data();
    reca::cuda::flow_matching_loss(flow.args, static_cast<reca::DType>(dtype), at<void>(pred), at<void>(gradient),
                                   at<float>(losses), at<float>(partial), {device, at<void>(on)});
  });

  using reca::cuda::Gradient;
  py::class_<Gradient>(m, "Gradient", py::module_local())
      .def(py::init([](int grad_dtype, Address grad, int64_t grad_stride, int64_t length, int64_t width,
                       const reca::Source& used, Address gradient) {
        return Gradient{static_cast<reca::DType>(grad_dtype), at<void>(grad), grad_stride, length, width, used.index,
                        used.count, used.dtype, at<void>(gradient)};
      }));
  m.def("template_concat_forward", [](const py::list& list, int64_t length, int64_t width, int dtype, Address out,
                                      int device, Stream on) {
    const std::vector<reca::Source> sources = sources_of(list);
    reca::cuda::template_concat_forward(sources.data(), int(sources.size()), length, width,
                                        static_cast<reca::DType>(dtype), at<void>(out), {device, at<void>(on)});
  });
  m.def("template_concat_backward_sorted", [](const Gradient& gradient, Address rows, bool rows_are_int64,
                                              Address places, Address starts, Address sums, int device, Stream on) {
    reca::cuda::template_concat_backward(gradient, {{at<void>(rows), rows_are_int64, false}, at<int64_t>(places),
                                         at<int64_t>(starts), at<float>(sums)}, {device, at<void>(on)});
  });
  m.def("template_concat_backward_mapped", [](const Gradient& gradient, Address used, int device, Stream on) {
    reca::cuda::template_concat_backward(gradient, at<uint64_t>(used), {device, at<void>(on)});
  });

  using reca::cuda::Diffusion;
  py::class_<Diffusion>(m, "Diffusion", py::module_local())
      .def(py::init([](int x0_dtype, Address x0, Address rows, Address t, Address table, int64_t count, int64_t channels,
                       Address seed, Address sample_ids, uint32_t stream, Address given_noise) {
        return Diffusion{static_cast<reca::DType>(x0_dtype), at<void>(x0), at<int64_t>(rows), at<int64_t>(t),
                         at<float>(table), count, channels,
                         {at<uint64_t>(seed), at<int64_t>(sample_ids), stream}, at<float>(given_noise)};
      }));
  m.def("diffusion_prepare", [](const Diffusion& args, int dtype, Address x_t, int device, Stream on) {
    reca::cuda::diffusion_prepare(args, static_cast<reca::DType>(dtype), at<void>(x_t), {device, at<void>(on)});
  });
  m.def("diffusion_loss", [](const Diffusion& args, int dtype, Address out, Address gradient, Address losses, int device,
                             Stream on) {
    reca::cuda::diffusion_loss(args, static_cast<reca::DType>(dtype), at<void>(out), at<void>(gradient),
                               at<float>(losses), {device, at<void>(on)});
  });
}
#endif

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Kernels behind reca_kernels; call the functions of reca_kernels instead.";
#ifdef RECA_CUDA_ARCHS
  m.attr("cuda_archs") = RECA_CUDA_ARCHS;
  bind_cuda(m.def_submodule("cuda"));
#else
  m.attr("cuda_archs") = "";
#endif
  m.def("best_isa", [] { return name_of(reca::best_isa()); });
  m.def("current_isa", [] { return name_of(reca::current_isa()); });
  m.def("set_isa", &set_isa, py::arg("name"));

  using reca::CrossEntropy;
  py::class_<CrossEntropy>(m, "CrossEntropy", py::module_local()).def(py::init(&cross_entropy));
#ifdef RECA_CUDA_ARCHS
  m.attr("cuda").attr("CrossEntropy") = m.attr("CrossEntropy");
#endif
  m.def("masked_cross_entropy_forward", [](const CrossEntropy& args, Address losses, Address stats) {
    py::gil_scoped_release release;
    reca::masked_cross_entropy_forward(args, at<float>(losses), at<float>(stats));
  });
  m.def("masked_cross_entropy_backward", [](const CrossEntropy& args, Address stats, Address grad, int64_t grad_stride,
                                            float scale, Address gradient, int64_t gradient_stride) {
    py::gil_scoped_release release;
    reca::masked_cross_entropy_backward(args, at<float>(stats), at<float>(grad), grad_stride, scale,
                                        at<void>(gradient), gradient_stride);
  });
  m.def("masked_linear_cross_entropy_rows", [](const CrossEntropy& args, Address losses, Address grad, float scale,
                                               Address gradient, int64_t gradient_stride) {
    py::gil_scoped_release release;
    reca::masked_linear_cross_entropy_rows(args, at<float>(losses), at<float>(grad), scale, at<void>(gradient),
                                           gradient_stride);
  });
  m.def("index_outside", &index_outside);
  m.def("all_finite", &all_finite);

  m.def("reduce_losses", &reduce_losses);

  py::class_<reca::Source>(m, "Source", py::module_local()).def(py::init(&source));
  if (py::hasattr(m, "cuda")) m.attr("cuda").attr("Source") = m.attr("Source");
  m.def("template_concat_check", [](const py::list& list, int64_t length) {
    const std::vector<reca::Source> sources = sources_of(list);
    return reca::template_concat_check(sources.data(), int(sources.size()), length);
  });
  m.def("template_concat_forward", [](const py::list& list, int64_t length, int64_t width, int dtype, Address out,
                                      int threads) {
    const std::vector<reca::Source> sources = sources_of(list);
    py::gil_scoped_release release;
    reca::template_concat_forward(sources.data(), int(sources.size()), length, width, static_cast<reca::DType>(dtype),
                                  at<void>(out), threads);
  });
  // `used` is the source as in the forward pass; the addresses in it are not read, except its index.
  m.def("template_concat_backward", [](int grad_dtype, Address grad, int64_t grad_stride, int64_t length, int64_t width,
                                       const reca::Source& used, Address gradient, Address workspace, int threads) {
    py::gil_scoped_release release;
    reca::template_concat_backward(static_cast<reca::DType>(grad_dtype), at<void>(grad), grad_stride, length, width,
                                   used.index, used.count, used.dtype, at<void>(gradient), at<int64_t>(workspace),
                                   threads);
  });

  m.def("philox_fill", [](uint64_t seed, Address sample_ids, uint32_t stream, int64_t samples, int64_t n, int law,
                          Address out, int threads) {
    py::gil_scoped_release release;
    reca::philox_fill({seed, at<int64_t>(sample_ids), stream}, samples, n, law, at<float>(out), threads);
  });

  py::class_<FlowCall>(m, "FlowMatching", py::module_local()).def(py::init(&flow_matching));
  m.def("flow_matching_prepare", [](FlowCall& call, int dtype, Address x_t) {
    py::gil_scoped_release release;
    call.args.images = call.images.data();
    reca::flow_matching_prepare(call.args, static_cast<reca::DType>(dtype), at<void>(x_t));
  });
  m.def("flow_matching_loss", [](FlowCall& call, int dtype, Address pred, Address gradient, Address losses) {
    py::gil_scoped_release release;
    call.args.images = call.images.data();
    std::vector<double> partial(size_t(reca::flow_matching_chunks(call.args)));
    reca::flow_matching_loss(call.args, static_cast<reca::DType>(dtype), at<void>(pred), at<void>(gradient),
                             at<float>(losses), partial.data());
  });

  py::class_<reca::Diffusion>(m, "Diffusion", py::module_local()).def(py::init(&diffusion));
  m.def("diffusion_prepare", [](const reca::Diffusion& args, int dtype, Address x_t) {
    py::gil_scoped_release release;
    reca::diffusion_prepare(args, static_cast<reca::DType>(dtype), at<void>(x_t));
  });
  m.def("diffusion_loss", [](const reca::Diffusion& args, int dtype, Address out, Address gradient, Address losses) {
    py::gil_scoped_release release;
    reca::diffusion_loss(args, static_cast<reca::DType>(dtype), at<void>(out), at<void>(gradient), at<float>(losses));
  });
}
