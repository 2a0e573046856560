"""Output head and cross-entropy in one step, over the rows which carry a label; the logits are never all there."""

from torch import Tensor

from reca_kernels.reference import masked_linear_cross_entropy as reference


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
    chunk_rows: int = 4096,
    backend: str | None = None,
) -> Tensor:  # fp32 [] or [N]
    return reference.masked_linear_cross_entropy(
        hidden,
        weight,
        labels,
        bias,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        reduction=reduction,
    )
