"""Tiles of classes, by which masked_linear_cross_entropy bounds its backward products (backward_window, filter_eps)."""

import torch
from torch import Tensor

TILE = 64  # classes that stay or go together


def needed_columns(
    gradient: Tensor,  # [n, k] of the chunk's logits, times scale
    scale: Tensor | float,
    eps: float,
) -> tuple[Tensor | None, Tensor]:
    """(columns in tiles where a row has more than eps, int64, None for all; what the other tiles hold, fp32 [n]).

    Waits for the device once.
    """
    width = gradient.shape[1]
    whole = width // TILE * TILE
    norm = torch.linalg.vector_norm
    sums = norm(gradient[:, :whole].unflatten(1, (-1, TILE)), 1, dim=2, dtype=torch.float32)
    if whole < width:
        rest = norm(gradient[:, whole:], 1, dim=1, keepdim=True, dtype=torch.float32)
        sums = torch.cat((sums, rest), dim=1)
    sums = sums / scale
    gone = sums.amax(0) <= eps  # not where a NaN is
    left_out = torch.where(gone, sums, 0).sum(1)
    columns = (~gone).repeat_interleave(TILE)[:width].nonzero()[:, 0]
    return (None if len(columns) == width else columns), left_out
