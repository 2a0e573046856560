"""Flow matching: the noisy input, and the loss against the velocity, with noise that is drawn again, never stored.

A backend's file holds, for contiguous images [C, H, W] of one dtype and noise either a Philox address or a contiguous
tensor in the order of the prediction,

    prepare(images, t [B] fp32, noise, patch, out)                    writes x_t, flat, into out
    losses(pred, images, noise, patch, gradient) -> fp32 [B]          sums of squared errors; writes their derivative by
                                                                      pred into gradient unless that is None
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reca_kernels import checks, dispatch, library
from reca_kernels.ops.philox import Philox, checked
from reca_kernels.reference import flow_matching as reference

OP = "flow_matching"


def flow_matching_prepare(
    x0: Tensor | Sequence[Tensor],  # [B, C, H, W], or B times [C, H, W]
    t: Tensor,  # [B]
    noise: Philox | Tensor,
    *,
    patch: int = 1,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """x_t = (1 - t) x0 + t eps with eps standard normal. t = 1 is noise (Liu et al. 2022, arXiv 2209.03003).

    x0        a batch, or a list of images of different sizes; fp32, bf16, fp16
    t         noise level per image, in [0, 1]
    noise     where to draw eps (reca_kernels.Philox, one sample id per image), or eps itself, shaped like the result
    patch     with p = 1 and a batch, the result is shaped like x0. Otherwise it is tokens [T, p p C]: the images one
              after another, patches row by row, inside a patch (row, column, channel). Element i of an image in this
              order is element i of its noise.
    Not differentiable. Raises ValueError for shapes that do not fit.
    """
    images = _images(x0, patch)
    checks.local(OP, t=t, **({"x0": x0} if isinstance(x0, Tensor) else {}))
    t, noise = _level(t, images), _noise(noise, images)
    out_dtype = out_dtype or images[0].dtype
    backend = dispatch.choose(OP, images[0], backend)
    with torch.no_grad():
        flat = _prepare(images, t if backend == "reference" else t.float(), noise, patch, out_dtype, backend)
    return flat.view(_shape(x0, patch))


def flow_matching_loss(
    pred: Tensor,
    x0: Tensor | Sequence[Tensor],  # [B, C, H, W], or B times [C, H, W]
    t: Tensor,  # [B]
    noise: Philox | Tensor,
    *,
    patch: int = 1,
    weight: Tensor | None = None,  # [B]
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:  # fp32 [] or [B]
    """Squared error of a predicted velocity against eps - x0, whose noise is drawn again from its address.

    pred       shaped like flow_matching_prepare's result for the same x0, noise and patch; any float dtype
    t          the levels given to flow_matching_prepare. The target does not depend on them.
    weight     multiplies every image's error
    reduction  "mean" over all elements, "sum", or "sample": [B], every image's mean
    Derivatives by pred only, and the first only. The gradient is written in the pass that computes the loss.
    Raises ValueError for shapes that do not fit or an x0 that requires a gradient.
    """
    images = _images(x0, patch)
    if reduction not in ("mean", "sum", "sample"):
        raise ValueError(f"{OP}: reduction must be mean, sum or sample, got {reduction!r}")
    checks.local(OP, pred=pred)
    checks.floating(OP, pred=pred)
    _level(t, images)
    noise = _noise(noise, images)
    checks.one_device(OP, pred=pred, x0=images[0])
    expected = _shape(x0, patch)
    if tuple(pred.shape) != expected:
        raise ValueError(f"{OP}: pred must be {list(expected)} for this x0 and patch={patch}, got {list(pred.shape)}")
    if weight is not None and tuple(weight.shape) != (len(images),):
        raise ValueError(f"{OP}: weight must be [{len(images)}], one per image, got {list(weight.shape)}")
    # fp64 anywhere is for the reference.
    dtype = torch.float64 if images[0].dtype == torch.float64 else pred.dtype
    backend = dispatch.choose(OP, pred, backend, dtype=dtype)
    sums = _losses(pred, images, noise, patch, backend)
    if weight is not None:
        sums = sums * weight.to(sums.dtype)
    if reduction == "sum":
        return sums.sum()
    counts = [image.numel() for image in images]
    if reduction == "mean":
        return sums.sum() / max(sum(counts), 1)
    if all(n == counts[0] for n in counts):
        return sums / max(counts[0], 1)
    return torch.stack([s / max(n, 1) for s, n in zip(sums.unbind(), counts, strict=True)])  # no copy from the host


def _images(x0: Tensor | Sequence[Tensor], patch: int) -> list[Tensor]:
    images = list(x0.unbind()) if isinstance(x0, Tensor) and x0.ndim == 4 else x0
    if isinstance(images, Tensor) or any(image.ndim != 3 for image in images):
        raise ValueError(f"{OP}: x0 must be [B, C, H, W] or a list of [C, H, W]")
    if not images:
        raise ValueError(f"{OP}: x0 holds no image")
    if patch < 1 or any(side % patch for image in images for side in image.shape[1:]):
        sizes = sorted({tuple(image.shape[1:]) for image in images})
        raise ValueError(f"{OP}: heights and widths {sizes} must be multiples of patch={patch}; crop or pad x0")
    if len({(image.shape[0], image.dtype, image.device) for image in images}) > 1:
        raise ValueError(f"{OP}: all images of x0 must have the same channels, dtype and device")
    checks.floating(OP, x0=images[0])
    if any(image.requires_grad for image in images):
        raise ValueError(f"{OP}: x0 requires a gradient, which this op does not give; detach it")
    if patch == 1 and not isinstance(x0, Tensor):
        # Tokens of one latent: backends keep the order in memory, and take the channels from the shape.
        images = [image.movedim(0, -1).contiguous().view(image.shape) for image in images]
    return [image.contiguous() for image in images]


def _level(t: Tensor, images: list[Tensor]) -> Tensor:
    if tuple(t.shape) != (len(images),):
        raise ValueError(f"{OP}: t must be [{len(images)}], one level per image, got {list(t.shape)}")
    checks.one_device(OP, x0=images[0], t=t)
    return t if t.dtype == torch.float64 else t.float().contiguous()


def _noise(noise: Philox | Tensor, images: list[Tensor]) -> Philox | Tensor:
    if isinstance(noise, Tensor):
        total = sum(image.numel() for image in images)
        if noise.numel() != total:
            raise ValueError(f"{OP}: noise has {noise.numel()} elements, x0 has {total}")
        checks.one_device(OP, x0=images[0], noise=noise)
        double = torch.float64 in (noise.dtype, images[0].dtype)
        return (noise.to(images[0].dtype) if double else noise).contiguous()
    noise = checked(OP, noise)
    checks.one_device(OP, x0=images[0], **{"noise.sample_ids": noise.sample_ids})
    if tuple(noise.sample_ids.shape) != (len(images),):
        raise ValueError(
            f"{OP}: noise.sample_ids must be [{len(images)}], one per image, got {list(noise.sample_ids.shape)}"
        )
    return noise


def _shape(x0: Tensor | Sequence[Tensor], patch: int) -> tuple[int, ...]:
    if isinstance(x0, Tensor) and patch == 1:
        return tuple(x0.shape)
    images = x0.unbind() if isinstance(x0, Tensor) else x0
    width = patch * patch * images[0].shape[0]
    return sum(image.numel() for image in images) // width, width


def _flat(noise: Philox | Tensor) -> tuple:
    """(seed, sample ids, stream, given noise) for a registered op."""
    return (None, None, 0, noise) if isinstance(noise, Tensor) else (*noise, None)


def _unflat(seed: Tensor | None, ids: Tensor | None, stream: int, given: Tensor | None) -> Philox | Tensor:
    return Philox(seed, ids, stream) if given is None else given


def _prepare(
    images: list[Tensor], t: Tensor, noise: Philox | Tensor, patch: int, dtype: torch.dtype, backend: str
) -> Tensor:
    if backend == "reference":
        return reference.prepare(images, t, noise, patch, dtype)
    if torch.compiler.is_compiling():
        return _prepare_op(images, t, *_flat(noise), patch, dtype, backend)
    return _run_prepare(images, t, noise, patch, dtype, backend)


def _run_prepare(images, t, noise, patch, dtype, backend) -> Tensor:
    out = torch.empty(sum(image.numel() for image in images), dtype=dtype, device=t.device)
    dispatch.load(backend, OP).prepare(images, t, noise, patch, out)
    return out


def _losses(pred: Tensor, images: list[Tensor], noise: Philox | Tensor, patch: int, backend: str) -> Tensor:
    if backend == "reference":
        return reference.losses(pred.reshape(-1), images, noise, patch)
    if torch.compiler.is_compiling():
        return _loss_op(pred, images, *_flat(noise), patch, backend)[0]
    if pred.requires_grad and torch.is_grad_enabled():
        return _Function.apply(pred, images, noise, patch, backend)
    return _run_losses(pred, images, noise, patch, backend, False)[0]


def _run_losses(pred, images, noise, patch, backend, learn) -> tuple[Tensor, Tensor]:
    pred = pred.contiguous()
    gradient = torch.empty_like(pred) if learn else pred.new_empty(0)
    return dispatch.load(backend, OP).losses(pred, images, noise, patch, gradient if learn else None), gradient


def _scale(gradient: Tensor, grad: Tensor, lengths: Sequence[int]) -> Tensor:
    """Multiply gradient in place by its image's number in grad [B]."""
    if all(n == lengths[0] for n in lengths):
        gradient.view(len(lengths), -1).mul_(grad[:, None])
    else:
        for part, g in zip(gradient.view(-1).split(list(lengths)), grad.unbind(), strict=True):
            part.mul_(g)
    return gradient


