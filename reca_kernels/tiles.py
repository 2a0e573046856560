"""filter_eps of masked_linear_cross_entropy: which classes the backward products of a chunk need."""

import torch
from torch import Tensor

TILE = 64  # classes that stay or go together


def needed_columns(
    gradient: Tensor,  # [n, k] of the chunk's logits, times scale
    scale: Tensor | float,
    eps: float,
) -> tuple[Tensor | None, Tensor]:
    """(numbers int64 of the columns in tiles where a row has more than eps, None for all; fp32 [n] what the others have).

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
