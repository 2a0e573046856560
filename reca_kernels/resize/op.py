"""Resizing of 8-bit images with antialiasing, bit-identical to Pillow, for the inputs of image encoders."""

import torch
from torch import Tensor

from reca_kernels import native
from reca_kernels.host import in_mode
from reca_kernels.image_planes.op import image_planes
from reca_kernels.memory import has_values
from reca_kernels.resize import reference
from reca_kernels.resize.taps import FILTERS, taps

OP = "resize"


def resize(
    image: Tensor,  # uint8 [3, H, W]
    size: tuple[int, int],
    *,
    filter: str = "bicubic",
    box: tuple[float, float, float, float] | None = None,
) -> Tensor:  # uint8 [3, h, w]
    """Resize an image with antialiasing. The result is bit-identical to Pillow's `Image.resize`.

    Channels may be interleaved, as decoders return them: image = pixels.permute(2, 0, 1).

    size    (height, width) of the result
    filter  "bicubic" or "bilinear"
    box     (left, top, right, bottom) of the region to resize, in pixels, fractions allowed; default: the whole image

    On the host this is one call in C++ on one thread, without the GIL. On a GPU, or without the native module, it is
    plain PyTorch. Raises ValueError for an invalid shape, size, filter or box, and TypeError for another dtype.
    """
    if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ValueError(f"{OP}: image must be [3, H, W], got {list(image.shape)}")
    if image.dtype != torch.uint8:
        raise TypeError(f"{OP}: image must be uint8, got {image.dtype}")
    if filter not in FILTERS:
        raise ValueError(f"{OP}: unknown filter {filter!r}; expected {' or '.join(FILTERS)}")
    (height, width), (down, across) = image.shape[1:], size
    left, top, right, bottom = box or (0, 0, width, height)
    if down < 1 or across < 1:
        raise ValueError(f"{OP}: size must be at least 1 x 1, got {down} x {across}")
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise ValueError(f"{OP}: box must not be empty and must lie inside the image of {height} x {width}, got {box}")
    if (height, width, left, top, right, bottom) == (down, across, 0, 0, width, height):
        return image_planes(image)
    where = image.device, native.launch(image).stream
    columns = taps(width, left, right, across, filter, *where)
    rows = taps(height, top, bottom, down, filter, *where)
    down_first = down < height and height - down > 2 * (width - across)  # as in Pillow 13
    if not (image.is_cpu and has_values(image) and native.module):
        return reference.resize(image, in_mode(columns), in_mode(rows), down_first)
    interleaved = image.stride(0) == 1 and image.stride(2) == 3
    if not interleaved and image.stride(2) != 1:
        image = image.contiguous()
    out = torch.empty(3, down, across, dtype=torch.uint8, device=image.device)
    sides = [(*map(native.address, side), *side.weights.shape) for side in (columns, rows)]
    plane, row, _ = image.stride()
    native.kernels().resize_rgb(
        image.data_ptr(), row, plane, interleaved, *sides, down_first, out.data_ptr(), native.launch(out)
    )
    return out