class _Function(torch.autograd.Function):
    """The forward pass writes the gradient; backward scales it in place and gives it away. A second backward, after
    retain_graph, has the kernel write it again."""

    @staticmethod
    def forward(ctx: Any, pred: Tensor, images: list[Tensor], noise: Philox | Tensor, patch: int, backend: str):
        losses, ctx.gradient = _run_losses(pred, images, noise, patch, backend, True)
        seed, ids, ctx.stream, given = _flat(noise)
        ctx.save_for_backward(pred, seed, ids, given, *images)
        ctx.patch, ctx.backend = patch, backend
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pred, seed, ids, given, *images = ctx.saved_tensors
        gradient, ctx.gradient = ctx.gradient, None
        with torch.no_grad():
            if gradient is None:
                noise = _unflat(seed, ids, ctx.stream, given)
                _, gradient = _run_losses(pred, images, noise, ctx.patch, ctx.backend, True)
            _scale(gradient, grad, [image.numel() for image in images])
        return *library.once(OP, (gradient,), (grad, pred)), None, None, None, None


# ---- under torch.compile ----

_NOISE = "Tensor? seed, Tensor? ids, int stream, Tensor? given"


def _op_prepare(images, t, seed, ids, stream, given, patch, dtype, backend) -> Tensor:
    return _run_prepare(images, t, _unflat(seed, ids, stream, given), patch, dtype, backend)


