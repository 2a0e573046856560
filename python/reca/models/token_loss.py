"""Cross-entropy of predicted tokens: those of replies, and the codes of an image."""

from typing import Any

import torch
from torch import Tensor

from reca.models.base import LossTerm, Prepared
from reca.models.common import by_sample
from reca_kernels import masked_linear_cross_entropy


def token_loss(
    hidden: Tensor,  # [B, L, H]
    head: Any,  # output layer, [V, H]
    labels: Tensor,  # int64 [B, L]
    prepared: Prepared,  # its weight is the number of labels
) -> LossTerm:
    """Compute the sum of the cross-entropy over labelled rows; logits are computed for these rows only."""
    (batch, length), labelled = labels.shape, int(prepared.weight)
    rows, flat, samples = hidden.flatten(0, 1), labels.flatten(), None
    total = masked_linear_cross_entropy(rows, head.weight, flat, head.bias, reduction="sum", max_labelled=labelled)
    if prepared.by_sample:
        owners = torch.arange(batch * length, device=labels.device) // length
        samples = by_sample.cross_entropy(rows, head, flat, owners, batch, labelled)
    return LossTerm.of(total, prepared, samples)
