"""Cross-entropy in Triton: a program per row in the forward pass, a program per piece of a row in the backward pass.

Rows have any alignment (with Show-o's 58498 classes, 16-bit rows are only 4-byte aligned). A row is therefore read in
16-byte units between its first and last 16-byte boundary, and the few elements outside them one by one:

    memory   |. . . . . . a a|U U U U U U U U|U U U U U U U U|b b b . . . . .|      | = a 16-byte boundary
                          begin               units                 end            a, b: edge elements

Memory outside the row is not accessed, and every unit is one 128-bit access.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from reca_kernels.masked_cross_entropy.options import CrossEntropyOptions

UNITS = 512  # 16-byte units that a program handles at a time: two per thread
LAUNCH = {"num_warps": 8, "enable_fp_fusion": True}  # explicit, because Triton 3.10 changes the defaults
SUM_SCALE = tl.constexpr(2.0**-33)  # logits are summed at this scale: exact, and without overflow
STEPS = 4  # iterations of UNITS units per piece of a row


# ---- arithmetic ----


@triton.jit
def tanh(x):
    """Compute tanh: a polynomial near 0, where the exponential form loses digits. The error is below 1e-6."""
    x2 = x * x
    near = x * (1 + x2 * (-1 / 3 + x2 * (2 / 15 + x2 * (-17 / 315 + x2 * (62 / 2835)))))
    far = 1 - 2 / (1 + tl.exp(2 * tl.abs(x)))
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))


@triton.jit
def softcap_logits(z, softcap, CAP: tl.constexpr):
    if CAP:
        z = softcap * tanh(z / softcap)
    return z


@triton.jit
def log_of_sum(total):
    """Return the log of an fp64 sum >= 1 as fp32. For a near-certain label the sum is 1 + tiny; tiny is preserved."""
    tiny = (total - 1).to(tl.float32)
    return tl.where(tiny < 1e-3, tiny * (1 - tiny * (0.5 - tiny / 3)), tl.log(total.to(tl.float32)))


@triton.jit
def expm1(x):
    near = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7))))))
    return tl.where(tl.abs(x) < 0.5, near, tl.exp(x) - 1)


@triton.jit
def non_target_grad(z, m, log_sum_exp, slope, level, softcap, CAP: tl.constexpr):
    """Return the gradient of the logit of a class other than the label."""
    if CAP:
        t = tanh(z / softcap)
        return (tl.exp((softcap * t - m) - log_sum_exp) * slope - level) * (1 - t * t)
    else:
        return tl.exp((z - m) - log_sum_exp) * slope - level


@triton.jit
def target_grad(z, m, log_sum_exp, scale, by_z_loss, smoothing, level, softcap, CAP: tl.constexpr):
    """Return the gradient of the label's logit. p - 1 is computed by expm1, without cancellation."""
    bend = 1.0
    if CAP:
        t = tanh(z / softcap)
        z = softcap * t
        bend = 1 - t * t
    log_p = (z - m) - log_sum_exp
    return (scale * (expm1(log_p) + tl.exp(log_p) * by_z_loss + smoothing) - level) * bend


@triton.jit
def online_softmax_update(row_max, total, z):
    """Add z [UNITS, VEC] to the running row_max [UNITS] and the sum of e^(z - row_max) [UNITS]. -inf adds 0."""
    top = tl.maximum(row_max, tl.max(z, 1))
    finite = tl.where(top == -float("inf"), 0.0, top)
    return top, total * tl.exp(row_max - finite) + tl.sum(tl.exp(z - finite[:, None]), 1)


@triton.jit
def row_loss(z_label, m, log_sum_exp, mean, smoothing, z_loss, SMOOTH: tl.constexpr):
    """Return the loss of a row. `mean` is the mean of z - m, fp64 because it may be beyond the range of fp32."""
    loss = log_sum_exp - (z_label - m)
    if SMOOTH:
        s = log_sum_exp.to(tl.float64)
        of_label = s - (z_label.to(tl.float64) - m.to(tl.float64))
        loss = ((1 - smoothing) * of_label + smoothing * (s - mean)).to(tl.float32)
    return loss + z_loss * (m + log_sum_exp) * (m + log_sum_exp)