def _op_prepare_fake(images, t, seed, ids, stream, given, patch, dtype, backend) -> Tensor:
    return t.new_empty(sum(image.numel() for image in images), dtype=dtype)


def _op_loss(pred, images, seed, ids, stream, given, patch, backend) -> tuple[Tensor, Tensor]:
    return _run_losses(pred, images, _unflat(seed, ids, stream, given), patch, backend, True)


def _op_loss_fake(pred, images, seed, ids, stream, given, patch, backend) -> tuple[Tensor, Tensor]:
    gradient = torch.empty_like(pred, memory_format=torch.contiguous_format)
    return pred.new_empty(len(images), dtype=torch.float32), gradient


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.lengths = [image.numel() for image in inputs[1]]
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _op_autograd(ctx: Any, grad: Tensor, *_: Any) -> tuple:
    (gradient,) = ctx.saved_tensors
    return _scale(gradient.clone(), grad, ctx.lengths), [None] * len(ctx.lengths), *[None] * 6


_prepare_op = library.register(
    f"flow_matching_prepare(Tensor[] images, Tensor t, {_NOISE}, int patch, ScalarType dtype, str backend) -> Tensor",
    _op_prepare,
    _op_prepare_fake,
)
_loss_op = library.register(
    f"flow_matching_loss(Tensor pred, Tensor[] images, {_NOISE}, int patch, str backend) -> (Tensor, Tensor)",
    _op_loss,
    _op_loss_fake,
    _op_autograd,
    _setup_context,
)
