"""Memory that torch's allocator would hand out in a training step, counted by running the step on fake tensors."""

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import _engine_run_backward
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reca.estimate.meta_model import attention
from reca.models.common.on_cpu import as_gpu
from reca_kernels import dispatch
from reca_kernels.masked_linear_cross_entropy.plan import CPU, Machine, plan

OTHER = "other"
BLOCK = 512  # bytes; the CUDA allocator rounds sizes up to multiples of it
PROCESSORS = 132  # multiprocessors of the assumed GPU, which masked_linear_cross_entropy's chunk size depends on

_DEVICE = torch.ops.prim.device.default
_NUMBER = torch.ops.aten._local_scalar_dense.default
# Gradients of indexing are added up in place, but out of place where a tensor is of a subclass, such as a fake one.
_IN_PLACE = {
    torch.ops.aten.index_add.default: torch.ops.aten.index_add_.default,
    torch.ops.aten.index_put.default: torch.ops.aten.index_put_.default,
    torch.ops.aten.scatter_add.default: torch.ops.aten.scatter_add_.default,
}
_SCALE = torch.ops.reca.masked_linear_cross_entropy_scale.default


class Allocations(TorchDispatchMode):
    """Track the storages of all tensors that operators return, from allocation to release, and the peak.

    Temporaries inside kernels are not tracked, except large ones, which WORKSPACES counts. `item()` of a fake tensor
    returns 1.

    now      allocated bytes by kind; OTHER for tensors without a label
    at_peak  the same at the time of the peak
    """

    def __init__(self, gpu: bool, card: int = 80 << 30) -> None:
        super().__init__()
        self.machine = Machine(PROCESSORS, card) if gpu else CPU
        self.now, self.at_peak, self.peak = {OTHER: 0}, {OTHER: 0}, 0
        self._total, self._paused = 0, False
        self._live: dict[int, tuple[Any, int, str]] = {}

    def label(self, tensors: Iterable[Tensor | None], kind: str) -> None:
        """Attribute tensors to `kind`, whether or not they are tracked already."""
        for tensor in tensors:
            if tensor is None:
                continue
            storage = _local(tensor).untyped_storage()
            self._add(storage, OTHER)
            reference, size, before = self._live[storage._cdata]
            self._live[storage._cdata] = reference, size, kind
            self.now[before] -= size
            self.now[kind] = self.now.get(kind, 0) + size

    def hold(self, size: int) -> None:
        """Add bytes that stay allocated, of tensors that are not created under this mode."""
        self.now[OTHER] += size
        self._total += size

    def reset_peak(self) -> None:
        self.peak, self.at_peak = self._total, dict(self.now)

    def __enter__(self) -> "Allocations":
        self._resize: Any = torch.UntypedStorage.resize_
        self._propagate: Any = ShardingPropagator._propagate_tensor_meta_non_cached
        replaced: Any = torch.UntypedStorage, ShardingPropagator
        replaced[0].resize_ = functools.partialmethod(_resized, self)
        replaced[1]._propagate_tensor_meta_non_cached = functools.partialmethod(_shapes_only, self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        replaced: Any = torch.UntypedStorage, ShardingPropagator
        replaced[0].resize_, replaced[1]._propagate_tensor_meta_non_cached = self._resize, self._propagate

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is _DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # dispatched again with the local tensors
        if func is _SCALE:  # in place on the gradient, unless the graph is retained
            return args[0]
        if func is _NUMBER and isinstance(args[0], FakeTensor):
            return 1.0 if args[0].is_floating_point() else 1
        if func in _IN_PLACE and torch._C._current_graph_task_id() >= 0:  # in a backward pass
            func = _IN_PLACE[func]
        out = func(*args, **(kwargs or {}))
        for x in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(x, Tensor):
                self._add(x.untyped_storage(), OTHER)
        if (workspace := WORKSPACES.get(func)) is not None:
            self._note(workspace(self.machine, *args))
        return out

    def _size(self, size: int) -> int:
        return -(-size // BLOCK) * BLOCK if self.machine.is_gpu else size

    def _add(self, storage: torch.UntypedStorage, kind: str) -> None:
        key = storage._cdata
        if key in self._live or self._paused:
            return
        size = self._size(storage.nbytes())
        self._live[key] = weakref.ref(storage, lambda _: self._free(key)), size, kind
        self.now[kind] += size
        self._total += size
        self._note()

    def _note(self, more: int = 0) -> None:
        if self._total + more > self.peak:
            self.peak, self.at_peak = self._total + more, dict(self.now)
            self.at_peak[OTHER] += more

    def _free(self, key: int) -> None:
        _, size, kind = self._live.pop(key)
        self.now[kind] -= size
        self._total -= size

    def resized(self, storage: torch.UntypedStorage, size: int) -> None:
        """Track the new size of a storage: FSDP2 resizes storages to gather parameters, and to 0 to free them."""
        if (found := self._live.get(storage._cdata)) is not None:
            reference, before, kind = found
            after = self._size(size)
            self._live[storage._cdata] = reference, after, kind
            self.now[kind] += after - before
            self._total += after - before
            self._note()


def _resized(storage: torch.UntypedStorage, allocations: Allocations, size: int) -> Any:
    allocations.resized(storage, size)
    return allocations._resize(storage, size)


def _shapes_only(propagator: Any, allocations: Allocations, *arguments: Any) -> Any:
    """Propagate DTensor's shapes without tracking: its full-size tensors have no memory in a real run either."""
    allocations._paused = True
    try:
        return allocations._propagate(propagator, *arguments)
    finally:
        allocations._paused = False


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# ---- temporaries inside kernels ----


def _linear_cross_entropy(
    machine: Machine, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *rest: Any
) -> int:
    """Count the bytes that masked_linear_cross_entropy/linear_chunks.py allocates in addition to its results."""
    *_, chunk_rows, max_labelled, dtype, needs, backend = rest
    if backend == "reference":
        return 0
    size, (classes, width) = dtype.itemsize, weight.shape
    rows = len(labels) if max_labelled is None else min(max_labelled, len(labels))
    cut = plan(rows, classes, width, size, machine, chunk_rows)
    copies = sum(x.numel() * size for x in (hidden, weight) if x.dtype != dtype)
    total = copies + cut.rows * (width * (2 if needs[0] else 1) + cut.pitch) * size
    if needs[1] and not (cut.chunks == 1 and weight.dtype == dtype):
        total += 4 * weight.numel() if weight.dtype != torch.float32 else 0
        total += weight.numel() * size if not machine.is_gpu and dtype != torch.float32 else 0
    return total


def _distances(machine: Machine, x: Tensor, y: Tensor) -> int:
    """Count the bytes of torch.cdist's temporaries: both batched operands with two more columns."""
    batch, (width, size) = x.shape[:-2].numel(), (x.shape[-1] + 2, x.itemsize)
    return batch * (x.shape[-2] + y.shape[-2]) * width * size


WORKSPACES: dict[Any, Callable[..., int]] = {
    torch.ops.reca.masked_linear_cross_entropy.default: _linear_cross_entropy,
    torch.ops.aten._euclidean_dist.default: _distances,
}


# ---- CUDA behaviour emulated on the CPU ----

# Functions that autocast runs in fp32 on CUDA, but in the dtype of their inputs on CPUs.
_IN_FP32 = {
    F.layer_norm, torch.layer_norm, F.group_norm, torch.group_norm, F.softmax, torch.softmax, Tensor.softmax,
    F.log_softmax, torch.log_softmax, Tensor.log_softmax, torch.exp, Tensor.exp, torch.log, Tensor.log, torch.pow,
    Tensor.pow, Tensor.__pow__, torch.rsqrt, Tensor.rsqrt, torch.reciprocal, Tensor.reciprocal, torch.sum, Tensor.sum,
    torch.prod, Tensor.prod, torch.cumsum, Tensor.cumsum, torch.norm, Tensor.norm, F.normalize, F.mse_loss,
    F.cross_entropy, F.softplus, F.smooth_l1_loss,
}  # fmt: skip
_HALVES = (torch.float16, torch.bfloat16)


class OnGPU(TorchFunctionMode):
    """Emulate CUDA on CPU tensors: its attention kernels, and the functions that its autocast runs in fp32."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.backward:
            # Recomputed blocks need this mode, but torch.autograd.backward is a torch function and would disable it.
            with self:
                return _engine_run_backward(
                    (args[0],),
                    (torch.ones_like(args[0]),),
                    False,
                    False,
                    (),
                    allow_unreachable=True,
                    accumulate_grad=True,
                )
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func in _IN_FP32 and torch.is_autocast_enabled("cpu"):
            args = tuple(map(_in_fp32, args))
            kwargs = {key: _in_fp32(value) for key, value in kwargs.items()}
        return func(*args, **kwargs)


def _in_fp32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _HALVES else value


def _attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Call FlashAttention, or the memory-efficient kernel with a mask or in fp32: neither materialises the scores."""
    if torch.is_autocast_enabled("cpu"):
        q, k, v = (x.to(torch.get_autocast_dtype("cpu")) for x in (q, k, v))
    ops = torch.ops.aten
    if attn_mask is None and q.dtype in _HALVES:
        return ops._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    bias = attn_mask
    if bias is not None and bias.dtype == torch.bool:
        bias = torch.zeros_like(bias, dtype=q.dtype).masked_fill(~bias, float("-inf"))
    if bias is not None:
        bias = bias.expand(*q.shape[:-1], k.shape[-2])
    needed = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return ops._scaled_dot_product_efficient_attention(q, k, v, bias, needed, dropout_p, is_causal, scale=scale)[0]


@contextmanager
def on_gpu() -> Iterator[None]:
    """Emulate a GPU with fake CPU tensors."""
    # attention: "auto" may choose dense, which is for small inputs
    with dispatch.assume_gpu(), attention("sdpa"), OnGPU(), as_gpu():
        yield
