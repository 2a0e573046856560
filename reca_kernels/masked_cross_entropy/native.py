"""Cross-entropy in C++ and CUDA: csrc/masked_cross_entropy."""

import torch
from torch import Tensor

from reca_kernels import native
from reca_kernels.masked_cross_entropy.options import CrossEntropyOptions


def arguments(logits: Tensor, labels: Tensor, options: CrossEntropyOptions) -> tuple[float, ...]:
    """Return a CrossEntropy (csrc/masked_cross_entropy/op.h) for logits [N, V] with contiguous rows and labels [N]."""
    return (
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
    )


def forward(
    logits: Tensor,  # [N, V]
    labels: Tensor,  # [N]
    options: CrossEntropyOptions,
) -> tuple[Tensor, Tensor, Tensor]:  # loss [] or [N], stats [N, 2], scale []
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    stats = torch.empty(logits.shape[0], 2, dtype=torch.float32, device=logits.device)
    native.kernels().masked_cross_entropy_forward(
        arguments(logits, labels, options), losses.data_ptr(), stats.data_ptr(), native.launch(logits)
    )
    loss, scale = reduce(losses, labels, options)
    return loss, stats, scale


def reduce(losses: Tensor, labels: Tensor, options: CrossEntropyOptions) -> tuple[Tensor, Tensor]:  # loss, scale []
    if options.reduction == "none":
        return losses, torch.ones((), dtype=torch.float32, device=losses.device)
    loss, scale = (torch.empty((), dtype=torch.float32, device=losses.device) for _ in range(2))
    native.kernels().reduce_losses(
        losses.data_ptr(),
        labels.data_ptr(),
        labels.dtype == torch.int64,
        len(labels),
        options.ignore_index,
        options.reduction == "mean",
        loss.data_ptr(),
        scale.data_ptr(),
        native.launch(losses),
    )
    return loss, scale


def backward(
    grad: Tensor,  # fp32 [] or [N]
    scale: Tensor,  # []
    logits: Tensor,  # [N, V]
    labels: Tensor,  # [N]
    stats: Tensor,  # [N, 2]
    options: CrossEntropyOptions,
    out: Tensor,  # [N, V], may be logits
) -> None:
    native.kernels().masked_cross_entropy_backward(
        arguments(logits, labels, options),
        stats.data_ptr(),
        grad.data_ptr(),
        grad.stride(0) if grad.ndim else 0,
        scale.data_ptr(),
        out.data_ptr(),
        out.stride(0),
        native.launch(logits),
    )