# ---- a row in 16-byte units ----


@triton.jit
def _units(begin, end, VEC: tl.constexpr):
    """Return the offset of the first unit and their number. begin, end: int64, in elements from a 16-byte boundary."""
    first = (begin + VEC - 1) // VEC * VEC
    return first, tl.maximum(end // VEC - first // VEC, 0).to(tl.int32)


@triton.jit
def _edges(begin, end, first, count, VEC: tl.constexpr):
    """Return the positions of the elements outside all units, [2 VEC], and the mask of those that exist."""
    e = tl.arange(0, 2 * VEC)
    at = tl.where(e < VEC, begin + e, first + count.to(tl.int64) * VEC + (e - VEC))
    return at, at < tl.where(e < VEC, tl.minimum(first, end), end)


# ---- kernels ----


@triton.jit
def row_forward(row, begin, label, classes, smoothing, z_loss, softcap, CAP: tl.constexpr, SMOOTH: tl.constexpr,
                VEC: tl.constexpr, UNITS: tl.constexpr):  # fmt: skip
    """Return (loss, row_max, log_sum_exp) of a row, reading it once.

    The row begins `begin` elements after `row`, a 16-byte boundary.
    """
    z_label = softcap_logits(tl.load(row + begin + label).to(tl.float32), softcap, CAP)
    end = begin + classes
    first, count = _units(begin, end, VEC)
    at, there = _edges(begin, end, first, count, VEC)
    edge = softcap_logits(tl.load(row + at, mask=there, other=0.0).to(tl.float32), softcap, CAP)
    # Relative to the label's logit, so that no digits are lost to a common offset.
    pivot = tl.where(tl.abs(z_label) < float("inf"), z_label, 0.0)
    edge_sum = tl.sum(tl.where(there, edge * SUM_SCALE - pivot * SUM_SCALE, 0.0), 0)
    edge = tl.where(there, edge, -float("inf"))

    # Every lane of UNITS has its own maximum and sum, so the loop has no reduction across threads.
    row_max = tl.full([UNITS], -float("inf"), tl.float32)
    total = tl.zeros([UNITS], tl.float32)
    sum_z = tl.zeros([UNITS], tl.float32)
    place = tl.arange(0, UNITS)
    element = place[:, None] * VEC + tl.arange(0, VEC)[None, :]
    for u in range(0, count, UNITS):
        here = (u + place < count)[:, None]
        z = tl.load(row + first + u * VEC + element, mask=here, other=-float("inf")).to(tl.float32)
        if CAP:
            z = tl.where(here, softcap_logits(z, softcap, CAP), -float("inf"))
        if SMOOTH:
            sum_z += tl.sum(tl.where(here, z * SUM_SCALE - pivot * SUM_SCALE, 0.0), 1)
        row_max, total = online_softmax_update(row_max, total, z)

    m = tl.maximum(tl.max(row_max, 0), tl.max(edge, 0))
    finite = tl.where(m == -float("inf"), 0.0, m)
    sums = tl.sum(total.to(tl.float64) * tl.exp(row_max - finite).to(tl.float64), 0)
    log_sum_exp = log_of_sum(sums + tl.sum(tl.exp(edge - finite).to(tl.float64), 0))
    mean = (tl.sum(sum_z.to(tl.float64), 0) + edge_sum) / SUM_SCALE / classes
    mean += pivot.to(tl.float64) - m.to(tl.float64)
    return row_loss(z_label, m, log_sum_exp, mean, smoothing, z_loss, SMOOTH), m, log_sum_exp


@triton.jit
def row_backward(source, out, begin, label, piece, m, log_sum_exp, scale, classes, smoothing, z_loss, softcap,
                 CAP: tl.constexpr, VEC: tl.constexpr, UNITS: tl.constexpr, STEPS: tl.constexpr):  # fmt: skip
    """Write piece `piece` of a row's gradient. `source`, which may be `out`, is read at the same positions."""
    by_z_loss = 2 * z_loss * (m + log_sum_exp)
    slope = scale * (1 + by_z_loss)
    level = scale * smoothing / classes

    # Load the target logit before the in-place stores. If another thread has already overwritten it, this thread does
    # not own that element, so the stale value is unused.
    z_label = tl.load(source + begin + label).to(tl.float32)
    target = target_grad(z_label, m, log_sum_exp, scale, by_z_loss, smoothing, level, softcap, CAP)

    end = begin + classes
    first, count = _units(begin, end, VEC)
    if piece == 0:
        at, there = _edges(begin, end, first, count, VEC)
        edge = tl.load(source + at, mask=there, other=0.0).to(tl.float32)
        edge = tl.where(at == begin + label, target, non_target_grad(edge, m, log_sum_exp, slope, level, softcap, CAP))
        tl.store(out + at, edge.to(out.dtype.element_ty), mask=there)

    place = tl.arange(0, UNITS)
    element = place[:, None] * VEC + tl.arange(0, VEC)[None, :]
    target_element = (begin + label - first).to(tl.int32)
    for u in range(piece * STEPS * UNITS, tl.minimum((piece + 1) * STEPS * UNITS, count), UNITS):
        here = (u + place < count)[:, None]
        z = tl.load(source + first + u * VEC + element, mask=here, other=0.0).to(tl.float32)
        g = tl.where(
            u * VEC + element == target_element, target, non_target_grad(z, m, log_sum_exp, slope, level, softcap, CAP)
        )
        tl.store(out + first + u * VEC + element, g.to(out.dtype.element_ty), mask=here)


@triton.jit
def row_zero(out, begin, piece, classes, VEC: tl.constexpr, UNITS: tl.constexpr, STEPS: tl.constexpr):
    """Fill a piece of a row's gradient with zeros."""
    end = begin + classes
    first, count = _units(begin, end, VEC)
    if piece == 0:
        at, there = _edges(begin, end, first, count, VEC)
        tl.store(out + at, tl.zeros([2 * VEC], tl.float32).to(out.dtype.element_ty), mask=there)
    place = tl.arange(0, UNITS)
    element = place[:, None] * VEC + tl.arange(0, VEC)[None, :]
    zeros = tl.zeros([UNITS, VEC], tl.float32).to(out.dtype.element_ty)
    for u in range(piece * STEPS * UNITS, tl.minimum((piece + 1) * STEPS * UNITS, count), UNITS):
        tl.store(out + first + u * VEC + element, zeros, mask=(u + place < count)[:, None])


@triton.jit
def forward_kernel(logits, lead, stride, labels, losses, stats, classes, ignore_index, smoothing, z_loss, softcap,
                   CAP: tl.constexpr, SMOOTH: tl.constexpr, VEC: tl.constexpr, UNITS: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row).to(tl.int64)
    stats += 2 * row
    if (label == ignore_index) | (label < 0) | (label >= classes):
        tl.store(losses + row, tl.where(label == ignore_index, 0.0, float("nan")))
        tl.store(stats, 0.0)
        tl.store(stats + 1, 0.0)
        return
    loss, m, log_sum_exp = row_forward(
        logits, lead + row * stride, label, classes, smoothing, z_loss, softcap, CAP, SMOOTH, VEC, UNITS
    )
    tl.store(losses + row, loss)
    tl.store(stats, m)
    tl.store(stats + 1, log_sum_exp)


@triton.jit
def backward_kernel(grad, grad_stride, scale, logits, lead, stride, labels, stats, out, out_lead, out_stride, classes,
                    ignore_index, smoothing, z_loss, softcap, CAP: tl.constexpr, IN_STEP: tl.constexpr,
                    VEC: tl.constexpr, UNITS: tl.constexpr, STEPS: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    label = tl.load(labels + row).to(tl.int64)
    begin = out_lead + row * out_stride
    if (label == ignore_index) | (label < 0) | (label >= classes):
        row_zero(out, begin, piece, classes, VEC, UNITS, STEPS)
        return
    shift = lead + row * stride - begin
    if IN_STEP:  # the 16-byte boundaries of both rows fall on the same elements
        shift = shift // VEC * VEC
    row_backward(
        logits + shift, out, begin, label, piece, tl.load(stats + 2 * row), tl.load(stats + 2 * row + 1),
        tl.load(scale) * tl.load(grad + row * grad_stride), classes, smoothing, z_loss, softcap, CAP, VEC, UNITS, STEPS,
    )  # fmt: skip


@triton.jit
def reduce_kernel(losses, labels, loss, scale, rows, ignore_index, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """Compute the loss and the factor for gradients, in one program and a fixed order."""
    at = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    count = tl.zeros([BLOCK], tl.int32)
    for row in range(0, rows, BLOCK):
        here = at < rows - row
        total += tl.load(losses + row + at, mask=here, other=0.0).to(tl.float64)
        if MEAN:
            label = tl.load(labels + row + at, mask=here, other=0).to(tl.int64)
            count += (here & (label != ignore_index)).to(tl.int32)
    denominator = 1.0
    if MEAN:
        denominator = tl.maximum(tl.sum(count.to(tl.int64), 0), 1).to(tl.float64)
    tl.store(loss, (tl.sum(total, 0) / denominator).to(tl.float32))
    tl.store(scale, (1.0 / denominator).to(tl.float32))  # type: ignore[attr-defined]


# ---- launchers ----


def on_boundary(rows: Tensor) -> tuple[Tensor, int]:
    """Return a view that begins at the 16-byte boundary before `rows`, if the storage includes it, and the offset of
    `rows` in elements.
    """
    lead = rows.data_ptr() % 16 // rows.element_size()
    if lead == 0 or lead > rows.storage_offset():
        return rows, 0
    return rows.as_strided((1,), (1,), rows.storage_offset() - lead), lead


def switches(logits: Tensor, options: CrossEntropyOptions) -> dict[str, bool | int]:
    """Return the compile-time arguments."""
    return {"CAP": options.softcap is not None, "VEC": 16 // logits.element_size(), "UNITS": UNITS, **LAUNCH}


def forward(
    logits: Tensor,  # [N, V]
    labels: Tensor,  # [N]
    options: CrossEntropyOptions,
) -> tuple[Tensor, Tensor, Tensor]:  # loss [] or [N], stats [N, 2], scale []
    rows, classes = logits.shape
    losses, stats = (torch.empty(shape, dtype=torch.float32, device=logits.device) for shape in ((rows,), (rows, 2)))
    ignore_index, smoothing, z_loss, softcap, _ = options
    base, lead = on_boundary(logits)
    with torch.cuda.device_of(logits):
        if rows:
            forward_kernel[rows,](
                base, lead, logits.stride(0), labels, losses, stats, classes, ignore_index, smoothing, z_loss,
                softcap or 0.0, SMOOTH=smoothing != 0, **switches(logits, options),
            )  # fmt: skip
    loss, scale = reduce(losses, labels, options)
    return loss, stats, scale


def reduce(losses: Tensor, labels: Tensor, options: CrossEntropyOptions) -> tuple[Tensor, Tensor]:
    """Return (loss, scale)."""
    if options.reduction == "none":
        return losses, torch.ones((), dtype=torch.float32, device=losses.device)
    loss, scale = (torch.empty((), dtype=torch.float32, device=losses.device) for _ in range(2))
    with torch.cuda.device_of(losses):
        reduce_kernel[1,](
            losses, labels, loss, scale, len(losses), options.ignore_index, MEAN=options.reduction == "mean",
            BLOCK=2048, **LAUNCH,
        )  # fmt: skip
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
    rows, classes = logits.shape
    if rows == 0:
        return
    ignore_index, smoothing, z_loss, softcap, _ = options
    compiled = switches(logits, options)
    vector = compiled["VEC"]
    (base, lead), (out_base, out_lead) = on_boundary(logits), on_boundary(out)
    in_step = (lead - out_lead) % vector == 0 and (rows == 1 or (logits.stride(0) - out.stride(0)) % vector == 0)
    pieces = triton.cdiv(max(classes // vector, 1), UNITS * STEPS)
    with torch.cuda.device_of(logits):
        backward_kernel[rows, pieces](
            grad, grad.stride(0) if grad.ndim else 0, scale, base, lead, logits.stride(0), labels, stats, out_base,
            out_lead, out.stride(0), classes, ignore_index, smoothing, z_loss, softcap or 0.0, IN_STEP=in_step,
            STEPS=STEPS, **compiled,
        )  # fmt: skip
