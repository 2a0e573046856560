"""Per-sample losses for the log, computed without a gradient in steps that request them."""

import torch
from torch import Tensor


def table(sums: Tensor, weights: Tensor) -> Tensor:  # [B] each
    """Stack the sums and weights of samples to [B, 2], without a gradient."""
    return torch.stack((sums.detach(), weights.to(sums.dtype)), dim=1)


def add_up(rows: Tensor, owners: Tensor, samples: int, weights: Tensor | None = None) -> Tensor:
    """Sum row losses [R] and their weights per sample, [samples, 2]. owners: int64 [R]; weights: 1 per row if None."""
    weights = torch.ones_like(rows) if weights is None else weights.to(rows.dtype)
    return rows.new_zeros(samples, 2).index_add_(0, owners, table(rows, weights))
