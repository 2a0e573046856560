#include "common/bind.h"
#include "op.h"

namespace {

// Of the Arrow C data interface, https://arrow.apache.org/docs/format/CDataInterface.html
struct ArrowArray {
  int64_t length, null_count, offset, n_buffers, n_children;
  const void** buffers;
  ArrowArray** children;
  ArrowArray* dictionary;
  void (*release)(ArrowArray*);
  void* private_data;
};

// The bytes of a list of pixels, each a list of fixed size. The capsule owns them.
pybind11::memoryview arrow_bytes(const pybind11::capsule& pixels) {
  if (!pixels.name() || std::string(pixels.name()) != "arrow_array") throw pybind11::value_error("not an arrow_array");
  const auto* list = pixels.get_pointer<ArrowArray>();
  if (list->n_children != 1 || list->offset) throw pybind11::value_error("not a list of pixels");
  const ArrowArray& values = *list->children[0];
  if (values.n_buffers != 2 || values.n_children || values.null_count > 0 || values.offset) {
    throw pybind11::value_error("not bytes without nulls");
  }
  return pybind11::memoryview::from_memory(const_cast<void*>(values.buffers[1]), values.length);
}

}  // namespace

RECA_BIND(m) {
  RECA_BIND_HOST_LAUNCHER(m, image_planes);
  m.def("arrow_bytes", &arrow_bytes);
}
