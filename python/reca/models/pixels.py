"""Pixels on their way into a model, and the sizes it can take."""

from collections.abc import Sequence

import torch
from torch import Tensor

from reca_kernels.host import on_device


def to_unit(images: Tensor | Sequence[Tensor]) -> Tensor:
    """uint8 pixels as fp32 in [-1, 1]; images of one size, uint8 [3, H, W] each, are stacked to [B, 3, H, W]."""
    pixels = images if isinstance(images, Tensor) else torch.stack(list(images))
    return pixels.float() / 127.5 - 1


def per_channel(values: Sequence[float], pixels: Tensor) -> Tensor:
    """One number per channel, to be combined with pixels [..., C, H, W]: [C, 1, 1] of their dtype and device."""
    return on_device(torch.tensor(values, dtype=pixels.dtype), pixels.device)[:, None, None]


def check_side(key: str, side: float, factor: int) -> None:
    """Raise ValueError for a square image that is not whole tokens, of `factor` pixels on a side."""
    if side < factor or side % factor:
        raise ValueError(f"{key} is {side:g} pixels, which must be a multiple of {factor}")
