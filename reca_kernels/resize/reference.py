"""Resizing by Pillow's integer arithmetic in plain PyTorch: the definition, and what runs on GPUs."""

import torch
from torch import Tensor

from reca_kernels.resize.taps import PRECISION, Taps

AT_ONCE = 8  # inputs of a sum that are gathered side by side


def resize(image: Tensor, columns: Taps, rows: Taps, down_first: bool) -> Tensor:
    """Filter along the rows and down the columns, each rounded to 8 bits: uint8 [..., H, W] -> [..., h, w]."""
    if down_first:
        return _across(_down(image, rows), columns)
    return _down(_across(image, columns), rows).contiguous()


def _down(image: Tensor, taps: Taps) -> Tensor:
    return _across(image.transpose(-1, -2), taps).transpose(-1, -2)


def _across(image: Tensor, taps: Taps) -> Tensor:
    first, _, weights = taps
    total = image.new_full((*image.shape[:-1], len(first)), 1 << (PRECISION - 1), dtype=torch.int32)
    for part in torch.arange(weights.shape[1], device=image.device).split(AT_ONCE):
        place = (first[:, None] + part).clamp(max=image.shape[-1] - 1)  # an input that is not there has weight 0
        total += (image[..., place] * weights[:, part]).sum(-1, dtype=torch.int32)
    return (total >> PRECISION).clamp(0, 255).to(torch.uint8)
