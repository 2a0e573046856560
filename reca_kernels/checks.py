"""Argument checks shared by several ops. Messages say what was wrong, what was expected and what to do."""

import math
import os
import sys
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

from reca_kernels import native
from reca_kernels.memory import learns

REDUCTIONS = ("mean", "sum", "none")
# Native versions of checks that take torch several operations of 3 microseconds each.
_index_outside = getattr(native.module, "index_outside", None)
_all_finite = getattr(native.module, "all_finite", None)


def dispatchable(op: str, **tensors: Tensor) -> None:
    """Check arguments that are not plain memory; the dispatcher may still be able to run the op on them.

    Raises:
        TypeError: An argument is not a tensor, or is a DTensor or a nested, sparse or quantized tensor.
        ValueError: Tensors are on several devices.
        RuntimeError: torch.jit.trace is active.
    """
    if not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None:
        raise RuntimeError(f"{op}: torch.jit.trace would bake in sizes and backends as constants; use torch.export")
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
        reject_dtensor(op, name, tensor)
        if tensor.is_nested or tensor.layout != torch.strided or tensor.is_quantized:
            kind = "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else str(tensor.layout)
            raise TypeError(
                f"{op}: {name} must be a dense tensor, got a {kind} one; convert it to a dense tensor first"
            )
    one_device(op, **tensors)


def reject_dtensor(op: str, name: str, tensor: Tensor) -> None:
    """Raise TypeError for a DTensor: a kernel would see only the local shard and compute one rank's gradients."""
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
    """Return the tensors that are not None."""
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def floating(op: str, **tensors: Tensor | None) -> None:
    """Raise TypeError for a tensor that is not of a floating-point dtype."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.dtype.is_floating_point:
            raise TypeError(f"{op}: {name} must be fp32, bf16 or fp16, got {tensor.dtype}")


def is_whole(value: object) -> bool:
    """Return whether a value is a whole number, also a symbolic one or one of NumPy. A bool is none."""
    return isinstance(value, int | torch.SymInt | Integral) and not isinstance(value, bool)


def whole(op: str, **values: object) -> None:
    """Raise TypeError for a value that is no whole number."""
    for name, value in values.items():
        if not is_whole(value):
            raise TypeError(f"{op}: {name} must be a whole number, got {value!r}")


def number(op: str, **values: float) -> None:
    """Raise TypeError for a value that is no number. The gradient of a tensor would be dropped silently."""
    for name, value in values.items():
        if not isinstance(value, float | int | torch.SymFloat | torch.SymInt | Real):
            raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")


def result_dtype(op: str, out_dtype: torch.dtype | None) -> None:
    """Raise TypeError for an out_dtype that is neither None nor of floating-point numbers."""
    if out_dtype is not None and not (isinstance(out_dtype, torch.dtype) and out_dtype.is_floating_point):
        raise TypeError(f"{op}: out_dtype must be a floating-point torch.dtype or None, got {out_dtype!r}")


def constant(op: str, **tensors: Tensor | None) -> None:
    """Raise ValueError for a tensor that requires a gradient that the op does not compute, rather than drop it."""
    for name, tensor in tensors.items():
        if learns(tensor):
            raise ValueError(f"{op}: {name} requires a gradient, which this op does not compute; detach it")


def integer(op: str, **tensors: Tensor) -> None:
    """Raise TypeError for a tensor that is not int32 or int64."""
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{op}: {name} must be int32 or int64, got {tensor.dtype}")


def one_reduction(op: str, reduction: str, known: Sequence[str] = REDUCTIONS) -> None:
    """Raise ValueError for an unknown reduction."""
    if reduction not in known:
        raise ValueError(f"{op}: reduction must be one of {', '.join(known)}, got {reduction!r}")


def label_rows(op: str, rows: int, labels: Tensor) -> None:
    """Raise TypeError or ValueError unless labels are integers, one per row."""
    integer(op, labels=labels)
    if labels.ndim != 1 or labels.shape[0] != rows:
        raise ValueError(f"{op}: labels must be [N] = [{rows}], one per row, got {list(labels.shape)}")


def cross_entropy_options(
    op: str, ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None, reduction: str
) -> None:
    """Check the options common to both forms of cross-entropy. Raise TypeError or ValueError."""
    whole(op, ignore_index=ignore_index)
    number(op, label_smoothing=label_smoothing, z_loss=z_loss, softcap=0.0 if softcap is None else softcap)
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1), got {label_smoothing}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{op}: softcap must be positive or None, got {softcap}")
    one_reduction(op, reduction)


# ---- checks of values: called in the body of a kernel op, and by a public function before it calls the reference


def _wanted(tensor: Tensor) -> bool:
    """Return whether to check values: always on CPUs; on GPUs, where it synchronises, only with RECA_CHECK=1."""
    return (tensor.is_cpu or os.environ.get("RECA_CHECK") == "1") and tensor.numel() > 0


def _outside(index: Tensor, low: int | None, high: int, skipped: int | None = None) -> int:
    """Return the position of the first value that is neither in [low, high) nor `skipped`, or -1 if there is none."""
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

    Where values are not checked, the loss of such a row is NaN.
    """
    if _wanted(labels) and (row := _outside(labels, 0, classes, ignore_index)) >= 0:
        raise ValueError(
            f"{op}: label {int(labels[row])} in row {row} is outside [0, {classes}) and is not "
            f"ignore_index={ignore_index}"
        )


def check_label_count(op: str, labels: Tensor, ignore_index: int, most: int | None) -> None:
    """Raise ValueError if more than `most` rows carry a label. None: no limit."""
    if most is None or not _wanted(labels):
        return
    count = int((labels != ignore_index).sum())
    if count > most:
        raise ValueError(f"{op}: {count} rows carry a label, more than max_labelled={most}; raise max_labelled")


def index_inside(op: str, name: str, index: Tensor, low: int | None, high: int) -> None:
    """Raise ValueError for an index outside [low, high). low None: no lower bound."""
    if _wanted(index) and (place := _outside(index, low, high)) >= 0:
        bounds = f"below {high}" if low is None else f"in [{low}, {high})"
        value = int(index.reshape(-1)[place])
        raise ValueError(f"{op}: {name} must be {bounds}, the rows that exist; got {value}")


def levels_inside(op: str, t: Tensor) -> None:
    """Raise ValueError for a noise level outside [0, 1], such as a timestep of 1000. NaN passes and propagates."""
    if _wanted(t) and bool((outside := (t < 0) | (t > 1)).any()):
        value = float(t[outside][0])
        raise ValueError(
            f"{op}: t must be in [0, 1] (1 is noise), got {value:g}; divide timesteps by the number of steps"
        )


def all_finite(x: Tensor) -> bool:
    """Return whether x, on the CPU, has no NaN and no infinity. The result may be False if its sum overflows."""
    if _all_finite is not None and x.dtype in native.DTYPES and x.is_contiguous():
        return _all_finite(native.DTYPES[x.dtype], x.data_ptr(), x.numel())
    return math.isfinite(x.detach().sum())


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """Return autocast's dtype for matmuls on this tensor's device; None outside autocast."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
