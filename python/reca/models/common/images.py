"""Pixels on their way into a model and out of it: one rule for each, and checks of the sizes a model can take.

In    uint8 [3, H, W]; an image given at inference becomes a view as training makes it (`fit_to_view`), and its pixels
      fp32 in [-1, 1] (`to_unit`).
Out   about [-1, 1], rounded to the nearest of 256 levels (`to_uint8`).
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from reca.data.pixels import make_view
from reca.data.views import View
from reca_kernels.host import on_device


def to_unit(images: Tensor | Sequence[Tensor]) -> Tensor:
    """Scale uint8 pixels to fp32 in [-1, 1]. Images of one size, uint8 [3, H, W] each, are stacked to [B, 3, H, W]."""
    pixels = images if isinstance(images, Tensor) else torch.stack(list(images))
    return pixels.float() / 127.5 - 1


def to_uint8(pixels: Tensor, floor: bool = False) -> Tensor:
    """Round pixels of about [-1, 1] to uint8 of the same shape; what lies outside is clamped.

    floor: round down instead of to the nearest level, for a model whose public code does so.
    """
    if floor:
        return ((pixels.float() * 0.5 + 0.5).clamp(0, 1) * 255).to(torch.uint8)
    return (127.5 * pixels.float() + 128).clamp(0, 255).to(torch.uint8)


def fit_to_view(image: Tensor, view: View) -> Tensor:  # uint8 [3, H, W]
    """Make a training view of an image given at inference: uint8 [3, h, w] on the host.

    Raises TypeError for anything but uint8 [3, H, W].
    """
    if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.ndim != 3 or len(image) != 3:
        got = f"{image.dtype} {list(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(
            f"an image must be a uint8 tensor [3, H, W], got {got}; reca.data.pixels.read_image(PATH) makes one"
        )
    return make_view(Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy())), view)


def per_channel(values: Sequence[float], pixels: Tensor) -> Tensor:
    """Shape one number per channel for pixels [..., C, H, W]: [C, 1, 1] of their dtype and device."""
    return on_device(torch.tensor(values, dtype=pixels.dtype), pixels.device)[:, None, None]


def check_side(key: str, side: float, factor: int) -> None:
    """Raise ValueError for a square image that is not whole tokens of `factor` x `factor` pixels."""
    if side < factor or side % factor:
        raise ValueError(f"{key} is {side:g} pixels, which must be a multiple of {factor}")
