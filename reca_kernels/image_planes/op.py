"""Conversion of decoded images, whose channels are interleaved, to planes."""

import torch
from torch import Tensor

from reca_kernels import native
from reca_kernels.memory import has_values


def image_planes(image: Tensor) -> Tensor:
    """Return an image, uint8 [3, H, W], as a contiguous tensor, which is the image itself if it is contiguous.

    Interleaved channels, 3 or 4 bytes per pixel, are split in C++ on one thread, without the GIL.
    """
    _, row, step = image.stride()
    interleaved = image.stride(0) == 1 and step in (3, 4)
    if not (interleaved and image.is_cpu and has_values(image) and native.module):
        return image.contiguous()
    out = torch.empty(image.shape, dtype=torch.uint8, device=image.device)
    native.kernels().image_planes(image.data_ptr(), *image.shape[1:], row, step, out.data_ptr(), native.launch(out))
    return out


def arrow_planes(array: object, height: int, width: int) -> Tensor:
    """Return the pixels of an Arrow array, 4 bytes each of which the last is skipped: uint8 [3, height, width].

    array: a PyCapsule "arrow_array" as `PIL.Image.Image.__arrow_c_array__` returns it, without a copy of the pixels.
    Raises ValueError for an array of another form or size.
    """
    pixels = torch.frombuffer(native.kernels().arrow_bytes(array), dtype=torch.uint8)
    if len(pixels) != 4 * height * width:
        raise ValueError(f"the Arrow array has {len(pixels)} bytes; expected {4 * height * width}")
    return image_planes(pixels.view(height, width, 4).permute(2, 0, 1)[:3])
