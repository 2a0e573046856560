"""Tensors that the host makes from numbers: kept outside of modes, and copied to a GPU without waiting for it."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only


def on_device(x: Tensor, device: torch.device | str) -> Tensor:
    """Copy x to `device`.

    A plain `x.to(device)` of host memory waits until the GPU has done all it was given before. From pinned memory the
    copy stands in the GPU's queue instead, and the pinned block is used again once it is through.
    """
    device = torch.device(device)
    if x.device.type == "cpu" and device.type == "cuda" and torch.cuda.is_available():
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


@torch.compiler.assume_constant_result
def indexed(device: torch.device | str) -> torch.device:
    """Return the device of tensors made there, which can be compared and kept: "cuda" becomes the current one."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu") if device.type == "cpu" else device


@contextmanager
def no_modes() -> Iterator[None]:
    """Make tensors that are kept: no later call finds a fake one, one of inference mode or of a transform."""
    with (
        temporarily_clear_interpreter_stack(),
        torch.inference_mode(False),
        torch._C.DisableTorchFunction(),
        _disable_current_modes(),
    ):
        yield


def in_mode(tensors: Any) -> Any:
    """Return kept tensors, in any nest, as the active dispatch mode wants them: fake, or known to a traced graph."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() == 0:
        return tensors
    return tree_map_only(Tensor, torch.ops.aten.lift_fresh, tensors)


def outside_of_modes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a function that makes tensors from numbers: `no_modes` makes and keeps them, `in_mode` hands them out.

    Arguments are hashable.
    """

    @functools.lru_cache(maxsize=32)
    def kept(*arguments: Any) -> Any:
        with no_modes():
            return function(*arguments)

    handed_out = functools.wraps(function)(lambda *arguments: in_mode(kept(*arguments)))
    handed_out.cache_clear = kept.cache_clear  # type: ignore[attr-defined]
    return handed_out
