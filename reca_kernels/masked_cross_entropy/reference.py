"""Cross-entropy over the rows that carry a label, in plain PyTorch: the reference implementation."""

import torch
from torch import Tensor


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
    z = z - row_max
    log_sum_exp = z.exp().sum(dim=1).log()

    loss = log_sum_exp - z.gather(1, targets[:, None])[:, 0]
    if label_smoothing:
        loss = (1 - label_smoothing) * loss + label_smoothing * (log_sum_exp - z.mean(dim=1))
    if z_loss:
        loss = loss + z_loss * (log_sum_exp + row_max[:, 0]).square()
    loss = torch.where(valid, loss, 0)
    loss = torch.where(outside, float("nan"), loss)

    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / valid.sum().clamp(min=1)
