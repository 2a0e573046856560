"""masked_linear_cross_entropy in chunks of rows: torch's matmuls and a backend's kernels."""

import math

import torch
from torch import Tensor

from reca_kernels.masked_cross_entropy.options import CrossEntropyOptions
from reca_kernels.masked_linear_cross_entropy.kernels import Kernels, LabelledRows
from reca_kernels.masked_linear_cross_entropy.plan import Plan, machine, plan

ONES = 8  # columns of ones in the matmul that sums over rows: 16 bytes of 16-bit elements


def labelled_rows(labels: Tensor, ignore_index: int, max_labelled: int | None) -> int:
    """Return the number of rows to allocate.

    Without `max_labelled` the labels are counted, which synchronises with a GPU. During CUDA graph capture, where that
    is not allowed, the result is all rows.
    """
    if max_labelled is not None:
        return min(max_labelled, len(labels))
    if labels.is_cuda and torch.cuda.is_current_stream_capturing():
        return len(labels)
    return int((labels != ignore_index).sum())


def empty_labelled_rows(labels: Tensor, ignore_index: int, max_labelled: int | None) -> LabelledRows:
    """Allocate LabelledRows for a GPU kernel to fill."""
    most = labelled_rows(labels, ignore_index, max_labelled)

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=labels.device)

    rows, row_labels = (empty(most, dtype=torch.int64) for _ in range(2))
    return LabelledRows(rows, row_labels, empty(len(labels), dtype=torch.float32), empty(dtype=torch.float32))


def fp16_unit(dtype: torch.dtype, z_loss: float) -> float | None:
    """Return the factor that keeps the fp16 gradient of the logits in range, divided out later in fp32; None: none.

    |p - y| is at most 1, times 1 + 2 z_loss log_sum_exp, assuming a log_sum_exp of at most 100. fp16 ends at 2^16 and
    is denormal below 2^-14. The mean would divide by the number of rows before the loss scale is applied; at a
    vocabulary of 58,498 this would round the gradients of all classes but the label to 0.
    """
    return 2.0 ** (15 - math.ceil(math.log2(1 + 200 * abs(z_loss)))) if dtype == torch.float16 else None


