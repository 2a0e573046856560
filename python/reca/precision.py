"""Precision of a run: fp32, bf16 by autocast, or fp64, in which tests compare splits of a step."""

import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from reca.options.fields import RecipeError

M = TypeVar("M", bound=nn.Module)
BF16_CAPABILITY = (8, 0)  # Ampere. Older GPUs emulate bf16 more slowly than they compute fp32; Triton refuses it there.

# Matrix products and norms require operands of one dtype; other functions promote fp32 to fp64.
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


def check_usable(precision: str, device: torch.device) -> None:
    """Raise RecipeError for bf16 on a GPU without it. precision: train.precision."""
    if precision == "bf16" and device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < BF16_CAPABILITY:
            raise RecipeError(
                f"train.precision=bf16 needs a GPU of compute capability {BF16_CAPABILITY[0]}.{BF16_CAPABILITY[1]} or "
                f"newer (Ampere), and this one has {capability[0]}.{capability[1]}: use another, or set "
                "train.precision=fp32, which needs more memory"
            )


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """Return a re-enterable context for forward passes. precision: train.precision."""
    if precision == "fp64":
        return KeepDouble()
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@contextlib.contextmanager
def fp32_by_default() -> Iterator[None]:
    """Make new tensors fp32 by default inside this context, whatever the caller has set."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def usual_defaults() -> Iterator[None]:
    """Make new tensors fp32 and on the CPU by default inside this context, whatever the caller has set."""
    elsewhere = torch.get_default_device().type != "cpu"
    # Only if needed: as a mode, the device would slow every call.
    with fp32_by_default(), torch.device("cpu") if elsewhere else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def outside_of_autocast() -> Iterator[None]:
    """Leave the caller's autocast contexts inside this one.

    Within them, torch keeps cast copies of weights until the outermost one ends: every step would use those of the
    first.
    """
    depth = torch.autocast_increment_nesting() - 1
    for _ in range(depth + 1):
        torch.autocast_decrement_nesting()
    enabled = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    for kind in enabled:
        torch.set_autocast_enabled(kind, False)
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        for kind in enabled:
            torch.set_autocast_enabled(kind, True)
        for _ in range(depth):
            torch.autocast_increment_nesting()


@contextlib.contextmanager
def tf32_products(precision: str, device: torch.device) -> Iterator[None]:
    """Use TF32 on a GPU for the fp32 matrix products of a bf16 run: frozen encoders that run outside of autocast.

    cuDNN's convolutions already do by default. Operands are rounded to 10 mantissa bits and accumulated in fp32.
    """
    if precision != "bf16" or device.type != "cuda":
        yield
        return
    with _matmul_precision("high"):
        yield


@contextlib.contextmanager
def attention_without_plans() -> Iterator[None]:
    """Disable torch's cuDNN attention, which is preferred on Hopper and Blackwell.

    cuDNN builds a plan for every new shape, 0.4 to 1 s each (modelscope/FunASR#3704), and shapes change with the size
    of images and the number of masked tokens.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@contextlib.contextmanager
def training_kernels(precision: str, device: torch.device) -> Iterator[None]:
    """Set the matrix-product precision and attention backends of training. precision: train.precision."""
    with tf32_products(precision, device), attention_without_plans():
        yield


def fp32_products() -> contextlib.AbstractContextManager:
    """Return a context with full fp32 products, for nearest-neighbour lookups that TF32 rounding could change."""
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
    """Cast a model to fp64 for precision "fp64"; otherwise return it unchanged."""
    return module.double() if precision == "fp64" else module


class KeepDouble(TorchFunctionMode):
    """Keep computations with fp64 tensors in fp64, even if the code casts to fp32.

    Casts from fp64 to fp32 are ignored, and fp32 operands of a product with fp64 are cast to fp64. So norms and softmax
    that models and libraries compute in fp32 are computed in fp64. Values that are computed without fp64 operands
    (random draws, rotary angles) remain fp32.
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
