"""Flow matching: the noisy input and the velocity loss. Noise is regenerated from its address, never stored."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reca_kernels import checks, dispatch
from reca_kernels.flow_matching import reference
from reca_kernels.flow_matching.kernels import Kernels
from reca_kernels.flow_matching.runs import image_count
from reca_kernels.kernel_op import kernel_op
from reca_kernels.memory import has_values, mean_of, plain
from reca_kernels.philox.address import NOISE_SCHEMA, Philox, checked, flattened, named, tensors_of, unflattened

OP = "flow_matching"
REDUCTIONS = ("mean", "sum", "sample")


def flow_matching_add_noise(
    x0: Tensor | Sequence[Tensor],  # [B, C, H, W], or B times [C, H, W]
    t: Tensor,  # [B]
    noise: Philox | Tensor,
    *,
    patch: int = 1,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Compute x_t = (1 - t) x0 + t eps with eps standard normal; t = 1 is pure noise.

    x0        a batch, which may be empty, or a list of images of different sizes; fp32, bf16, fp16
    t         noise level per image, in [0, 1]
    noise     address of eps (reca_kernels.Philox, one sample id per image), or explicit noise shaped like the result
    patch     side p of a patch. For a batch with p = 1 the result is shaped like x0. Otherwise it is tokens [T, p p C]:
              the patches of all images in row-major order, the elements of a patch in order (row, column, channel).
              Element i of an image in this order uses element i of its noise.
    Source    Liu et al. 2022, arXiv 2209.03003

    The result has no gradient.

    Raises:
        ValueError: Shapes do not match, x0, t or noise requires a gradient, the address of the noise is not a valid
            `Philox`, a level is outside [0, 1] (checked on CPUs, and on GPUs with RECA_CHECK=1), or the backend is
            unknown.
        TypeError: x0, t or out_dtype is not of a float dtype, patch is not a whole number, or a tensor is sparse,
            nested, quantized or a DTensor.
        RuntimeError: The backend set by `backend` or RECA_BACKEND cannot run here, or torch.jit.trace is active.
    """
    if not (raw := plain(t, *_images_of(x0), *tensors_of(OP, noise))):
        checks.dispatchable(OP, **_named(x0, t, noise))
    batches, shape = _batches(x0, patch), _shape(x0, patch)
    checks.constant(OP, t=t)
    checks.result_dtype(OP, out_dtype)
    t, noise = _level(t, batches), _noise(noise, batches, shape)
    out_dtype = out_dtype or batches[0].dtype
    dtype = batches[0].dtype if out_dtype in dispatch.FLOATS else out_dtype  # only the reference supports others
    backend = dispatch.choose(OP, batches[0], backend, dtype=dtype)
    with torch.no_grad():
        if backend == "reference":
            if has_values(t):
                checks.levels_inside(OP, t)
            flat = reference.add_noise(_apart(batches), t, noise, patch, out_dtype)
        else:
            flat = _noisy(raw, batches, t.float(), *flattened(noise), patch, out_dtype, backend)
    return flat.view(shape)


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
) -> Tensor:  # fp32 (fp64 for fp64 inputs), [] or [B]
    """Compute the squared error of a predicted velocity against eps - x0, with eps regenerated from its address.

    pred         shaped like flow_matching_add_noise's result for the same x0, noise and patch; any float dtype
    t            the levels passed to flow_matching_add_noise. The target does not depend on them.
    weight       factor of every image's error; 0 also discards NaN and infinity in that image
    reduction    "mean" over all elements (0 without images), "sum", or "sample" for the mean of every image, [B]
    Derivatives  The first derivative with respect to pred; the gradient is computed in the same pass as the loss.
                 backend="reference" has all derivatives with respect to pred.

    Raises:
        ValueError: Shapes do not match, the reduction or the backend is unknown, x0 or noise requires a gradient, or
            the address of the noise is not a valid `Philox`.
        TypeError: pred, x0 or t is not of a float dtype, patch is not a whole number, or a tensor is sparse, nested,
            quantized or a DTensor.
        RuntimeError: The backend set by `backend` or RECA_BACKEND cannot run here, torch.jit.trace is active, or a
            kernel's gradient is differentiated again.
    """
    if not (raw := plain(pred, t, *_images_of(x0), *tensors_of(OP, noise), optional=weight)):
        checks.dispatchable(OP, **_named(x0, t, noise), pred=pred, **checks.given(weight=weight))
    batches = _batches(x0, patch)
    checks.one_reduction(OP, reduction, REDUCTIONS)
    checks.floating(OP, pred=pred)
    _level(t, batches)
    expected = _shape(x0, patch)
    noise = _noise(noise, batches, expected)
    if tuple(pred.shape) != expected:
        raise ValueError(f"{OP}: pred must be {list(expected)} for this x0 and patch={patch}, got {list(pred.shape)}")
    if weight is not None and tuple(weight.shape) != (image_count(batches),):
        raise ValueError(f"{OP}: weight must be [{image_count(batches)}], one per image, got {list(weight.shape)}")
    # Only the reference supports fp64.
    dtype = torch.float64 if batches[0].dtype == torch.float64 else pred.dtype
    backend = dispatch.choose(OP, pred, backend, dtype=dtype)
    if backend == "reference":
        masked = None if weight is None else weight == 0
        sums = reference.losses(pred.reshape(-1), _apart(batches), noise, patch, masked)
    else:
        learns = not raw or (pred.requires_grad and torch.is_grad_enabled())
        uneven = weight is not None or reduction == "sample"
        sums, _ = _losses(raw, pred, batches, *flattened(noise), patch, learns, uneven, backend)
    if weight is not None:
        sums = torch.where((weight != 0) | sums.isfinite(), sums, 0) * weight.to(sums.dtype)
    if reduction == "sum":
        return sums.sum()
    if reduction == "mean":
        return mean_of(sums.sum(), pred.numel())
    sizes = _sizes(batches)
    if all(n == sizes[0] for n in sizes):
        return mean_of(sums, sizes[0])
    return torch.stack([mean_of(s, n) for s, n in zip(sums.unbind(), sizes, strict=True)])  # no copy from the host


