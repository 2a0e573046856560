// A CUDA device whose memory is the host's, for a torch without CUDA: its tensors are on cuda:0, and every operator runs
// on the CPU, on the same memory. Loaded before torch's Python module, which looks for a device only once.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstring>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace {

using at::Tensor;
using c10::SymInt;
using c10::SymIntArrayRef;

constexpr auto TYPE = c10::DeviceType::CUDA;
const c10::DispatchKeySet CPU(c10::DispatchKey::CPU), CUDA(c10::DispatchKey::CUDA);

c10::Device device() { return c10::Device(TYPE, 0); }
bool on_device(const Tensor& x) { return x.defined() && x.device().type() == TYPE; }

// Called with the name of an operator for which the host would wait for the device.
void (*waited)(const char*) = nullptr;
void wait(const std::string& name) {
  if (waited) waited(name.c_str());
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = TYPE;
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, device()); }
  c10::DeviceType type() const override { return TYPE; }
  c10::Device exchangeDevice(c10::Device) const override { return device(); }
  c10::Device getDevice() const override { return device(); }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const override { return stream(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isPinnedPtr(const void*) const override { return true; }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  int getNumGPUs() const override { return 1; }
};

// Data of another owner, which lives as long.
template <class Owner>
c10::DataPtr shared(void* data, Owner owner, c10::Device where) {
  return {data, new Owner(std::move(owner)), [](void* it) { delete static_cast<Owner*>(it); }, where};
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    auto host = c10::GetCPUAllocator()->allocate(bytes);
    auto* data = host.get();
    return shared(data, std::move(host), device());
  }
  void copy_data(void* into, const void* from, size_t bytes) const override { std::memcpy(into, from, bytes); }
};
Memory memory;

Tensor same_memory(const Tensor& x, c10::Device where, c10::DispatchKeySet keys, c10::Allocator* allocator) {
  auto data = shared(const_cast<void*>(x.storage().data()), x.storage(), where);
  auto storage = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), x.storage().nbytes(), std::move(data), allocator, true);
  auto result = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(std::move(storage)), keys, x.dtype());
  auto* made = result.unsafeGetTensorImpl();
  made->set_sizes_and_strides(x.sizes(), x.strides(), x.storage_offset());
  if (x.is_conj()) made->_set_conj(true);
  if (x.is_neg()) made->_set_neg(true);
  return result;
}
Tensor as_host(const Tensor& x) { return on_device(x) ? same_memory(x, c10::kCPU, CPU, c10::GetCPUAllocator()) : x; }
Tensor as_device(const Tensor& x) { return !x.defined() || on_device(x) ? x : same_memory(x, device(), CUDA, &memory); }

// Apply a function to all tensors of an argument or result.
template <class Function>
c10::IValue mapped(const c10::IValue& value, Function function) {
  if (value.isTensor()) return function(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const auto& x : value.toTensorVector()) list.push_back(function(x));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> list;
    for (std::optional<Tensor> x : value.toOptionalTensorList())
      list.push_back(x ? std::optional<Tensor>(function(*x)) : std::nullopt);
    return list;
  }
  return value;
}

const std::set<std::string> INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"};
const std::set<std::string> READ_BY_HOST = {
    "aten::nonzero", "aten::equal", "aten::masked_select", "aten::_unique2", "aten::repeat_interleave"};

// An index on the host is copied to the device, and the elements of a mask are counted.
bool waits_for_index(const c10::IValue& indices) {
  bool found = false;
  mapped(indices, [&](const Tensor& x) {
    found |= x.defined() && (!on_device(x) || x.scalar_type() == at::kBool);
    return x;
  });
  return found;
}

