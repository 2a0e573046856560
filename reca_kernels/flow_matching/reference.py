"""Rectified flow in plain PyTorch: the reference implementation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from reca_kernels.philox.reference import Address, philox_normal


def tokens(image: Tensor, patch: int) -> Tensor:
    """Flatten [..., C, H, W] in the prediction's order: patches row-major, inside each (row, column, channel)."""
    if patch == 1:
        return image.reshape(-1)
    split: Tensor = image.unflatten(-1, (-1, patch)).unflatten(-3, (-1, patch))  # [C, h, p, w, p]
    return split.permute(1, 3, 2, 4, 0).reshape(-1)


def noise_of(images: Sequence[Tensor], noise: Tensor | Address) -> list[Tensor]:
    """Return every image's noise, flattened in the order of the prediction."""
    lengths = [image.numel() for image in images]
    if isinstance(noise, Tensor):
        return list(_wide(noise).reshape(-1).split(lengths))
    seed, ids, stream = noise
    return [philox_normal(seed, ids[b : b + 1], stream, n)[0] for b, n in enumerate(lengths)]


def add_noise(images: Sequence[Tensor], t: Tensor, noise: Tensor | Address, patch: int, dtype: torch.dtype) -> Tensor:
    """Return x_t of all images, flattened and concatenated."""
    parts = []
    for image, level, eps in zip(images, t, noise_of(images, noise), strict=True):
        x0 = _wide(tokens(image, patch))
        parts.append((1 - level) * x0 + level * eps)
    return torch.cat((t[:0], *parts)).to(dtype)


def losses(
    pred: Tensor, images: Sequence[Tensor], noise: Tensor | Address, patch: int, masked: Tensor | None = None
) -> Tensor:
    """Return the sum of squared errors per image, [B], of a flat prediction.

    For masked images, bool [B], errors that are not finite are left out.
    """
    sums, start = [], 0
    for b, (image, eps) in enumerate(zip(images, noise_of(images, noise), strict=True)):
        error = _wide(pred[start : start + image.numel()]) - (eps - _wide(tokens(image, patch)))
        if masked is not None:
            error = torch.where(masked[b] & ~error.isfinite(), 0, error)
        sums.append(error.square().sum()[None])
        start += image.numel()
    return torch.cat((_wide(pred[:0]), *sums))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
