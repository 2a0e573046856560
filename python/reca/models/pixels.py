"""Pixels on their way into a model, and the sizes it can take."""

from collections.abc import Sequence

import torch
from torch import Tensor


def to_unit(images: Tensor | Sequence[Tensor]) -> Tensor:
    """uint8 pixels as fp32 in [-1, 1]; pictures of one size, uint8 [3, H, W] each, are stacked to [B, 3, H, W]."""
    pixels = images if isinstance(images, Tensor) else torch.stack(list(images))
    return pixels.float() / 127.5 - 1


def check_side(key: str, side: float, factor: int) -> None:
    """Raise ValueError for a square picture that is not whole tokens, of `factor` pixels on a side."""
    if side < factor or side % factor:
        raise ValueError(f"{key} is {side:g} pixels, which must be a multiple of {factor}")