// Run any operator on the CPU, with the same memory.
void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto name = schema.name();
  const auto arguments = torch::jit::pop(*stack, schema.arguments().size());
  std::vector<std::pair<Tensor, Tensor>> pairs;  // an argument on the device, and on the host
  bool host = false, to_device = false;
  for (const auto& value : arguments) {
    if (value.isDevice() && value.toDevice().type() == TYPE) {
      to_device = true;
      torch::jit::push(*stack, c10::Device(c10::kCPU));
      continue;
    }
    torch::jit::push(*stack, mapped(value, [&](const Tensor& x) {
      if (!on_device(x)) {
        host |= x.defined() && x.dim();
        return x;
      }
      pairs.emplace_back(x, as_host(x));
      return pairs.back().second;
    }));
  }
  to_device |= !pairs.empty();
  TORCH_CHECK(!host || pairs.empty() || INDEXING.count(name), "Expected all tensors to be on the same device: ", name);
  if (INDEXING.count(name) ? waits_for_index(arguments[1]) : READ_BY_HOST.count(name) > 0) wait(name);
  op.callBoxed(stack);
  for (auto& [x, on_host] : pairs) {
    if (on_host.sizes() == x.sizes() && on_host.storage().data() == x.storage().data()) continue;
    auto moved = as_device(on_host);  // an out= argument that was resized
    x.unsafeGetTensorImpl()->set_storage_keep_dtype(moved.storage());
    x.unsafeGetTensorImpl()->set_sizes_and_strides(moved.sizes(), moved.strides(), moved.storage_offset());
  }
  for (const auto& value : torch::jit::pop(*stack, schema.returns().size())) {
    torch::jit::push(*stack, mapped(value, [&](const Tensor& x) {
      for (auto& [given, on_host] : pairs)  // in-place operators return their argument
        if (on_host.is_same(x)) return given;
      return to_device ? as_device(x) : x;
    }));
  }
}

Tensor empty(SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &memory, CUDA, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(SymIntArrayRef size, SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &memory,
                                           CUDA, c10::dtype_or_default(dtype));
}

// A copy between host and device; a number is passed to a kernel instead.
Tensor& copy_(Tensor& self, const Tensor& from, bool non_blocking) {
  bool number = on_device(self) && !from.dim();
  if (on_device(self) != on_device(from) && from.numel() && !number && !non_blocking) wait("aten::copy_");
  as_host(self).copy_(as_host(from));
  return self;
}

at::Scalar local_scalar(const Tensor& self) {
  wait("aten::_local_scalar_dense");
  return at::_local_scalar_dense(as_host(self));
}

Tensor as_strided(const Tensor& self, SymIntArrayRef size, SymIntArrayRef stride, std::optional<SymInt> offset) {
  auto start = offset ? std::optional<int64_t>(offset->expect_int()) : std::nullopt;
  return at::native::as_strided_tensorimpl(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), start);
}

Tensor view(const Tensor& self, SymIntArrayRef size) { return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size)); }

Tensor reshape_alias(const Tensor& self, SymIntArrayRef size, SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

const Tensor& resize_(const Tensor& self, SymIntArrayRef size, std::optional<at::MemoryFormat>) {
  auto* made = self.unsafeGetTensorImpl();
  made->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(size));
  const size_t bytes = (made->numel() + made->storage_offset()) * self.itemsize();
  if (const auto& storage = self.storage(); bytes > storage.nbytes()) {
    auto data = memory.allocate(bytes);
    std::memcpy(data.get(), storage.data(), storage.nbytes());
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(data));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
  return self;
}

Tensor& set_storage(Tensor& self, at::Storage source, SymInt offset, SymIntArrayRef size, SymIntArrayRef stride) {
  auto* made = self.unsafeGetTensorImpl();
  made->set_storage_keep_dtype(source);
  made->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), offset.expect_int());
  return self;
}

Tensor& set_whole_storage(Tensor& self, at::Storage source) {
  const SymInt count = static_cast<int64_t>(source.nbytes() / self.itemsize());
  return set_storage(self, std::move(source), 0, {count}, {SymInt(1)});
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_storage(self, source.storage(), source.sym_storage_offset(), source.sym_sizes(), source.sym_strides());
}

void record_stream(Tensor&, c10::Stream) {}

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("copy_", copy_);
  library.impl("_local_scalar_dense", local_scalar);
  library.impl("as_strided", as_strided);
  library.impl("view", view);
  library.impl("_reshape_alias", reshape_alias);
  library.impl("unfold", at::native::unfold);
  library.impl("resize_", resize_);
  library.impl("set_.source_Storage_storage_offset", set_storage);
  library.impl("set_.source_Storage", set_whole_storage);
  library.impl("set_.source_Tensor", set_tensor);
  library.impl("record_stream", record_stream);
  for (auto name : {"convolution", "convolution_backward"})  // else they choose cuDNN's
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&fallback>());
}
TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

const bool registered = (c10::SetAllocator(TYPE, &memory, 1), true);

}  // namespace

extern "C" void on_wait(void (*function)(const char*)) { waited = function; }

namespace at {
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks)
}
