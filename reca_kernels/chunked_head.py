"""masked_linear_cross_entropy on GPUs: torch's matrix products, a chunk of rows at a time, around a backend's kernels.

A backend's module holds

    pick_rows(labels, ignore_index, mean, losses, rows, row_labels, scale)
        rows [M] int64: numbers of the rows that carry a label, in order; from the last on -1, with label ignore_index.
        losses [N]: 0, and NaN for a row that no longer fits into M. scale []: 1, or 1 / number of labels for `mean`.
    copy_rows(source, source_rows, out, out_rows)
        out[out_rows[i]] = source[source_rows[i]], in the dtype of out; a source row -1 is zeros, an out row -1 is
        nowhere; rows None: i.
    row_gradients(logits, bias, row_labels, rows, row_grad, scale, options, losses, window, dropped, classes)
        losses[rows[i]] of logits [n, pitch] + bias [pitch]. window None: no more than that. Else the gradient over the
        logits, times scale and row_grad[rows[i]]; outside the window (low, high) anything may be written.
        dropped[rows[i]], if asked for, is the sum of the absolute gradients outside the window, without scale and
        row_grad.
    reduce(losses, labels, options) -> (loss, scale)
"""

import math
from types import ModuleType

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from reca_kernels.masked_cross_entropy.options import CrossEntropyOptions
from reca_kernels.tiles import needed_columns

PITCH = 128  # logits lie on multiples of as many elements: 256 bytes of 16-bit ones
# Before pytorch#167931 addmm refused to add 16-bit products to an fp32 matrix.
MIXED_SUMS = TorchVersion(torch.__version__) >= (2, 11)


def capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being made, in which nothing may wait for the device."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def labelled_rows(labels: Tensor, ignore_index: int, most: int | None) -> int:
    """For how many rows to make room. Without `most` the GPU is asked, and waited for; in a CUDA graph: all rows."""
    if most is not None:
        return min(most, len(labels))
    if capturing(labels):
        return len(labels)
    return int((labels != ignore_index).sum())


def unit_of(dtype: torch.dtype, z_loss: float) -> float | None:
    """By how much the gradient over fp16 logits is written too large, to be taken off in fp32; None: not at all.

    p - y is at most 1, times 1 + 2 z_loss log_sum_exp, for which a log_sum_exp of 100 is allowed; fp16 ends at 2^16 and
    has all its digits from 2^-14 on. Divided by the number of rows before it is written, and before a loss scale
    multiplies it, the gradient of all but the label's class would be 0 at a vocabulary of 58,498.
    """
    return 2.0 ** (15 - math.ceil(math.log2(1 + 200 * abs(z_loss)))) if dtype == torch.float16 else None


def forward(
    kernels: ModuleType,
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [N]
    bias: Tensor | None,  # [V]
    row_grad: Tensor | None,  # fp32 [N]
    options: CrossEntropyOptions,
    chunk_rows: int,
    grad_dtypes: tuple[torch.dtype | None, torch.dtype | None, torch.dtype | None],
    num_labelled: int | None,
    window: tuple[int, int] | None,
    filter_eps: float | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    (count, width), classes, dtype = hidden.shape, weight.shape[0], hidden.dtype
    dx_dtype, dw_dtype, db_dtype = grad_dtypes
    most = labelled_rows(labels, options.ignore_index, num_labelled)
    chunks = max(-(-most // chunk_rows), 1)
    step = max(-(-most // chunks), 1)  # chunks of equal size: the last is not left with a few rows
    pitch = -(-classes // PITCH) * PITCH
    low, high = window or (0, classes)
    filtered = filter_eps is not None and any(grad_dtypes) and not capturing(labels)

    def room(*shape: int, dtype: torch.dtype = dtype, zero: bool = False) -> Tensor:
        return (torch.zeros if zero else torch.empty)(shape, dtype=dtype, device=hidden.device)

    losses, scale = room(count, dtype=torch.float32), room(dtype=torch.float32)
    rows, row_labels = (room(most, dtype=torch.int64) for _ in range(2))
    kernels.pick_rows(labels, options.ignore_index, options.reduction == "mean", losses, rows, row_labels, scale)

    unit = unit_of(dtype, options.z_loss) if any(grad_dtypes) and row_grad is None else None
    factor = scale if unit is None else torch.full_like(scale, unit)

    bounded = window is not None or filter_eps is not None
    dropped = room(count, dtype=torch.float32, zero=True) if bounded else None
    dx = None if dx_dtype is None else room(count, width, dtype=dx_dtype, zero=True)
    dw = db = None
    if dw_dtype is not None:
        # One product adds up in fp32 and is rounded once; several add up in an fp32 matrix.
        dw = room(classes, width, dtype=dtype if chunks == 1 and dw_dtype == dtype else torch.float32,
                  zero=most == 0 or filtered)  # fmt: skip
        if most and not filtered and window is not None:
            dw[:low].zero_(), dw[high:].zero_()
    if db_dtype is not None:
        db = room(classes, dtype=torch.float32, zero=True)
    if bias is not None:
        bias = torch.nn.functional.pad(bias, (0, pitch - classes))

    x, logits = room(step, width), room(step, pitch)
    for begin in range(0, most, step):
        part = slice(begin, min(begin + step, most))
        n = part.stop - begin
        kernels.copy_rows(hidden, rows[part], x[:n], None)
        torch.mm(x[:n], weight.t(), out=logits[:n, :classes])
        kernels.row_gradients(
            logits[:n], bias, row_labels[part], rows[part], row_grad, factor, options, losses,
            (low, high) if any(grad_dtypes) else None, dropped, classes,
        )  # fmt: skip
        gradient, head, columns = logits[:n, low:high], weight[low:high], None
        if filtered:
            columns, left_out = needed_columns(gradient, factor, filter_eps)
            dropped.index_add_(0, rows[part].clamp(min=0), left_out)  # of row -1 it is 0
        if columns is not None:
            gradient, head = gradient.index_select(1, columns), head.index_select(0, columns)
        if dx is not None:
            product = room(n, width, dtype=dtype if unit is None else torch.float32)
            add_product(product, gradient, head, first=True)
            kernels.copy_rows(product, None, dx, rows[part])
        if dw is not None and columns is None:
            add_product(dw[low:high], gradient.t(), x[:n], first=begin == 0 and not filtered)
        elif dw is not None:
            product = room(len(columns), width, dtype=dw.dtype)
            add_product(product, gradient.t(), x[:n], first=True)
            dw[low:high].index_add_(0, columns, product)
        if db is not None:
            total = gradient.sum(0, dtype=torch.float32)
            db[low:high] += total if columns is None else torch.zeros_like(db[low:high]).index_copy_(0, columns, total)

    if unit is not None:
        for gradient in (dx, dw, db):
            if gradient is not None:
                gradient.mul_(scale / unit)
    loss, _ = kernels.reduce(losses, labels, options)
    return loss, dx, None if dw is None else dw.to(dw_dtype), None if db is None else db.to(db_dtype), dropped


def add_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """total = a @ b on the first call, total += a @ b on later ones; in fp32 where total is, whatever a and b are."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=0.0 if first else 1.0, out=total)
    elif not total.is_cuda:  # Triton's interpreter; torch has mixed products on GPUs only
        torch.addmm(total, a.float(), b.float(), beta=0.0 if first else 1.0, out=total)
    elif first:
        torch.mm(a, b, out_dtype=torch.float32, out=total)
    elif MIXED_SUMS:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += torch.mm(a, b, out_dtype=torch.float32)