def forward(
    kernels: Kernels,
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [N]
    bias: Tensor | None,  # [V]
    row_grad: Tensor | None,  # fp32 [N]
    options: CrossEntropyOptions,
    chunk_rows: int | None,
    grad_dtypes: tuple[torch.dtype | None, torch.dtype | None, torch.dtype | None],
    max_labelled: int | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return the loss, fp32 [] or [N], and its gradients dx [N, D], dw [V, D], db [V].

    hidden, weight and bias have the same dtype, in which the matmuls run. The upstream gradient is row_grad, or 1.
    grad_dtypes are the dtypes of the gradients, None for one that is not needed. dw and db are accumulated in fp32
    over chunks.
    """
    width, (classes, _), dtype = hidden.shape[1], weight.shape, hidden.dtype
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    dx_dtype, dw_dtype, db_dtype = grad_dtypes
    wants_gradient = any(grad_dtypes)
    rows, row_labels, losses, scale = kernels.compact_labelled_rows(labels, options, max_labelled)
    most = len(rows)
    on = machine(hidden.device)
    cut = plan(most, classes, width, dtype.itemsize, on, chunk_rows)

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=hidden.device)

    unit = fp16_unit(dtype, options.z_loss) if wants_gradient and row_grad is None else None
    factor = scale if unit is None else torch.full_like(scale, unit)

    dx = None if dx_dtype is None else empty(*hidden.shape, dtype=dx_dtype).zero_()
    dw = db = None
    if dw_dtype is not None:
        # A single matmul accumulates in fp32 and rounds once; several are accumulated in an fp32 matrix.
        dw = empty(classes, width, dtype=dtype if cut.chunks == 1 and dw_dtype == dtype else torch.float32)
        if most == 0:
            dw.zero_()
    if db_dtype is not None:
        db = empty(ONES if on.is_gpu else 1, cut.pitch, dtype=torch.float32).zero_()
    if bias is not None:
        bias = torch.nn.functional.pad(bias, (0, cut.pitch - classes))

    x_buffer, logits_buffer = empty(cut.rows, width), empty(cut.rows, cut.pitch)
    if not on.is_gpu:
        logits_buffer[:, classes:] = 0  # oneDNN's bf16 matmuls with AMX read padding and multiply it by 0
    for begin in range(0, most, cut.rows):
        chunk = slice(begin, min(begin + cut.rows, most))
        n = chunk.stop - begin
        x, padded = x_buffer[:n], logits_buffer[:n]
        logits = padded[:, :classes]
        kernels.gather_scatter_rows(hidden, rows[chunk], x, None)
        multiply_logits(x, weight, logits, cut)
        kernels.row_gradients(
            logits, bias, row_labels[chunk], rows[chunk], row_grad, factor, options, losses, wants_gradient
        )
        if dx is not None:
            product = empty(n, width, dtype=dtype if unit is None else torch.float32)
            # The remaining columns first: their partial sum is small, so rounding it costs no accuracy.
            for columns in reversed(parts(classes, cut.body)):
                add_product(product, logits[:, columns], weight[columns], first=columns.stop == classes, gpu=on.is_gpu)
            kernels.gather_scatter_rows(product, None, dx, rows[chunk])
        if dw is not None:
            for columns in parts(classes, cut.body):
                add_product(dw[columns], logits[:, columns].t(), x, first=begin == 0, gpu=on.is_gpu)
        if db is not None:
            add_column_sums(db, padded, classes)

    if unit is not None:
        for total in (dx, dw, db):
            if total is not None:
                total.mul_(scale / unit)
    loss, _ = kernels.reduce(losses, labels, options)
    if dw is not None:
        dw = dw.to(dw_dtype)
    if db is not None:
        db = db[0, :classes].clone() if db_dtype == torch.float32 else db[0, :classes].to(db_dtype)
    return loss, dx, dw, db


def parts(classes: int, body: int) -> list[slice]:
    """Return the column ranges of the matmuls; see plan.Plan."""
    return [slice(0, body), slice(body, classes)] if body < classes else [slice(0, classes)]


def multiply_logits(x: Tensor, weight: Tensor, out: Tensor, cut: Plan) -> None:
    """Write x @ weight.T into out."""
    for part in parts(len(weight), cut.body):
        for begin in range(part.start, part.stop, cut.columns):
            columns = slice(begin, min(begin + cut.columns, part.stop))
            torch.mm(x, weight[columns].t(), out=out[:, columns])


def add_column_sums(total: Tensor, padded: Tensor, classes: int) -> None:
    """Add the column sums of the logits, [n, pitch], to the first row of total, fp32 [1 or ONES, pitch].

    With ONES rows this is a matmul, which on GPUs reads at the speed of a copy. Columns beyond the classes do not
    affect the others.
    """
    if len(total) == 1:
        total[0, :classes] += padded[:, :classes].sum(0, dtype=torch.float32)
    else:
        ones = torch.ones(len(padded), ONES, dtype=padded.dtype, device=padded.device)
        add_product(total, ones.t(), padded, first=False, gpu=True)


def add_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool, gpu: bool) -> None:
    """Compute total = a @ b on the first call, total += a @ b on later ones.

    For an fp32 total of 16-bit matrices, GPUs compute fp32 products; on CPUs bf16 products are rounded to bf16.
    """
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=0.0 if first else 1.0, out=total)
    elif not gpu:
        product = torch.mm(a.float(), b.float()) if a.dtype == torch.float16 else torch.mm(a, b)
        total.copy_(product) if first else total.add_(product)
    elif first:
        torch.mm(a, b, out_dtype=torch.float32, out=total)
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
