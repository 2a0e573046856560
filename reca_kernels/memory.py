"""Decide whether a kernel can be called on the addresses of tensors or must go through torch's dispatcher."""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import has_torch_function


def _bits(*names: str) -> int:
    keys = (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)).raw_repr() for name in names)
    return functools.reduce(int.__or__, keys)


# Dispatch keys whose work the direct path does itself or does not need.
_PLAIN = _bits(
    "CPU", "CUDA", "ADInplaceOrView", "AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA", "BackendSelect"
)  # fmt: skip
_MORE = ~_PLAIN
_CUDA = _bits("CUDA") & ~_bits("CPU")  # only the device bit
_DEVICES = _bits("CPU") ^ _bits("CUDA")
_keys_of, _keys_of_thread = torch._C._dispatch_keys, torch._C._dispatch_tls_local_include_set


def plain(*tensors: Tensor, optional: Tensor | None = None) -> bool:
    """Return whether a kernel can be called directly on the addresses of these tensors.

    False under torch.compile, a dispatch or function mode, a torch.func transform, torch.jit.trace or forward-mode AD;
    for a subclass, a fake, meta, sparse, quantized or nested tensor, a negated view or a zero tensor; for tensors on
    several devices; and for arguments that are not tensors.
    """
    if optional is not None:
        tensors = (*tensors, optional)
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0 or has_torch_function(tensors):
        return False
    keys = _keys_of_thread().raw_repr()
    try:
        for tensor in tensors:
            keys |= _keys_of(tensor).raw_repr()
    except TypeError:
        return False
    if keys & _MORE:
        return False
    if not keys & _CUDA:
        return True
    return keys & _DEVICES == _CUDA and len({tensor.get_device() for tensor in tensors}) == 1


def has_values(*tensors: Tensor | None) -> bool:
    """Return whether values can be read. Unlike `plain`, also True for subclasses and under a function mode."""
    if torch.compiler.is_compiling() or _keys_of_thread().raw_repr() & _MORE:
        return False
    return all(tensor is None or not _keys_of(tensor).raw_repr() & _MORE for tensor in tensors)


def mean_of(total: Tensor, count: int) -> Tensor:
    """Return total / count, and total where the count is 0.

    In a graph the bound is an operation on a tensor: torch.export takes max(count, 1) for count, also if 0 is allowed.
    """
    if not torch.compiler.is_compiling():
        return total / max(count, 1)
    return total / torch.full((), count, dtype=total.dtype, device=total.device).clamp(min=1)


def graph_is_kept() -> bool:
    """Return whether the current backward pass keeps saved tensors for another one (retain_graph=True)."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def learns(x: Tensor | None) -> bool:
    """Return whether a gradient of x may be requested. A tensor wrapped by a transform is unwrapped to find out."""
    if x is None or not torch.is_grad_enabled():
        return False
    while not (x.requires_grad or torch.compiler.is_compiling()) and torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x.requires_grad


def transformed() -> bool:
    """Return whether a torch.func transform is active in eager mode, where a plain autograd.Function cannot be used."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def refuse_transforms(op: str, tensors: Iterable[Any], *, lists: bool = False) -> None:
    """Raise RuntimeError if a transform would silently drop a derivative: kernels support backward() only.

    Args:
        op: The name in the message.
        tensors: The op's arguments.
        lists: The op takes lists of tensors, which vmap cannot batch.
    """
    if torch.compiler.is_compiling():
        return
    transforms = {level.key() for level in torch._C._functorch.get_interpreter_stack() or ()}
    kind = torch._C._functorch.TransformType
    floats = [x for x in tensors if isinstance(x, Tensor) and x.is_floating_point()]  # others have no derivatives
    name = None
    forward = kind.Jvp in transforms or forward_ad._current_level >= 0
    if (kind.Grad in transforms and any(map(learns, floats))) or (forward and any(map(_may_have_tangent, floats))):
        name = "forward-mode AD"
        if transforms & {kind.Grad, kind.Jvp}:
            name = "transforms of torch.func that differentiate (grad, vjp, jvp, jacrev, ...)"
    elif lists and kind.Vmap in transforms:
        raise RuntimeError(f"{op} takes lists of tensors, which vmap cannot batch. Use backend='reference' there")
    if name:
        raise RuntimeError(
            f"{op} has no derivative for {name}: its gradient comes from a kernel, for backward() only. "
            "Use backend='reference' there"
        )


def _may_have_tangent(x: Tensor) -> bool:
    """Return whether x may have a tangent.

    torch can tell only for tensors that are not wrapped, or wrapped once by the innermost jvp; True for all others.
    """
    functorch = torch._C._functorch
    if functorch.is_functorch_wrapped_tensor(x):
        innermost = functorch.peek_interpreter_stack()
        known = innermost is not None and innermost.key() == functorch.TransformType.Jvp
        known = known and functorch.maybe_get_level(x) == innermost.level()
        if not known or functorch.is_functorch_wrapped_tensor(functorch.get_unwrapped(x)):
            return True
    return forward_ad.unpack_dual(x).tangent is not None
