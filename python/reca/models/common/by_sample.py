"""Per-sample losses for the log, computed without a gradient in steps that request them."""

from typing import Any

import torch
from torch import Tensor

from reca_kernels import IGNORE_INDEX, masked_linear_cross_entropy


def table(sums: Tensor, weights: Tensor) -> Tensor:  # [B] each
    """Stack the sums and weights of samples to [B, 2], without a gradient."""
    return torch.stack((sums.detach(), weights.to(sums.dtype)), dim=1)


def add_up(rows: Tensor, owners: Tensor, samples: int, weights: Tensor | None = None) -> Tensor:
    """Sum row losses [R] and their weights per sample, [samples, 2]. owners: int64 [R]; weights: 1 per row if None."""
    weights = torch.ones_like(rows) if weights is None else weights.to(rows.dtype)
    return rows.new_zeros(samples, 2).index_add_(0, owners, table(rows, weights))


@torch.no_grad()
def cross_entropy(
    hidden: Tensor,  # [N, H]
    head: Any,  # output layer, with weight [V, H] and optionally a bias
    labels: Tensor,  # int64 [N]
    owners: Tensor,  # int64 [N]
    samples: int,
    labelled: int | None = None,
) -> Tensor:  # [samples, 2]
    """Compute the cross-entropy of every sample's labelled rows, and their number."""
    rows = masked_linear_cross_entropy(hidden, head.weight, labels, head.bias, reduction="none", max_labelled=labelled)
    return add_up(rows, owners, samples, labels != IGNORE_INDEX)
