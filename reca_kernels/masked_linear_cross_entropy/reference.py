"""Output head and cross-entropy over the rows that carry a label, in plain PyTorch: the reference implementation."""

import torch
from torch import Tensor
from torch.nn import functional as F

from reca_kernels.masked_cross_entropy.reference import masked_cross_entropy


def masked_linear_cross_entropy(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [N] int32 or int64
    bias: Tensor | None = None,  # [V]
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    max_labelled: int | None = None,
) -> Tensor:  # [] or [N]
    """Compute `reca_kernels.masked_linear_cross_entropy` with the logits of `max_labelled` rows, or of all."""
    all_unlabelled = unlabelled = labels == ignore_index
    rows = None
    if max_labelled is not None and max_labelled < labels.shape[0]:
        rows = all_unlabelled.argsort(stable=True)[:max_labelled]  # rows that carry a label come first
        hidden, labels, unlabelled = hidden[rows], labels[rows], all_unlabelled[rows]
    # Rows without a label are replaced, not multiplied by zero, so that their NaN and inf do not reach the weight.
    hidden = torch.where(unlabelled[:, None], 0, hidden)
    logits = F.linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
    loss = masked_cross_entropy(
        logits,
        labels,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        reduction=reduction,
    )
    if rows is None or max_labelled is None:
        return loss
    if reduction == "none":
        return torch.where(all_unlabelled, 0, loss.new_tensor(torch.nan)).index_copy(0, rows, loss)
    return loss + torch.where((~all_unlabelled).sum() > max_labelled, torch.nan, torch.zeros_like(loss))