def _images_of(x0: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return x0 if isinstance(x0, list | tuple) else (x0,)


def _named(x0: Tensor | Sequence[Tensor], t: Tensor, noise: Philox | Tensor) -> dict[str, Tensor]:
    listed = isinstance(x0, list | tuple)
    images = {f"x0[{i}]": image for i, image in enumerate(x0)} if listed else {"x0": x0}
    return {**images, "t": t, **named(noise)}


def check_patch(patch: int) -> None:
    """Raise TypeError or ValueError unless the side of a patch is a whole number of at least 1."""
    checks.whole(OP, patch=patch)
    if patch < 1:
        raise ValueError(f"{OP}: patch must be at least 1, got {patch}")


def _batches(x0: Tensor | Sequence[Tensor], patch: int) -> list[Tensor]:
    """Return contiguous batches [n, C, H, W]: x0 as one, so that a graph supports any batch size, or one per image."""
    batch, images = isinstance(x0, Tensor), _images_of(x0)
    if any(image.ndim != (4 if batch else 3) for image in images):
        raise ValueError(f"{OP}: x0 must be [B, C, H, W] or a list of [C, H, W]")
    if not images:
        raise ValueError(
            f"{OP}: x0 must not be an empty list, which has no channels and no dtype; pass an empty batch [0, C, H, W]"
        )
    check_patch(patch)
    if any(side % patch for image in images for side in image.shape[-2:]):
        sizes = sorted({tuple(map(int, image.shape[-2:])) for image in images})
        raise ValueError(f"{OP}: heights and widths {sizes} must be multiples of patch={patch}; crop or pad x0")
    kinds = [(image.shape[-3], image.dtype, image.device) for image in images]
    if any(kind != kinds[0] for kind in kinds):
        raise ValueError(f"{OP}: all images of x0 must have the same channels, dtype and device")
    checks.floating(OP, x0=images[0])
    for image in images:
        checks.constant(OP, x0=image)
    if batch:
        return [images[0].contiguous()]
    if patch == 1:
        # Backends keep the memory order and read the channels from the shape, so channels-last memory gives tokens.
        images = [image.movedim(0, -1).contiguous().view(image.shape) for image in images]
    return [image.contiguous()[None] for image in images]


def _apart(batches: Sequence[Tensor]) -> list[Tensor]:
    return [image for batch in batches for image in batch.unbind()]


def _sizes(batches: Sequence[Tensor]) -> list[int]:
    """Return the number of elements per image, for each batch."""
    return [math.prod(batch.shape[1:]) for batch in batches]


def _level(t: Tensor, batches: list[Tensor]) -> Tensor:
    checks.floating(OP, t=t)
    if tuple(t.shape) != (image_count(batches),):
        raise ValueError(f"{OP}: t must be [{image_count(batches)}], one level per image, got {list(t.shape)}")
    return t if t.dtype == torch.float64 else t.float().contiguous()


def _noise(noise: Philox | Tensor, batches: list[Tensor], shape: tuple[int, ...]) -> Philox | Tensor:
    if isinstance(noise, Tensor):
        if tuple(noise.shape) != shape:
            raise ValueError(f"{OP}: noise must be {list(shape)}, shaped like the result, got {list(noise.shape)}")
        checks.constant(OP, noise=noise)
        double = torch.float64 in (noise.dtype, batches[0].dtype)
        return (noise.to(batches[0].dtype) if double else noise).contiguous()
    noise = checked(OP, noise)
    count = image_count(batches)
    if tuple(noise.sample_ids.shape) != (count,):
        raise ValueError(f"{OP}: noise.sample_ids must be [{count}], one per image, got {list(noise.sample_ids.shape)}")
    return noise


def _shape(x0: Tensor | Sequence[Tensor], patch: int) -> tuple[int, ...]:
    if isinstance(x0, Tensor) and patch == 1:
        return tuple(x0.shape)
    images = _images_of(x0)
    pixels = sum(math.prod((*image.shape[:-3], *image.shape[-2:])) for image in images)
    return pixels // (patch * patch), patch * patch * images[0].shape[-3]


# ---- kernel ops ----


@kernel_op(
    f"flow_matching_add_noise(Tensor[] batches, Tensor t, {NOISE_SCHEMA}, int patch, ScalarType dtype, str backend)"
    " -> Tensor",
    lambda batches, t, seed, ids, stream, explicit, patch, dtype, backend: t.new_empty(
        sum(batch.numel() for batch in batches), dtype=dtype
    ),
)
def _noisy(
    batches: list[Tensor],
    t: Tensor,
    seed: Tensor | None,
    ids: Tensor | None,
    stream: int,
    explicit: Tensor | None,
    patch: int,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """Return x_t, flat."""
    checks.levels_inside(OP, t)
    kernels: Kernels = dispatch.load(backend, OP)
    out = torch.empty(sum(batch.numel() for batch in batches), dtype=dtype, device=t.device)
    noise = unflattened(seed, ids, stream, explicit)
    kernels.add_noise(batches, t, noise, patch, out)
    return out


def _losses_fake(pred: Tensor, batches: list[Tensor], *rest: Any) -> tuple[Tensor, Tensor | None]:
    learns = rest[-3]
    losses = pred.new_empty(image_count(batches), dtype=torch.float32)
    dtype = torch.float32 if pred.dtype == torch.float16 else pred.dtype
    gradient = torch.empty_like(pred, dtype=dtype, memory_format=torch.contiguous_format) if learns else None
    return losses, gradient


@kernel_op(
    f"flow_matching_loss(Tensor pred, Tensor[] batches, {NOISE_SCHEMA}, int patch, bool learns, bool uneven, "
    "str backend) -> (Tensor, Tensor)",
    _losses_fake,
)
def _losses(
    pred: Tensor,
    batches: list[Tensor],
    seed: Tensor | None,
    ids: Tensor | None,
    stream: int,
    explicit: Tensor | None,
    patch: int,
    learns: bool,
    uneven: bool,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    """Return the sums of squared errors per image and, if `learns`, their derivative with respect to pred.

    uneven: upstream gradients differ between images, and a zero also zeroes NaN and infinity in its image's gradient.
    """
    # For fp16 the gradient stays in fp32 until backward multiplies it by the upstream gradient with the loss scale.
    pred = (pred.float() if learns and pred.dtype == torch.float16 else pred).contiguous()
    gradient = torch.empty_like(pred) if learns else None
    noise = unflattened(seed, ids, stream, explicit)
    kernels: Kernels = dispatch.load(backend, OP)
    return kernels.losses(pred, batches, noise, patch, gradient), gradient


# ---- gradient ----


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    pred, batches, seed, ids, ctx.stream, explicit, ctx.patch, _, ctx.uneven, ctx.backend = inputs
    ctx.gradient = output[1]
    ctx.mark_non_differentiable(ctx.gradient)
    ctx.save_for_backward(pred, seed, ids, explicit, *batches)


def _backward(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Tensor]:
    """Multiply the gradient from the forward pass by `grad`.

    On plain memory this is done in place, so a second backward pass recomputes the gradient.
    """
    pred, seed, ids, explicit, *batches = ctx.saved_tensors
    noise = seed, ids, ctx.stream, explicit
    raw = plain(grad, pred, *batches, *tensors_of(OP, unflattened(*noise)))
    gradient, ctx.gradient = ctx.gradient, None if raw else ctx.gradient
    if gradient is None:
        _, gradient = _losses(raw, pred, batches, *noise, ctx.patch, True, ctx.uneven, ctx.backend)
    gradient = _scale_(gradient, grad, batches, ctx.uneven) if raw else _scaled(gradient, grad, batches)
    return (gradient.to(pred.dtype),)


_losses.register_autograd(_backward, setup_context=_setup_context, of=["pred"])


def _scale_(gradient: Tensor, grad: Tensor, batches: Sequence[Tensor], uneven: bool) -> Tensor:
    """Multiply every image's gradient in place by its element of grad [B]; 0 also zeroes NaN and infinity."""
    zero = uneven and (grad.is_cuda or not grad.all())  # on a CPU the check is cheap and can skip the fill
    sizes = _sizes(batches)
    if all(n == sizes[0] for n in sizes):
        lines = gradient.view(len(grad), sizes[0]).mul_(grad[:, None])
        if zero:
            lines.masked_fill_((grad == 0)[:, None], 0)
        return gradient
    for part, g in zip(gradient.view(-1).split(sizes), grad.unbind(), strict=True):
        part.mul_(g)
        if zero:
            part.masked_fill_(g == 0, 0)
    return gradient


def _scaled(gradient: Tensor, grad: Tensor, batches: Sequence[Tensor]) -> Tensor:
    """Compute the same out of place, with torch operations."""
    parts = gradient.reshape(-1).split([batch.numel() for batch in batches])
    grads = grad[:, None].split([batch.shape[0] for batch in batches])
    lines = [part.view(g.shape[0], n) for part, g, n in zip(parts, grads, _sizes(batches), strict=True)]
    scaled = [torch.where(g == 0, 0, line * g).view(-1) for line, g in zip(lines, grads, strict=True)]
    return torch.cat(scaled).view(gradient.shape)
