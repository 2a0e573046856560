"""Cross-entropy on CPUs: csrc/cpu/masked_cross_entropy.cpp."""

from typing import Any

import torch
from torch import Tensor

from reca_kernels import native
from reca_kernels.masked_cross_entropy.options import CrossEntropyOptions


def arguments(logits: Tensor, labels: Tensor, options: CrossEntropyOptions) -> Any:
    """The native struct for logits [N, V] with elements of a row side by side, labels [N]."""
    return native.module.CrossEntropy(
        native.DTYPES[logits.dtype],
        logits.data_ptr(),
        logits.stride(0),
        logits.shape[0],
        logits.shape[1],
        labels.data_ptr(),
        labels.dtype == torch.int64,
        options.ignore_index,
        options.label_smoothing,
        options.z_loss,
        options.softcap or 0.0,
        torch.get_num_threads(),
    )


def forward(
    logits: Tensor,  # [N, V]
    labels: Tensor,  # [N]
    options: CrossEntropyOptions,
) -> tuple[Tensor, Tensor, Tensor]:  # loss [] or [N], stats [N, 2], scale []
    args = arguments(logits, labels, options)
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    stats = torch.zeros(logits.shape[0], 2, dtype=torch.float32, device=logits.device)  # rows without a label stay 0
    native.module.masked_cross_entropy_forward(args, losses.data_ptr(), stats.data_ptr())
    scale = torch.ones((), dtype=torch.float32, device=logits.device)
    if options.reduction == "none":
        return losses, stats, scale
    loss = torch.empty((), dtype=torch.float32, device=logits.device)
    mean = options.reduction == "mean"
    count = native.module.reduce_losses(args, losses.data_ptr(), mean, loss.data_ptr())
    return loss, stats, scale / max(count, 1) if mean else scale


def backward(
    grad: Tensor,  # fp32 [] or [N]
    scale: Tensor,  # []
    logits: Tensor,  # [N, V]
    labels: Tensor,  # [N]
    stats: Tensor,  # [N, 2]
    options: CrossEntropyOptions,
    out: Tensor,  # [N, V], may be logits
) -> None:
    native.module.masked_cross_entropy_backward(
        arguments(logits, labels, options),
        stats.data_ptr(),
        grad.data_ptr(),
        grad.stride(0) if grad.ndim else 0,
        scale.item(),
        out.data_ptr(),
        out.stride(0),
    )
