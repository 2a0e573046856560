"""What a run computes in: fp32, bf16 by autocast, or fp64, which tests compare splits of a step in."""

import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

M = TypeVar("M", bound=nn.Module)

# Products and norms want all operands of one type; everything else promotes fp32 to fp64 by itself.
_PRODUCTS = {
    torch.nn.functional.linear,
    torch.nn.functional.layer_norm,
    torch.nn.functional.group_norm,
    torch.nn.functional.rms_norm,
    torch.nn.functional.scaled_dot_product_attention,
    *(
        getattr(module, name)
        for name in ("matmul", "bmm", "cdist", "conv1d", "conv2d", "conv_transpose2d", "einsum")
        for module in (torch, torch.nn.functional)
        if hasattr(module, name)
    ),
    Tensor.matmul,
    Tensor.__matmul__,
    Tensor.__rmatmul__,
    Tensor.bmm,
}


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """Return the context of forward passes, which may be entered again and again. precision: of TrainConfig."""
    if precision == "fp64":
        return KeepDouble()
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@contextlib.contextmanager
def tf32_products(precision: str, device: torch.device) -> Iterator[None]:
    """Multiply in TF32 on a GPU what stays fp32 in a run of bf16: frozen encoders that run outside of autocast.

    cuDNN's convolutions do so by torch's default. Of the operands 10 bits of mantissa count, sums are fp32.
    """
    if precision != "bf16" or device.type != "cuda":
        yield
        return
    with _matmul_precision("high"):
        yield


@contextlib.contextmanager
def attention_without_plans() -> Iterator[None]:
    """Keep torch's attention off cuDNN, which it prefers on Hopper and Blackwell.

    cuDNN makes a plan for every new shape, 0.4 to 1 s each (modelscope/FunASR#3704), and shapes are new where images
    differ in size or in how much of them is hidden.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@contextlib.contextmanager
def training_kernels(precision: str, device: torch.device) -> Iterator[None]:
    """Choose what a GPU multiplies and attends by in a training step. precision: of TrainConfig."""
    with tf32_products(precision, device), attention_without_plans():
        yield


def fp32_products() -> contextlib.AbstractContextManager:
    """Return the context of products that choose among neighbours, such as codes, which TF32 would confuse."""
    return _matmul_precision("highest")


@contextlib.contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def cast(module: M, precision: str) -> M:
    """Make all numbers of a model fp64 in a run of fp64; leave them as they are in any other."""
    return module.double() if precision == "fp64" else module


class KeepDouble(TorchFunctionMode):
    """Compute in fp64 what meets an fp64 tensor, whatever the code asks for.

    A cast of fp64 to fp32 is none, and fp32 operands of a product with fp64 are cast. So models and libraries that take
    a norm or a softmax in fp32 take it in fp64. Numbers that never meet a weight (random draws, rotary angles) are
    those of fp32.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, Tensor) and first.dtype == torch.float64:
            if func is Tensor.float:
                return first
            if func in (Tensor.to, Tensor.type_as) and any(
                isinstance(a, Tensor) and a.dtype == torch.float32 for a in args[1:]
            ):
                args = (first, *(a.double() if isinstance(a, Tensor) else a for a in args[1:]))
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
        if func in _PRODUCTS:
            operands = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            if any(x.dtype == torch.float64 for x in operands):
                args, kwargs = tuple(map(_doubled, args)), {k: _doubled(v) for k, v in kwargs.items()}
        return func(*args, **kwargs)


def _doubled(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.dtype == torch.float32 else value
