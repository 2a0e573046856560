"""Cross-entropy of predicted tokens: those of replies, and the codes of an image."""

from typing import Any

import torch
from torch import Tensor

from reca.models.base import LossTerm, Prepared
from reca.models.common import by_sample
from reca_kernels import IGNORE_INDEX, masked_linear_cross_entropy
from reca_kernels.host import on_device


def count_labels(labels: Tensor) -> float:
    """Return the number of labels, the weight of `token_loss`. On a GPU this would synchronise: call it on the host."""
    return float((labels != IGNORE_INDEX).sum())


def token_loss(
    hidden: Tensor,  # [..., H]
    head: Any,  # output layer, [V, H]
    labels: Tensor,  # int64 [...]
    prepared: Prepared,  # its weight is the number of labels
    owners: Tensor | None = None,  # int64 [rows]: the sample of each row; None: the first index of labels
) -> LossTerm:
    """Compute the sum of the cross-entropy over labelled rows; logits are computed for these rows only."""
    rows, flat, labelled, samples = hidden.flatten(0, -2), labels.flatten(), int(prepared.weight), None
    total = masked_linear_cross_entropy(rows, head.weight, flat, head.bias, reduction="sum", max_labelled=labelled)
    if prepared.by_sample:
        owners = torch.arange(len(flat), device=flat.device) // labels.shape[1] if owners is None else owners
        with torch.no_grad():
            each = masked_linear_cross_entropy(
                rows, head.weight, flat, head.bias, reduction="none", max_labelled=labelled
            )
        samples = by_sample.add_up(each, on_device(owners, each.device), len(prepared.tokens), flat != IGNORE_INDEX)
    return LossTerm.of(total, prepared, samples)
