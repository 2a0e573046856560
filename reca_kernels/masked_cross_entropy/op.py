"""Cross-entropy that reads only the rows that carry a label."""

from typing import Any

import torch
from torch import Tensor

from reca_kernels import checks, dispatch
from reca_kernels.kernel_op import kernel_op
from reca_kernels.masked_cross_entropy import reference
from reca_kernels.masked_cross_entropy.kernels import Kernels
from reca_kernels.masked_cross_entropy.options import SCHEMA, CrossEntropyOptions
from reca_kernels.memory import has_values, learns, plain

OP = "masked_cross_entropy"


def masked_cross_entropy(
    logits: Tensor,  # [N, V]
    labels: Tensor,  # [N] int32 or int64
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor:  # fp32 (fp64 for fp64 inputs), [] or [N]
    """Compute cross-entropy over the rows whose label is not `ignore_index`.

    Other rows are not read: their loss and gradient are 0.

    With z = softcap tanh(logits / softcap), or z = logits without a softcap, and p = softmax(z), the loss of a row is

        -(1 - label_smoothing) log p_label - label_smoothing mean_j(log p_j) + z_loss (log sum_j exp z_j)²

    Shapes       logits [N, V] with any row stride; fp32, bf16, fp16 (fp64 on the reference). labels [N].
    Returns      fp32 (fp64 for fp64 inputs): reduction "mean" over the rows that carry a label, 0 if there are none;
                 "sum"; "none": [N].
    inplace      The backward pass overwrites the logits with the gradient. They must be the result of an operation, and
                 no other backward may need them. Under torch.compile the compiler decides.
    Autocast     The dtype of the logits does not change; the arithmetic is fp32.
    Bad labels   Labels outside [0, V) are detected on CPUs, and on GPUs with RECA_CHECK=1. Without the check the loss
                 of such a row is NaN and its gradient 0.
    Derivatives  First derivatives; backend="reference" has all.

    Raises:
        ValueError: A shape, an option or a label is invalid, tensors are on several devices, inplace=True would
            overwrite a leaf tensor or overlapping rows, or the backend is unknown.
        TypeError: Logits are not of a float dtype, labels are not int32 or int64, label_smoothing, z_loss or softcap is
            not a number, ignore_index is not a whole one, or a tensor is sparse, nested, quantized or a DTensor.
        RuntimeError: The backend set by `backend` or RECA_BACKEND cannot run here, torch.jit.trace is active, a
            kernel's gradient is differentiated again, or inplace=True has already overwritten the logits.
    """
    if not (raw := plain(logits, labels)):
        checks.dispatchable(OP, logits=logits, labels=labels)
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"{OP}: logits must be [N, V] with V > 0, got {list(logits.shape)}; flatten the batch first")
    checks.floating(OP, logits=logits)
    checks.label_rows(OP, logits.shape[0], labels)
    checks.cross_entropy_options(OP, ignore_index, label_smoothing, z_loss, softcap, reduction)
    backend = dispatch.choose(OP, logits, backend)
    options = CrossEntropyOptions(ignore_index, label_smoothing, z_loss, softcap, reduction)
    if inplace and learns(logits):
        _check_inplace(logits)
    if backend == "reference":
        if has_values(labels):
            checks.labels_inside(OP, labels, logits.shape[1], ignore_index)
        return reference.masked_cross_entropy(logits, labels, **options._asdict())
    return _forward(raw, logits, labels, *options, inplace, backend)[0]


def _check_inplace(logits: Tensor) -> None:
    if logits.is_leaf and logits.requires_grad:
        raise ValueError(
            f"{OP}: inplace=True would overwrite a leaf tensor with its gradient; pass the result of an operation, or "
            "use inplace=False"
        )
    if logits.stride(1) != 1 or logits.stride(0) < logits.shape[1]:
        raise ValueError(
            f"{OP}: inplace=True needs contiguous rows that do not overlap, got strides {logits.stride()} for shape "
            f"{list(logits.shape)}"
        )


# ---- kernel ops ----


def _forward_fake(logits: Tensor, labels: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows, reduction = logits.shape[0], rest[4]
    loss, stats, scale = (
        logits.new_empty(shape, dtype=torch.float32)
        for shape in ((rows,) if reduction == "none" else (), (rows, 2), ())
    )
    return loss, stats, scale


@kernel_op(
    f"{OP}(Tensor logits, Tensor labels, {SCHEMA}, bool inplace, str backend) -> (Tensor, Tensor, Tensor)",
    _forward_fake,
)
def _forward(logits: Tensor, labels: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *options, _, backend = rest
    checks.labels_inside(OP, labels, logits.shape[1], options[0])
    kernels: Kernels = dispatch.load(backend, OP)
    return kernels.forward(_rows(logits), labels.contiguous(), CrossEntropyOptions(*options))


@kernel_op(
    f"{OP}_backward(Tensor grad, Tensor scale, Tensor logits, Tensor labels, Tensor stats, {SCHEMA}, str backend)"
    " -> Tensor",
    lambda grad, scale, logits, *_: logits.new_empty(logits.shape),
)
def _gradient(
    grad: Tensor,
    scale: Tensor,
    logits: Tensor,
    labels: Tensor,
    stats: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    reduction: str,
    backend: str,
    out: Tensor | None = None,  # eager mode only; may be the logits
) -> Tensor:
    options = CrossEntropyOptions(ignore_index, label_smoothing, z_loss, softcap, reduction)
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if out is None else out
    kernels: Kernels = dispatch.load(backend, OP)
    kernels.backward(grad.float(), scale, _rows(logits), labels.contiguous(), stats, options, out)
    return out


def _rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _in_step(logits: Tensor, backend: str) -> Tensor | None:
    """Allocate a gradient with the alignment and the row stride of the logits, for equal vector accesses to both.

    Return None if no particular layout is needed, as on a CPU. There oneDNN's bf16 matmuls with AMX read padding behind
    the rows and multiply it by 0, so it must not contain NaN.
    """
    pitch, along = logits.stride()
    is_slice = not 0 <= pitch - logits.shape[1] <= 1024
    if backend == "cpu" or along != 1 or is_slice:
        return None
    lead = logits.data_ptr() % 16 // logits.element_size()
    if lead == 0 or logits.numel() == 0:
        return torch.empty_strided(logits.shape, (pitch, 1), dtype=logits.dtype, device=logits.device)
    memory = torch.empty(lead + logits.shape[0] * pitch, dtype=logits.dtype, device=logits.device)
    return memory.as_strided(logits.shape, (pitch, 1), lead)


# ---- gradient ----


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, labels, *ctx.options, ctx.inplace, ctx.backend = inputs
    _, stats, scale = output
    ctx.save_for_backward(logits, labels, stats, scale)
    ctx.mark_non_differentiable(stats, scale)
    ctx.spent = False


def _backward(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Tensor]:
    if ctx.spent:
        raise RuntimeError(f"{OP}: inplace=True overwrote the logits; a second backward needs inplace=False")
    logits, labels, stats, scale = ctx.saved_tensors
    arguments = (grad, scale, logits, labels, stats, *ctx.options, ctx.backend)
    if not plain(grad, logits, labels):
        return (_gradient(False, *arguments),)
    gradient = _gradient(True, *arguments, logits.detach() if ctx.inplace else _in_step(logits, ctx.backend))
    if ctx.inplace:
        ctx.spent = True
        torch.autograd.graph.increment_version(logits)
    return (gradient,)


_forward.register_autograd(_backward, setup_context=_setup_context, of=["logits"])
