"""Tensors built on the host: cached outside of dispatch modes, and copied to a GPU without host synchronisation."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from reca_kernels import compiling


def on_device(x: Tensor, device: torch.device | str) -> Tensor:
    """Copy x to `device` without host synchronisation.

    A plain `x.to(device)` from pageable memory waits until the GPU has finished all queued work. A copy from pinned
    memory is queued on the stream instead, and the pinned block is reused after the copy has completed.
    """
    device = torch.device(device)
    if x.device.type == "cpu" and device.type == "cuda" and torch.cuda.is_available():
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


@compiling.assume_constant_result
def indexed(device: torch.device | str) -> torch.device:
    """Return the device with its index, which can be compared and cached: "cuda" becomes the current device."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu") if device.type == "cpu" else device


@contextmanager
def no_modes() -> Iterator[None]:
    """Disable all modes while tensors to be cached are made.

    No later call then gets a fake tensor, an inference tensor or one wrapped by a transform out of the cache.
    """
    with (
        temporarily_clear_interpreter_stack(),
        torch.inference_mode(False),
        torch._C.DisableTorchFunction(),
        _disable_current_modes(),
    ):
        yield


def in_mode(tensors: Any) -> Any:
    """Return cached tensors, nested in any way, lifted into the active dispatch mode: faked, or traced as constants."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() == 0:
        return tensors
    return tree_map_only(Tensor, torch.ops.aten.lift_fresh, tensors)


def outside_of_modes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a function that builds tensors: they are made under `no_modes`, cached, and returned by `in_mode`.

    Arguments must be hashable.
    """

    @functools.lru_cache(maxsize=32)
    def kept(*arguments: Any) -> Any:
        with no_modes():
            return function(*arguments)

    handed_out = functools.wraps(function)(lambda *arguments: in_mode(kept(*arguments)))
    handed_out.cache_clear = kept.cache_clear  # type: ignore[attr-defined]
    return handed_out
