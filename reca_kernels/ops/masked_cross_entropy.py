"""Cross-entropy that reads only the rows which carry a label."""

from torch import Tensor

from reca_kernels.reference import masked_cross_entropy as reference


def masked_cross_entropy(
    logits: Tensor,  # [N, V]
    labels: Tensor,  # [N] int32 or int64
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor:  # fp32 [] or [N]
    return reference.masked_cross_entropy(
        logits,
        labels,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        reduction=reduction,
    )
