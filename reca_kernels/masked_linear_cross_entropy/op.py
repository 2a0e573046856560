"""Fused output head and cross-entropy over the rows that carry a label.

The full logits matrix is never materialised: linear_chunks.py computes loss and gradients for a chunk of rows at a
time. Gradients of fp16 parameters stay in fp32 until backward() multiplies them by the upstream gradient: in fp16,
values that the loss scale is meant to preserve would underflow before it is applied.
"""

from typing import Any

import torch
from torch import Tensor

from reca_kernels import checks, dispatch
from reca_kernels.kernel_op import kernel_op
from reca_kernels.masked_cross_entropy.options import SCHEMA, CrossEntropyOptions
from reca_kernels.masked_linear_cross_entropy import linear_chunks, reference
from reca_kernels.masked_linear_cross_entropy.kernels import Kernels
from reca_kernels.memory import graph_is_kept, has_values, learns, plain

OP = "masked_linear_cross_entropy"


def masked_linear_cross_entropy(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [N] int32 or int64
    bias: Tensor | None = None,  # [V]
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    chunk_rows: int | None = None,
    max_labelled: int | None = None,
    backend: str | None = None,
) -> Tensor:  # fp32 (fp64 for fp64 hidden), [] or [N]
    """Compute masked_cross_entropy(hidden @ weight.T + bias, labels) without the logits.

    Rows that carry no label are excluded from every matmul. The full logits matrix is never materialised: at most
    chunk_rows rows of it exist at a time, by default 512 on CPUs and as many as fit in 1/32 of the memory on GPUs. With
    reduction "mean" or "sum" the forward pass computes the gradients too and saves them instead of the logits; with
    "none" the backward pass recomputes the logits.

    Shapes       hidden [N, D], weight [V, D], labels [N], bias [V]; fp32, bf16, fp16 (fp64 on the reference).
    Returns      fp32 (fp64 for fp64 hidden): reduction "mean" over the rows that carry a label, 0 if there are none;
                 "sum"; "none": [N].
    Dtypes       Matmuls run in the dtype of hidden, or in autocast's dtype; fp16 on a CPU runs in fp32. The weight's
                 gradient is accumulated in fp32 over chunks and has the dtype of the weight, so it is not rounded to
                 autocast's dtype for an fp32 weight. Gradients of fp16 parameters stay in fp32 until backward() applies
                 the loss scale.
    fp64         fp64 hidden runs on the reference, under autocast too: weight and bias are converted to fp64, and the
                 logits of all rows, or of max_labelled rows, are materialised. Other backends refuse it. With hidden of
                 another dtype an fp64 weight or bias is converted to that dtype.
    max_labelled An upper bound on the rows that carry a label. If None, the op synchronises with a GPU once per call to
                 count them, and a captured CUDA graph multiplies all N rows. Matmuls run over as many rows as the
                 bound. A bound that is too small is detected on CPUs, and on GPUs with RECA_CHECK=1; without the check
                 the excess rows have loss NaN and gradient 0.

    Loss, labels and derivatives are those of `masked_cross_entropy`.

    Raises:
        ValueError: A shape, an option or a label is invalid, more rows carry a label than max_labelled, tensors are on
            several devices, or the backend is unknown.
        TypeError: hidden, weight or bias is not of a float dtype, labels are not int32 or int64, label_smoothing,
            z_loss or softcap is not a number, another option is not a whole one, or a tensor is sparse, nested,
            quantized or a DTensor.
        RuntimeError: The backend set by `backend` or RECA_BACKEND cannot run here, torch.jit.trace is active, a
            kernel's gradient is differentiated again, or the graph was traced for other gradients.
    """
    if not (raw := plain(hidden, weight, labels, optional=bias)):
        checks.dispatchable(OP, hidden=hidden, weight=weight, labels=labels, **checks.given(bias=bias))
    if hidden.ndim != 2:
        raise ValueError(f"{OP}: hidden must be [N, D], got {list(hidden.shape)}; flatten the batch first")
    if weight.ndim != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"{OP}: weight must be [V, D] = [V > 0, {hidden.shape[1]}], got {list(weight.shape)}. If FSDP or ZeRO-3 "
            "has sharded the weight, gather it first"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{OP}: bias must be [V] = [{weight.shape[0]}], got {list(bias.shape)}")
    checks.whole(OP, max_labelled=max_labelled or 0)
    check_chunk_rows(chunk_rows)
    if max_labelled is not None and max_labelled < 0:
        raise ValueError(f"{OP}: max_labelled must be at least 0 or None, got {max_labelled}")
    checks.floating(OP, hidden=hidden, weight=weight, bias=bias)
    checks.label_rows(OP, hidden.shape[0], labels)
    checks.cross_entropy_options(OP, ignore_index, label_smoothing, z_loss, softcap, reduction)
    backend = dispatch.choose(OP, hidden, backend)
    options = CrossEntropyOptions(ignore_index, label_smoothing, z_loss, softcap, reduction)
    if backend == "reference":
        if has_values(labels):
            _check_labels(labels, weight, ignore_index, max_labelled)
        return reference.masked_linear_cross_entropy(
            hidden, weight, labels, bias, max_labelled=max_labelled, **options._asdict()
        )
    dtype = checks.autocast_dtype(hidden) or hidden.dtype
    if backend == "cpu" and dtype == torch.float16:
        # Torch's fp16 matmuls are slow on CPUs, and logit gradients below 2^-24 would underflow before loss scaling.
        dtype = torch.float32
    # With reduction "none" the gradients are computed in the backward pass.
    needs = [reduction != "none" and learns(x) for x in (hidden, weight, bias)]
    settings = chunk_rows, max_labelled, dtype, needs, backend
    return _loss_and_gradients(raw, hidden, weight, bias, labels, None, *options, *settings)[0]


