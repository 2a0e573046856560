"""Linear head and cross-entropy over the rows that carry a label, in plain PyTorch: the definition."""

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from reca_kernels.masked_cross_entropy.reference import masked_cross_entropy
from reca_kernels.tiles import TILE


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
    backward_window: tuple[int, int] | None = None,
    filter_eps: float | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # [] or [N]; with a window or a filter also [N]
    """See `reca_kernels.masked_linear_cross_entropy`. Keeps all logits; all rows are one chunk."""
    # Rows without a label are replaced, not multiplied by zero: their NaN and inf must not reach the weight.
    hidden = torch.where((labels != ignore_index)[:, None], hidden, 0)
    logits = F.linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
    options = {
        "ignore_index": ignore_index, "label_smoothing": label_smoothing, "z_loss": z_loss, "softcap": softcap
    }  # fmt: skip
    if backward_window is None and filter_eps is None:
        return masked_cross_entropy(logits, labels, reduction=reduction, **options)
    if not logits.requires_grad:
        loss = masked_cross_entropy(logits, labels, reduction=reduction, **options)
        return loss, torch.zeros(len(labels), dtype=loss.dtype, device=loss.device)
    summed = functools.partial(masked_cross_entropy, labels=labels, reduction="sum", **options)
    gradient = torch.func.grad(summed)(logits.detach())
    low, high = backward_window or (0, logits.shape[1])
    column = torch.arange(logits.shape[1], device=logits.device)
    outside = (column < low) | (column >= high)
    if filter_eps is not None:
        sums = F.pad(gradient.abs(), (0, -logits.shape[1] % TILE)).unflatten(1, (-1, TILE)).sum(2)
        outside = outside | (sums.amax(0) <= filter_eps).repeat_interleave(TILE)[: logits.shape[1]]
    loss = masked_cross_entropy(torch.where(outside, logits.detach(), logits), labels, reduction=reduction, **options)
    return loss, gradient.abs().mul(outside).sum(1, dtype=loss.dtype)
