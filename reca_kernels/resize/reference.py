"""Resizing in Pillow's integer arithmetic in plain PyTorch: the reference, which also runs on GPUs."""

import torch
from torch import Tensor

from reca_kernels.resize.taps import PRECISION, Taps

AT_ONCE = 8  # taps that are gathered at a time


def resize(image: Tensor, columns: Taps, rows: Taps, down_first: bool) -> Tensor:
    """Filter horizontally and vertically, rounding to 8 bits after each pass: uint8 [..., H, W] -> [..., h, w]."""
    if down_first:
        return _across(_down(image, rows), columns)
    return _down(_across(image, columns), rows).contiguous()


def _down(image: Tensor, taps: Taps) -> Tensor:
    return _across(image.transpose(-1, -2), taps).transpose(-1, -2)


def _across(image: Tensor, taps: Taps) -> Tensor:
    first, _, weights = taps
    total = image.new_full((*image.shape[:-1], len(first)), 1 << (PRECISION - 1), dtype=torch.int32)
    for part in torch.arange(weights.shape[1], device=image.device).split(AT_ONCE):
        place = (first[:, None] + part).clamp(max=image.shape[-1] - 1)  # inputs beyond the edge have weight 0
        total += (image[..., place] * weights[:, part]).sum(-1, dtype=torch.int32)
    return (total >> PRECISION).clamp(0, 255).to(torch.uint8)
