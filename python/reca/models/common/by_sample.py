"""A loss by sample, for the log: the same numbers once more, without a gradient, where a step asks for them."""

from typing import Any

import torch
from torch import Tensor

from reca_kernels import IGNORE_INDEX, masked_linear_cross_entropy


def table(sums: Tensor, weights: Tensor) -> Tensor:  # [B] each
    """Put sums and weights of samples side by side, [B, 2], without a gradient."""
    return torch.stack((sums.detach(), weights.to(sums.dtype)), dim=1)


def add_up(rows: Tensor, owners: Tensor, samples: int, weights: Tensor | None = None) -> Tensor:
    """Add up losses of rows, [R], by the sample that each belongs to, int64 [R]. weights: 1 each if none are given."""
    weights = torch.ones_like(rows) if weights is None else weights.to(rows.dtype)
    return rows.new_zeros(samples, 2).index_add_(0, owners, table(rows, weights))


@torch.no_grad()
def cross_entropy(
    hidden: Tensor,  # [N, H]
    head: Any,  # linear layer of the vocabulary
    labels: Tensor,  # int64 [N]
    owners: Tensor,  # int64 [N]
    samples: int,
    labelled: int | None = None,
) -> Tensor:  # [samples, 2]
    """Compute the cross-entropy of every sample's labelled rows, and their number."""
    rows = masked_linear_cross_entropy(
        hidden, head.weight, labels, getattr(head, "bias", None), reduction="none", max_labelled=labelled
    )
    return add_up(rows, owners, samples, labels != IGNORE_INDEX)


def rectangle(samples: int, length: int, device: torch.device) -> Tensor:
    """Return the sample of every row of a flattened [samples, length] batch, int64."""
    return torch.arange(samples * length, device=device) // length
