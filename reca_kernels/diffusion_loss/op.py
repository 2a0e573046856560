"""MAR's diffusion loss: noise prediction plus a variational bound with learned-range variance, in one pass."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reca_kernels import checks, dispatch
from reca_kernels.diffusion_loss import reference
from reca_kernels.diffusion_loss.kernels import Kernels
from reca_kernels.kernel_op import kernel_op
from reca_kernels.memory import has_values, mean_of, plain
from reca_kernels.philox.address import NOISE_SCHEMA, Philox, checked, flattened, named, tensors_of, unflattened

OP = "diffusion_loss"
WIDEST = 128  # most channels that fit into a kernel's buffers


def diffusion_add_noise(
    x0: Tensor,  # [N, C]
    t: Tensor,  # [M] int
    noise: Philox | Tensor,
    schedule: Tensor,  # [steps, 8]
    *,
    rows: Tensor | None = None,  # [M] int
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:  # [M, C]
    """Compute x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps.

    Row m uses x0[rows[m]], so repeated rows are not copied. `noise` is the address of eps (one sample id per row, C
    elements each), or explicit noise [M, C]. The result has no gradient. Indices are checked on CPUs, and on GPUs with
    RECA_CHECK=1. Without the check the kernels make a row with an index out of range NaN.

    Raises:
        ValueError: Shapes do not match, x0, noise or the schedule requires a gradient, an index is out of range, the
            address of the noise is not a valid `Philox`, or the backend is unknown.
        TypeError: x0 or out_dtype is not of a float dtype, t or rows are not int32 or int64, or a tensor is sparse,
            nested, quantized or a DTensor.
        RuntimeError: The backend set by `backend` or RECA_BACKEND cannot run here, `backend` does not support so many
            channels, or torch.jit.trace is active.
    """
    if not (raw := plain(x0, t, schedule, *tensors_of(OP, noise), optional=rows)):
        checks.dispatchable(OP, x0=x0, t=t, schedule=schedule, **checks.given(rows=rows), **named(noise))
    t, noise, rows = _checked(x0, t, noise, schedule, rows)
    checks.result_dtype(OP, out_dtype)
    out_dtype = out_dtype or x0.dtype
    backend = _backend(x0, [x0.dtype, out_dtype], x0, backend)
    with torch.no_grad():
        if backend == "reference":
            if has_values(t, rows):
                _check_indices(x0, t, schedule, rows)
            return reference.add_noise(x0, t, noise, schedule, rows).to(out_dtype)
        return _noisy(raw, x0, t, *flattened(noise), schedule, rows, out_dtype, backend)


def diffusion_loss(
    out: Tensor,  # [M, 2 C]
    x0: Tensor,  # [N, C]
    t: Tensor,  # [M] int
    noise: Philox | Tensor,
    schedule: Tensor,  # [steps, 8]
    *,
    rows: Tensor | None = None,  # [M] int
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:  # fp32 (fp64 for fp64 inputs), [] or [M]
    """Compute the mean over channels of (eps - out[:, :C])², plus the variational bound of out[:, C:] in bits.

    The variance is exp(r log beta + (1 - r) log posterior variance), r = (out[:, C:] + 1) / 2. The bound has no
    gradient with respect to the predicted noise. The bound of step 0 is the discretised likelihood, with bins of width
    2/255.

    reduction    "mean" over rows (0 without rows), "sum", or "none": [M]
    Bad index    Indices of rows and steps are checked on CPUs, and on GPUs with RECA_CHECK=1. Without the check the
                 kernels make the loss of a row with an index out of range NaN.
    Derivatives  The first derivative with respect to out; the gradient is computed in the same pass as the loss.
                 backend="reference" has all derivatives with respect to out.
    Source       Nichol and Dhariwal 2021; the loss of MAR (Li et al. 2024); see docs/kernels/diffusion_loss.md

    Raises:
        ValueError: Shapes do not match, the reduction or the backend is unknown, x0, noise or the schedule requires a
            gradient, an index is out of range, or the address of the noise is not a valid `Philox`.
        TypeError: out or x0 is not of a float dtype, t or rows are not int32 or int64, or a tensor is sparse, nested,
            quantized or a DTensor.
        RuntimeError: The backend set by `backend` or RECA_BACKEND cannot run here, `backend` does not support so many
            channels, torch.jit.trace is active, or a kernel's gradient is differentiated again.
    """
    if not (raw := plain(out, x0, t, schedule, *tensors_of(OP, noise), optional=rows)):
        checks.dispatchable(OP, x0=x0, t=t, schedule=schedule, **checks.given(rows=rows), out=out, **named(noise))
    t, noise, rows = _checked(x0, t, noise, schedule, rows)
    checks.one_reduction(OP, reduction)
    checks.floating(OP, out=out)
    if tuple(out.shape) != (t.shape[0], 2 * x0.shape[1]):
        raise ValueError(f"{OP}: out must be [M, 2 C] = [{t.shape[0]}, {2 * x0.shape[1]}], got {list(out.shape)}")
    backend = _backend(out, [x0.dtype], x0, backend)
    if backend == "reference":
        if has_values(t, rows):
            _check_indices(x0, t, schedule, rows)
        losses = reference.losses(out, x0, t, noise, schedule, rows)
    else:
        learns = not raw or (out.requires_grad and torch.is_grad_enabled())
        uneven = reduction == "none"
        losses, _ = _losses(raw, out, x0, t, *flattened(noise), schedule, rows, learns, uneven, backend)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else mean_of(losses.sum(), t.shape[0])


def _backend(tensor: Tensor, dtypes: Sequence[torch.dtype], x0: Tensor, backend: str | None) -> str:
    # Only the reference supports fp64.
    dtype = next((dtype for dtype in dtypes if dtype not in dispatch.FLOATS), tensor.dtype)
    chosen = dispatch.choose(OP, tensor, backend, dtype=dtype)
    width = x0.shape[1]
    if chosen != "reference" and width > WIDEST:
        if backend:
            raise RuntimeError(
                f"{OP}: backend {chosen!r} supports up to {WIDEST} channels, got {width}; use 'reference'"
            )
        return "reference"
    return chosen


def _check_indices(x0: Tensor, t: Tensor, schedule: Tensor, rows: Tensor | None) -> None:
    if rows is not None:
        checks.index_inside(OP, "rows", rows, 0, x0.shape[0])
    checks.index_inside(OP, "t", t, 0, schedule.shape[0])


def _checked(
    x0: Tensor, t: Tensor, noise: Philox | Tensor, schedule: Tensor, rows: Tensor | None
) -> tuple[Tensor, Philox | Tensor, Tensor | None]:
    checks.floating(OP, x0=x0)
    checks.integer(OP, t=t)
    if x0.ndim != 2 or x0.shape[1] == 0 or t.ndim != 1:
        raise ValueError(f"{OP}: x0 must be [N, C > 0] and t [M], got {list(x0.shape)} and {list(t.shape)}")
    checks.constant(OP, x0=x0, schedule=schedule, noise=noise if isinstance(noise, Tensor) else None)
    if rows is None and t.shape[0] != x0.shape[0]:
        raise ValueError(f"{OP}: without rows, t must be [N] = [{x0.shape[0]}], got [{t.shape[0]}]")
    if rows is not None:
        checks.integer(OP, rows=rows)
        if rows.shape != t.shape:
            raise ValueError(f"{OP}: rows must be [M] = [{t.shape[0]}] like t, got {list(rows.shape)}")
        rows = rows.long().contiguous()
    if schedule.ndim != 2 or schedule.shape[1] != len(reference.COLUMNS):
        raise ValueError(f"{OP}: schedule must be [steps, 8] from diffusion_schedule, got {list(schedule.shape)}")
    if isinstance(noise, Tensor):
        name, ids, expected = "noise", noise, [t.shape[0], x0.shape[1]]
        noise = (noise.to(x0.dtype) if torch.float64 in (noise.dtype, x0.dtype) else noise).contiguous()
    else:
        noise = checked(OP, noise)
        name, ids, expected = "noise.sample_ids", noise.sample_ids, [t.shape[0]]
    if list(ids.shape) != expected:
        raise ValueError(f"{OP}: {name} must be {expected}, got {list(ids.shape)}")
    return t.long().contiguous(), noise, rows


# ---- kernel ops ----


@kernel_op(
    f"diffusion_add_noise(Tensor x0, Tensor t, {NOISE_SCHEMA}, Tensor table, Tensor? rows, ScalarType dtype, "
    "str backend) -> Tensor",
    lambda x0, t, seed, ids, stream, explicit, table, rows, dtype, backend: x0.new_empty(
        t.shape[0], x0.shape[1], dtype=dtype
    ),
)
def _noisy(
    x0: Tensor,
    t: Tensor,
    seed: Tensor | None,
    ids: Tensor | None,
    stream: int,
    explicit: Tensor | None,
    table: Tensor,
    rows: Tensor | None,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """Return x_t [M, C]."""
    kernels: Kernels = dispatch.load(backend, OP)
    _check_indices(x0, t, table, rows)
    out = torch.empty(t.shape[0], x0.shape[1], dtype=dtype, device=x0.device)
    noise = unflattened(seed, ids, stream, explicit)
    kernels.add_noise(x0.contiguous(), t, noise, table.float().contiguous(), rows, out)
    return out


def _losses_fake(out: Tensor, *rest: Any) -> tuple[Tensor, Tensor | None]:
    learns = rest[-3]
    dtype = torch.float32 if out.dtype == torch.float16 else out.dtype
    gradient = torch.empty_like(out, dtype=dtype, memory_format=torch.contiguous_format) if learns else None
    return out.new_empty(out.shape[0], dtype=torch.float32), gradient


@kernel_op(
    f"diffusion_loss(Tensor out, Tensor x0, Tensor t, {NOISE_SCHEMA}, Tensor table, Tensor? rows, bool learns, "
    "bool uneven, str backend) -> (Tensor, Tensor)",
    _losses_fake,
)
def _losses(
    out: Tensor,
    x0: Tensor,
    t: Tensor,
    seed: Tensor | None,
    ids: Tensor | None,
    stream: int,
    explicit: Tensor | None,
    table: Tensor,
    rows: Tensor | None,
    learns: bool,
    uneven: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """Return the losses per row and, if `learns`, their derivative with respect to out.

    uneven: upstream gradients differ between rows, and a zero also zeroes NaN and infinity in its row's gradient.
    """
    _check_indices(x0, t, table, rows)
    # For fp16 the gradient stays in fp32 until backward multiplies it by the upstream gradient with the loss scale.
    out = (out.float() if learns and out.dtype == torch.float16 else out).contiguous()
    gradient = torch.empty_like(out) if learns else None
    noise, table = unflattened(seed, ids, stream, explicit), table.float().contiguous()
    kernels: Kernels = dispatch.load(backend, OP)
    return kernels.losses(out, x0.contiguous(), t, noise, table, rows, gradient), gradient


# ---- gradient ----


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    out, x0, t, seed, ids, ctx.stream, explicit, table, rows, _, ctx.uneven, ctx.backend = inputs
    ctx.gradient = output[1]
    ctx.mark_non_differentiable(ctx.gradient)
    ctx.save_for_backward(out, x0, t, seed, ids, explicit, table, rows)


def _backward(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Tensor]:
    """Multiply the gradient from the forward pass by `grad`.

    On plain memory this is done in place, so a second backward pass recomputes the gradient.
    """
    out, x0, t, seed, ids, explicit, table, rows = ctx.saved_tensors
    noise = seed, ids, ctx.stream, explicit
    raw = plain(grad, out, x0, t, table, *tensors_of(OP, unflattened(*noise)), optional=rows)
    gradient, ctx.gradient = ctx.gradient, None if raw else ctx.gradient
    if gradient is None:
        _, gradient = _losses(raw, out, x0, t, *noise, table, rows, True, ctx.uneven, ctx.backend)
    if not raw:
        gradient = torch.where((grad == 0)[:, None], 0, gradient * grad[:, None])
    else:
        gradient.mul_(grad[:, None])
        if ctx.uneven and (grad.is_cuda or not grad.all()):  # on a CPU the check is cheap and can skip the fill
            gradient.masked_fill_((grad == 0)[:, None], 0)
    return (gradient.to(out.dtype),)


_losses.register_autograd(_backward, setup_context=_setup_context, of=["out"])
