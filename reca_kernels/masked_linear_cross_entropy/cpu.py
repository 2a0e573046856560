"""Output head and cross-entropy on CPUs: torch's matrix products around csrc/cpu/masked_linear_cross_entropy.cpp."""

import torch
from torch import Tensor

from reca_kernels import native
from reca_kernels.masked_cross_entropy.cpu import arguments
from reca_kernels.masked_cross_entropy.options import CrossEntropyOptions
from reca_kernels.tiles import needed_columns


def forward(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [N]
    bias: Tensor | None,  # [V]
    row_grad: Tensor | None,  # fp32 [N]
    options: CrossEntropyOptions,
    chunk_rows: int,
    grad_dtypes: tuple[torch.dtype | None, torch.dtype | None, torch.dtype | None],
    num_labelled: int | None,  # here counting costs nothing
    window: tuple[int, int] | None,
    filter_eps: float | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    dx_dtype, dw_dtype, db_dtype = grad_dtypes
    if hidden.dtype == torch.float16:
        # Torch's fp16 products are slow on CPUs, and gradients over logits would end at 2^-24, before any loss scale.
        hidden, weight, bias = (None if x is None else x.float() for x in (hidden, weight, bias))
    dtype = hidden.dtype
    classes = weight.shape[0]
    rows = (labels != options.ignore_index).nonzero()[:, 0]
    count = rows.shape[0]
    row_labels = labels[rows]
    row_losses = torch.empty(count, dtype=torch.float32, device=hidden.device)
    row_scale = None if row_grad is None else row_grad[rows]
    scale = 1 / max(count, 1) if options.reduction == "mean" else 1.0
    wants_gradient = any(grad_dtypes)
    low, high = window or (0, classes)
    bounded = window is not None or filter_eps is not None
    dropped = torch.zeros(labels.shape[0], dtype=torch.float32, device=hidden.device) if bounded else None

    dx = None if dx_dtype is None else torch.zeros_like(hidden, dtype=dx_dtype, memory_format=torch.contiguous_format)
    dw = None
    if dw_dtype is not None:
        # A single chunk adds up inside the product, in fp32 already.
        dw = (torch.zeros if bounded or not count else torch.empty)(
            weight.shape, dtype=dtype if count <= chunk_rows else torch.float32, device=hidden.device
        )
    db = None if db_dtype is None else torch.zeros(classes, dtype=torch.float32, device=hidden.device)
    buffer = torch.empty(min(count, chunk_rows), classes, dtype=dtype, device=hidden.device)
    for begin in range(0, count, chunk_rows):
        chunk = slice(begin, min(begin + chunk_rows, count))
        x = hidden.index_select(0, rows[chunk])
        z = buffer[: x.shape[0]]  # logits, and from the kernel on their gradient
        if bias is None:
            torch.mm(x, weight.t(), out=z)
        else:
            torch.addmm(bias, x, weight.t(), out=z)
        native.module.masked_linear_cross_entropy_rows(
            arguments(z, row_labels[chunk], options),
            row_losses[chunk].data_ptr(),
            0 if row_scale is None else row_scale[chunk].data_ptr(),
            scale,
            z.data_ptr() if wants_gradient else 0,
            z.stride(0),
        )
        gradient, head, columns = z[:, low:high], weight[low:high], None
        if bounded and wants_gradient:
            left_out = sum(part.abs().sum(1, dtype=torch.float32) for part in (z[:, :low], z[:, high:])) / scale
            if filter_eps is not None:
                columns, more = needed_columns(gradient, scale, filter_eps)
                left_out = left_out + more
            dropped.index_copy_(0, rows[chunk], left_out)
        if columns is not None:
            gradient, head = gradient.index_select(1, columns), head.index_select(0, columns)
        if dx is not None:
            dx.index_copy_(0, rows[chunk], torch.mm(gradient, head).to(dx_dtype))
        if dw is not None and columns is not None:
            dw[low:high].index_add_(0, columns, torch.mm(gradient.t(), x).to(dw.dtype))
        elif dw is not None:
            part = dw[low:high]
            if dw.dtype == dtype:
                part.addmm_(gradient.t(), x, beta=float(begin > 0 or bounded))
            elif begin == 0 and not bounded:
                part.copy_(torch.mm(gradient.t(), x))
            else:
                part += torch.mm(gradient.t(), x)
        if db is not None:
            total = gradient.sum(0, dtype=torch.float32)
            db[low:high] += total if columns is None else torch.zeros_like(db[low:high]).index_copy_(0, columns, total)

    losses = torch.zeros(labels.shape[0], dtype=torch.float32, device=hidden.device).index_copy_(0, rows, row_losses)
    loss = losses if options.reduction == "none" else row_losses.sum(dtype=torch.float64).mul(scale).float()
    return loss, dx, None if dw is None else dw.to(dw_dtype), None if db is None else db.to(db_dtype), dropped


def scale(gradient: Tensor, grad: Tensor) -> Tensor:  # grad fp32 []
    factor = grad.item()
    return gradient if factor == 1 else gradient * factor
