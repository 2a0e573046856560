"""Cross-entropy over the rows that carry a label, in plain PyTorch: the reference implementation."""

import torch
from torch import Tensor

# Logits are compared and summed at this scale: exact, as a power of two, and without overflow.
SUM_SCALE = 2.0**-33


def masked_cross_entropy(
    logits: Tensor,  # [N, V]
    labels: Tensor,  # [N] int32 or int64
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
) -> Tensor:  # [] or [N]
    """Compute `reca_kernels.masked_cross_entropy` in fp32, or in fp64 when the logits are fp64."""
    classes = logits.shape[1]
    valid = labels != ignore_index
    outside = valid & ((labels < 0) | (labels >= classes))
    targets = torch.where(valid & ~outside, labels, 0).long()

    # Rows without a label are replaced, not multiplied by zero, so that their NaN and inf do not propagate.
    z = torch.where(valid[:, None], logits, 0)
    z = z if z.dtype == torch.float64 else z.float()
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    row_max = z.detach().amax(dim=1, keepdim=True)
    # Only z_loss adds the maximum back: digits must not be lost to a common offset such as 1e4.
    below = z - row_max
    log_sum_exp = below.exp().sum(dim=1).log()

    if label_smoothing:
        scaled = z * SUM_SCALE - row_max * SUM_SCALE
        of_label = log_sum_exp * SUM_SCALE - scaled.gather(1, targets[:, None])[:, 0]
        of_mean = log_sum_exp * SUM_SCALE - scaled.mean(dim=1)
        loss = (1 - label_smoothing) / SUM_SCALE * of_label + label_smoothing / SUM_SCALE * of_mean
    else:
        loss = log_sum_exp - below.gather(1, targets[:, None])[:, 0]
    if z_loss:
        lse = log_sum_exp + row_max[:, 0]
        loss = loss + z_loss * lse * lse
    loss = torch.where(valid, loss, 0)
    loss = torch.where(outside, float("nan"), loss)

    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / valid.sum().clamp(min=1)