def _check_labels(labels: Tensor, weight: Tensor, ignore_index: int, max_labelled: int | None) -> None:
    checks.labels_inside(OP, labels, weight.shape[0], ignore_index)
    checks.check_label_count(OP, labels, ignore_index, max_labelled)


def check_chunk_rows(chunk_rows: int | None) -> None:
    """Raise TypeError or ValueError for a number of rows that is neither None nor at least 1."""
    checks.whole(OP, chunk_rows=chunk_rows or 0)
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"{OP}: chunk_rows must be at least 1 or None, got {chunk_rows}")


# ---- kernel ops ----


def _kept(parameter: Tensor, row_grad: Tensor | None) -> torch.dtype:
    """Return the dtype of a parameter's gradient until backward multiplies it by the upstream gradient."""
    early = row_grad is None and parameter.dtype == torch.float16
    return torch.float32 if early else parameter.dtype


def _fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, row_grad: Tensor | None, *rest: Any
) -> tuple[Tensor | None, ...]:
    reduction, needs = rest[4], rest[-2]
    loss = hidden.new_empty(labels.shape if reduction == "none" else (), dtype=torch.float32)
    gradients = [
        x.new_empty(x.shape, dtype=_kept(x, row_grad)) if x is not None and need else None
        for x, need in zip((hidden, weight, bias), needs, strict=True)
    ]
    return loss, *gradients


def _flops(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, row_grad: Tensor | None, *rest: Any, **_: Any
) -> int:
    """Count the FLOPs of the matmuls over rows that carry a label; over all rows if the labels cannot be read."""
    ignore_index, needs = rest[0], rest[-2]
    rows = int((labels != ignore_index).sum()) if plain(labels) else labels.shape[0]
    return 2 * rows * weight.numel() * (1 + sum(needs[:2]))


@kernel_op(
    f"{OP}(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? row_grad, {SCHEMA}, SymInt? chunk_rows, "
    "SymInt? max_labelled, ScalarType dtype, bool[] needs, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
    flops=_flops,
)
def _loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    row_grad: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    reduction: str,
    chunk_rows: int | None,
    max_labelled: int | None,
    dtype: torch.dtype,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return (loss, dx, dw, db), with None for a gradient that is not needed. Matmuls run in `dtype`."""
    if row_grad is None:
        _check_labels(labels, weight, ignore_index, max_labelled)
    kernels: Kernels = dispatch.load(backend, OP)
    dx, dw, db = (
        _kept(x, row_grad) if x is not None and need else None
        for x, need in zip((hidden, weight, bias), needs, strict=True)
    )
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        return linear_chunks.forward(
            kernels,
            hidden.to(dtype),
            weight.to(dtype),
            labels.contiguous(),
            None if bias is None else bias.to(dtype),
            row_grad,
            CrossEntropyOptions(ignore_index, label_smoothing, z_loss, softcap, reduction),
            chunk_rows,
            (dx, dw, db),
            max_labelled,
        )


@kernel_op(f"{OP}_scale(Tensor gradient, Tensor grad, str backend) -> Tensor", lambda x, *_: torch.empty_like(x))
def _scale(gradient: Tensor, grad: Tensor, backend: str, out: Tensor | None = None) -> Tensor:  # out: eager mode only
    kernels: Kernels = dispatch.load(backend, OP)
    gradient = gradient.contiguous()
    out = torch.empty_like(gradient) if out is None else out
    kernels.scale(gradient, grad.float(), out)
    return out


def _scaled(gradient: Tensor, grad: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """Return gradient times grad in the parameter's dtype, in place if no second backward pass can need it."""
    raw = plain(grad)
    if raw and gradient.dtype != dtype:
        return torch.mul(gradient, grad, out=torch.empty_like(gradient, dtype=dtype))
    if raw and not graph_is_kept():
        return _scale(raw, gradient, grad, backend, gradient)
    return _scale(raw, gradient, grad, backend).to(dtype)


# ---- gradient ----


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
    hidden, weight, bias, labels, _, *ctx.settings, needs, ctx.backend = inputs
    ctx.needs = [x is not None and x.requires_grad for x in (hidden, weight, bias)]
    if ctx.settings[4] != "none" and any(need and not made for need, made in zip(ctx.needs, needs, strict=True)):
        raise RuntimeError(
            f"{OP}: this graph was traced for tensors with other requires_grad flags and computes only their "
            "gradients; trace it again with these tensors"
        )
    ctx.save_for_backward(hidden, weight, bias, labels, *output[1:])
    ctx.mark_non_differentiable(*(x for x in output[1:] if x is not None))


def _backward(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, labels, *gradients = ctx.saved_tensors
    if ctx.settings[4] == "none":
        arguments = (hidden, weight, bias, labels, grad.contiguous(), *ctx.settings, ctx.needs, ctx.backend)
        raw = plain(grad, hidden, weight, labels, optional=bias)
        _, *gradients = _loss_and_gradients(raw, *arguments)
        return tuple(g if need else None for g, need in zip(gradients, ctx.needs, strict=True))
    parts = zip((hidden, weight, bias), gradients, ctx.needs, strict=True)
    return tuple(_scaled(g, grad, x.dtype, ctx.backend) if need else None for x, g, need in parts)


_loss_and_gradients.register_autograd(_backward, setup_context=_setup_context, of=["hidden", "weight", "bias"])
