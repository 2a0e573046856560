"""Output head and cross-entropy in one step, over the rows which carry a label.

The full logits matrix is never materialised: linear_chunks.py makes loss and gradients of a chunk of rows at a time. Of
fp16 parameters the gradients are kept in fp32 until backward() brings the upstream gradient: what a loss scale is there
to save is lost in fp16 as long as that scale is not in it.
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
) -> Tensor:  # fp32, of fp64 inputs fp64: [] or [N]
    """Compute masked_cross_entropy(hidden @ weight.T + bias, labels) without the logits.

    Rows that carry no label are left out of every matmul. The full logits matrix is never kept: at most chunk_rows
    rows of it exist at a time, by default 512 on CPUs and as many as 1/32 of the memory holds on GPUs. With reduction
    "mean" or "sum" the forward pass computes the gradients too and keeps them instead of the logits; with "none" the
    backward pass computes the logits once more.

    Shapes       hidden [N, D], weight [V, D], labels [N], bias [V]; fp32, bf16, fp16 (fp64 on the reference).
    Returns      fp32, of fp64 inputs fp64: reduction "mean" over the rows that carry a label, 0 when there are none;
                 "sum"; "none": [N].
    Dtypes       Matmuls run in the dtype of hidden, under autocast in its dtype; in fp32 where that is fp16 on a CPU.
                 The weight's gradient adds up in fp32 over chunks and has the dtype of the weight, so an fp32 weight
                 loses nothing to autocast. Gradients of fp16 parameters are kept in fp32 until backward() brings the
                 loss scale.
    max_labelled This is an upper bound on the rows that carry a label. If None, the op synchronises with a GPU once per
                 call to count them, and a captured CUDA graph multiplies all N rows. A larger bound costs the matmuls
                 of as many more rows. A bound that is too small is found on CPUs and with RECA_CHECK=1; else the rows
                 too many have loss NaN and gradient 0.

    Loss, labels and derivatives are those of `masked_cross_entropy`.

    Raises:
        ValueError: A shape, an option or a label does not fit, more rows carry a label than max_labelled, tensors are
            on several devices, or the backend is unknown.
        TypeError: hidden, weight or bias are not of a float dtype or labels not int32 or int64, label_smoothing, z_loss
            or softcap is a tensor, or a tensor is sparse, nested, quantized or a DTensor.
        RuntimeError: The backend that `backend` or RECA_BACKEND names cannot run here, or torch.jit.trace traces the
            call. A kernel's gradient is differentiated again, or the graph was traced for other gradients.
    """
    if not (raw := plain(hidden, weight, labels, optional=bias)):
        checks.dispatchable(OP, hidden=hidden, weight=weight, labels=labels, **checks.given(bias=bias))
    if hidden.ndim != 2:
        raise ValueError(f"{OP}: hidden must be [N, D], got {list(hidden.shape)}; flatten the batch first")
    if weight.ndim != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"{OP}: weight must be [V, D] = [V > 0, {hidden.shape[1]}], got {list(weight.shape)}. A weight that FSDP "
            "or ZeRO-3 has sharded is empty or flat here: gather it first"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{OP}: bias must be [V] = [{weight.shape[0]}], got {list(bias.shape)}")
    if max_labelled is not None and max_labelled < 0:
        raise ValueError(f"{OP}: max_labelled must be at least 0 or None, got {max_labelled}")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"{OP}: chunk_rows must be at least 1 or None, got {chunk_rows}")
    checks.floating(OP, hidden=hidden, weight=weight, bias=bias)
    checks.cross_entropy(OP, hidden.shape[0], labels, label_smoothing, z_loss, softcap, reduction)
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
        # Torch's fp16 products are slow there, and gradients over logits would end at 2^-24, before any loss scale.
        dtype = torch.float32
    # With reduction "none" the gradients are made in the backward pass.
    needs = [reduction != "none" and learns(x) for x in (hidden, weight, bias)]
    settings = chunk_rows, max_labelled, dtype, needs, backend
    return _loss_and_gradients(raw, hidden, weight, bias, labels, None, *options, *settings)[0]


def _check_labels(labels: Tensor, weight: Tensor, ignore_index: int, max_labelled: int | None) -> None:
    checks.labels_inside(OP, labels, weight.shape[0], ignore_index)
    checks.check_label_count(OP, labels, ignore_index, max_labelled)


# ---- kernel ops ----


def _kept(parameter: Tensor, row_grad: Tensor | None) -> torch.dtype:
    """Return the dtype of its gradient until the upstream gradient is known, and with it the loss scale."""
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
    """Count the products over rows that carry a label; over all rows where the labels cannot be looked at."""
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
    """Return (loss, dx, dw, db), None for what nobody needs. Products run in `dtype`."""
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
def _scale(gradient: Tensor, grad: Tensor, backend: str, out: Tensor | None = None) -> Tensor:  # out in eager mode
    kernels: Kernels = dispatch.load(backend, OP)
    gradient = gradient.contiguous()
    out = torch.empty_like(gradient) if out is None else out
    kernels.scale(gradient, grad.float(), out)
    return out


def _scaled(gradient: Tensor, grad: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """Return gradient times grad in the parameter's dtype: in place where no second backward pass can ask for it."""
    raw = plain(grad)
    if raw and gradient.dtype != dtype:
        return torch.mul(gradient, grad, out=torch.empty_like(gradient, dtype=dtype))
    if raw and not graph_is_kept():
        return _scale(raw, gradient, grad, backend, gradient)
    return _scale(raw, gradient, grad, backend).to(dtype)


# ---- the gradient ----


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
    hidden, weight, bias, labels, _, *ctx.settings, needs, ctx.backend = inputs
    ctx.needs = [x is not None and x.requires_grad for x in (hidden, weight, bias)]
    if ctx.settings[4] != "none" and any(need and not made for need, made in zip(ctx.needs, needs, strict=True)):
        raise RuntimeError(
            f"{OP}: this graph was traced with tensors that require other gradients, and makes only those; trace it "
            "again with tensors that require theirs"
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
