"""Checks that several ops share. Messages say what was wrong, what was expected and what to do."""

import math
import os
import sys

import torch
from torch import Tensor

from reca_kernels import native
from reca_kernels.memory import learns

REDUCTIONS = ("mean", "sum", "none")
# Torch does the same by operations of 3 microseconds each.
_index_outside = getattr(native.module, "index_outside", None)
_all_finite = getattr(native.module, "all_finite", None)


def dispatchable(op: str, **tensors: Tensor) -> None:
    """Check what is not plain memory: the dispatcher may know how to run an op on it.

    Raises:
        TypeError: For what an op cannot take in any way.
        ValueError: For tensors on several devices.
        RuntimeError: Under torch.jit.trace.
    """
    if not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None:
        raise RuntimeError(f"{op}: torch.jit.trace would keep sizes and choices as constants; use torch.export")
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
        reject_dtensor(op, name, tensor)
        if tensor.is_nested or tensor.layout != torch.strided or tensor.is_quantized:
            kind = "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else str(tensor.layout)
            raise TypeError(
                f"{op}: {name} must be a dense tensor, whose elements lie in memory, got a {kind} one; "
                "make it dense first"
            )
    one_device(op, **tensors)


def reject_dtensor(op: str, name: str, tensor: Tensor) -> None:
    """Raise TypeError for a DTensor: a kernel would see the local shard only and give gradients of one rank."""
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is not None and isinstance(tensor, distributed.DTensor):
        raise TypeError(
            f"{op}: {name} is a DTensor. Call the op inside the module's forward, where FSDP2 has gathered the "
            f"parameters, or pass {name}.full_tensor()"
        )


def one_device(op: str, **tensors: Tensor) -> None:
    """Raise ValueError for tensors on several devices."""
    if len({tensor.device for tensor in tensors.values()}) > 1:
        places = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise ValueError(f"{op}: all tensors must be on one device, got {places}")


def given(**tensors: Tensor | None) -> dict[str, Tensor]:
    """Return the optional tensors that are there."""
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def floating(op: str, **tensors: Tensor | None) -> None:
    """Raise TypeError for a tensor of integers, booleans or complex numbers."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.dtype.is_floating_point:
            raise TypeError(f"{op}: {name} must be fp32, bf16 or fp16, got {tensor.dtype}")


def constant(op: str, **tensors: Tensor | None) -> None:
    """Raise ValueError for a tensor that requires a gradient, where the op gives none: it would be lost in silence."""
    for name, tensor in tensors.items():
        if learns(tensor):
            raise ValueError(f"{op}: {name} requires a gradient, which this op does not give; detach it")


def integer(op: str, **tensors: Tensor) -> None:
    """Raise TypeError for a tensor that is not int32 or int64."""
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{op}: {name} must be int32 or int64, got {tensor.dtype}")


def cross_entropy(
    op: str, rows: int, labels: Tensor, label_smoothing: float, z_loss: float, softcap: float | None, reduction: str
) -> None:
    """Check what both forms of cross-entropy take. Raise TypeError or ValueError."""
    integer(op, labels=labels)
    numbers = {"label_smoothing": label_smoothing, "z_loss": z_loss, "softcap": 0.0 if softcap is None else softcap}
    for name, value in numbers.items():
        if value is None or isinstance(value, Tensor):  # a tensor's gradient would be lost in silence
            raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    if labels.ndim != 1 or labels.shape[0] != rows:
        raise ValueError(f"{op}: labels must be [N] = [{rows}], one per row, got {list(labels.shape)}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1), got {label_smoothing}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{op}: softcap must be above 0 or None, got {softcap}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")


# ---- values: a kernel op's body looks at them, and a public function before it calls the definition


def _wanted(tensor: Tensor) -> bool:
    """Return whether to look at the values: on CPU, where that costs no wait; elsewhere only with RECA_CHECK=1."""
    return (tensor.is_cpu or os.environ.get("RECA_CHECK") == "1") and tensor.numel() > 0


def _outside(index: Tensor, low: int | None, high: int, skipped: int | None = None) -> int:
    """Return the first place of a number that is neither in [low, high) nor `skipped`; -1: none."""
    if _index_outside is not None and index.is_cpu and index.is_contiguous():
        least = -(2**63) if low is None else low
        return _index_outside(index.data_ptr(), index.dtype == torch.int64, index.numel(), least, high, skipped)
    outside = index >= high
    if low is not None:
        outside |= index < low
    if skipped is not None:
        outside &= index != skipped
    places = outside.reshape(-1).nonzero()
    return int(places[0]) if len(places) else -1


def labels_inside(op: str, labels: Tensor, classes: int, ignore_index: int) -> None:
    """Raise ValueError for a label outside [0, classes) that is not ignore_index.

    Unchecked, such a row makes the loss NaN.
    """
    if _wanted(labels) and (row := _outside(labels, 0, classes, ignore_index)) >= 0:
        raise ValueError(
            f"{op}: label {int(labels[row])} in row {row} is outside [0, {classes}) and is not "
            f"ignore_index={ignore_index}"
        )


def check_label_count(op: str, labels: Tensor, ignore_index: int, most: int | None) -> None:
    """Raise ValueError where more than `most` rows carry a label; None: any number may."""
    if most is None or not _wanted(labels):
        return
    count = int((labels != ignore_index).sum())
    if count > most:
        raise ValueError(f"{op}: {count} rows carry a label, which must not be more than max_labelled={most}")


def index_inside(op: str, name: str, index: Tensor, low: int | None, high: int) -> None:
    """Raise ValueError for an index outside [low, high); low None: no lower bound."""
    if _wanted(index) and (place := _outside(index, low, high)) >= 0:
        bounds = f"below {high}" if low is None else f"in [{low}, {high})"
        value = int(index.reshape(-1)[place])
        raise ValueError(f"{op}: {name} must be {bounds}, the number of rows that are there; got {value}")


def levels_inside(op: str, t: Tensor) -> None:
    """Raise ValueError for a noise level outside [0, 1], such as a timestep of 1000. NaN is none, and stays."""
    if _wanted(t) and bool((outside := (t < 0) | (t > 1)).any()):
        value = float(t[outside][0])
        raise ValueError(f"{op}: t must be in [0, 1] (1 is noise), got {value:g}; divide timesteps by their number")


def all_finite(x: Tensor) -> bool:
    """Return whether x, on the CPU, holds no NaN and no infinity; False also where its sum is too large."""
    if _all_finite is not None and x.dtype in native.DTYPES and x.is_contiguous():
        return _all_finite(native.DTYPES[x.dtype], x.data_ptr(), x.numel())
    return math.isfinite(x.detach().sum())


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """Return autocast's dtype of matrix products on this tensor's device; None outside autocast."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
