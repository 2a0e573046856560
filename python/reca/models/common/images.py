"""Conversion of pixels at a model's input and output, and checks of image sizes.

Input   uint8 [3, H, W]. At inference an image is resized and cropped as in training (`fit_to_view`), then scaled to
        fp32 in [-1, 1] (`to_unit`).
Output  about [-1, 1], rounded to the nearest of 256 levels (`to_uint8`).
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from reca import units
from reca.data.transforms import make_view
from reca.data.views import View
from reca_kernels.host import on_device

log = logging.getLogger("reca")


def to_unit(images: Tensor | Sequence[Tensor]) -> Tensor:
    """Scale uint8 pixels to fp32 in [-1, 1]. Images of one size, uint8 [3, H, W] each, are stacked to [B, 3, H, W]."""
    pixels = images if isinstance(images, Tensor) else torch.stack(list(images))
    return pixels.float() / 127.5 - 1


def to_uint8(pixels: Tensor, floor: bool = False) -> Tensor:
    """Round pixels of about [-1, 1], [..., 3, H, W], to uint8 of the same shape; values outside are clamped.

    NaN is black, and warned of: a black image would otherwise be taken, and scored, for what the model has generated.
    floor: round down instead of to the nearest level, as some models' public code does.
    """
    if lost := int(pixels.isnan().flatten(-3).any(-1).sum()):
        log.warning(
            "NaN pixels are black in %s: use a smaller guidance, or weights that have not diverged",
            units.counted(lost, "generated image"),
        )
    if floor:
        return ((pixels.float() * 0.5 + 0.5).clamp(0, 1) * 255).to(torch.uint8)
    return (127.5 * pixels.float() + 128).clamp(0, 255).to(torch.uint8)


def fit_to_view(image: Tensor, view: View) -> Tensor:  # uint8 [3, H, W]
    """Resize and crop an image for inference as the training view does. Returns uint8 [3, h, w] on the host.

    Raises TypeError for anything but a uint8 tensor [3, H, W] with values, on any device.
    """
    fits = isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim == 3 and len(image) == 3
    if not (fits and image.numel() and not image.is_meta):
        got = (
            f"{image.dtype} {list(image.shape)} on {image.device}"
            if isinstance(image, Tensor)
            else type(image).__name__
        )
        raise TypeError(
            f"an image must be a uint8 tensor [3, H, W], got {got}; reca.data.pixels.read_image(PATH) returns one, and "
            "pixels_of(as_rgb(IMAGE)) of the same module that of a PIL image"
        )
    return make_view(image.cpu(), view)


def per_channel(values: Sequence[float], pixels: Tensor) -> Tensor:
    """Return one value per channel as a tensor [C, 1, 1] that broadcasts to `pixels`, with their dtype and device."""
    return on_device(torch.tensor(values, dtype=pixels.dtype), pixels.device)[:, None, None]


def check_side(key: str, side: float, factor: int) -> None:
    """Raise ValueError if the side of a square image is not a positive multiple of `factor` pixels."""
    if side < factor or side % factor:
        raise ValueError(f"{key} is {side:g} pixels; it must be a positive multiple of {factor}")
