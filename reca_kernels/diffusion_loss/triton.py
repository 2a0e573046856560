"""MAR's diffusion loss in Triton: a program handles a few rows with all their channels, padded to a power of two.

The likelihood of step 0, one row in a thousand, is computed only in programs with such a row.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from reca_kernels.philox.address import Philox, flattened
from reca_kernels.philox.triton import FUSE, normal_pair, words

ELEMENTS = 1024  # elements of x_t per program, padding included
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _rows(x0, rows, t, table, seed, ids, stream, explicit, count, samples, steps, CHANNELS: tl.constexpr,
          EXPLICIT: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """Return indices and steps of the program's rows [ROWS], masks of rows and elements, x0 and noise [ROWS, C].

    For a row or step out of range, the step is 0 and x0 is NaN.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, C)[None, :]
    exists = row < count
    here = exists[:, None] & (channel < CHANNELS)
    step = tl.load(t + row, mask=exists, other=0)
    source = row
    if rows is not None:
        source = tl.load(rows + row, mask=exists, other=0)
    known = (source >= 0) & (source < samples) & (step >= 0) & (step < steps)
    step = tl.where(known, step, 0)
    there = here & known[:, None]
    clean = tl.load(x0 + source[:, None] * CHANNELS + channel, mask=there, other=float("nan")).to(tl.float32)
    if EXPLICIT:
        noise = tl.load(explicit + row[:, None] * CHANNELS + channel, mask=here, other=0.0).to(tl.float32)
    else:
        sample = tl.load(ids + row, mask=exists, other=0)[:, None]
        block = tl.zeros([ROWS, C // 4], tl.int64) + tl.arange(0, C // 4)[None, :]
        w0, w1, w2, w3 = words(tl.load(seed), sample + tl.zeros_like(block), stream, block)
        e0, e1 = normal_pair(w0, w1)
        e2, e3 = normal_pair(w2, w3)
        noise = tl.reshape(tl.join(tl.join(e0, e2), tl.join(e1, e3)), (ROWS, C))
    return row, step, exists, here, clean, noise


@triton.jit(do_not_specialize=["stream", "samples", "steps"])
def add_noise_kernel(x0, rows, t, table, seed, ids, stream, explicit, x_t, count, samples, steps,
                     CHANNELS: tl.constexpr, EXPLICIT: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr):  # fmt: skip
    row, step, exists, here, clean, noise = _rows(
        x0, rows, t, table, seed, ids, stream, explicit, count, samples, steps, CHANNELS, EXPLICIT, ROWS, C
    )
    sqrt_abar = tl.load(table + step * 8, mask=exists, other=0.0)[:, None]
    sqrt_1m_abar = tl.load(table + step * 8 + 1, mask=exists, other=0.0)[:, None]
    mixed = sqrt_abar * clean + sqrt_1m_abar * noise
    to = x_t + row[:, None] * CHANNELS + tl.arange(0, C)[None, :]
    tl.store(to, mixed.to(x_t.dtype.element_ty), mask=here)


@triton.jit
def _first_step(x0, mean, log_variance):
    """Return -ln of the probability of the bin of width 2/255 around x0, and its derivative by the log variance.

    With h and l the bin's ends in standard deviations, S the logistic function and k(x) = 1.596 (x + 0.0447 x³), the
    probability is S(k(h)) - S(k(l)), the tanh approximation of the normal CDF. It is computed as a product of
    exponentials of negative numbers, with k(h) - k(l) computed from h - l. So fp32 is accurate enough, where the other
    backends subtract in fp64.
    """
    inverse = tl.exp(-0.5 * log_variance)
    centered = x0 - mean
    # The result is constant beyond 1e4; clamping keeps cubes finite. NaN propagates.
    h = tl.clamp(inverse * (centered + 1 / 255), -1e4, 1e4, propagate_nan=tl.PropagateNan.ALL)
    l = tl.clamp(inverse * (centered - 1 / 255), -1e4, 1e4, propagate_nan=tl.PropagateNan.ALL)  # noqa: E741
    one_sided = tl.abs(x0) > 0.999  # bins at the ends of the range are open: l is -infinity, or h is infinity
    mirror = tl.where(one_sided, x0 > 0, h + l > 0)  # a bin and its mirror image have the same probability
    h, l = tl.where(mirror, -l, h), tl.where(mirror, -h, l)  # noqa: E741
    a = 1.5957691216057308 * (h + 0.044715 * h * h * h)
    b = 1.5957691216057308 * (l + 0.044715 * l * l * l)
    gap = 1.5957691216057308 * (h - l) * (1 + 0.044715 * (h * h + h * l + l * l))
    near = gap * (1 - gap / 2 * (1 - gap / 3 * (1 - gap / 4 * (1 - gap / 5 * (1 - gap / 6 * (1 - gap / 7))))))
    shrunk = tl.where(one_sided, 0.0, tl.exp(-gap))
    part = tl.where(one_sided, 1.0, tl.where(gap < 0.5, near, 1 - shrunk))  # 1 - e^(k(l) - k(h))
    tail = tl.where(one_sided, 0.0, tl.exp(tl.minimum(b, 0.0)))
    log_p = tl.minimum(a, 0.0) - tl.log(1 + tl.exp(-tl.abs(a))) + tl.log(part) - tl.log(1 + tail)
    by_h = h * (1 + 3 * 0.044715 * h * h) * (1 + tail) / (1 + tl.exp(tl.minimum(a, 80.0)))
    by_l = l * (1 + 3 * 0.044715 * l * l) * (tail + shrunk) / (1 + tail)
    clamped = log_p <= -27.631021115928547  # ln 1e-12
    slope = 0.5 * 1.5957691216057308 * (by_h - by_l) / part
    return tl.where(clamped, 27.631021115928547, -log_p), tl.where(clamped, 0.0, slope)


@triton.jit(do_not_specialize=["stream", "samples", "steps"])
def loss_kernel(x0, rows, t, table, seed, ids, stream, explicit, out, gradient, losses, count, samples, steps,
                CHANNELS: tl.constexpr, EXPLICIT: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr):  # fmt: skip
    row, step, exists, here, clean, noise = _rows(
        x0, rows, t, table, seed, ids, stream, explicit, count, samples, steps, CHANNELS, EXPLICIT, ROWS, C
    )
    place = row[:, None] * (2 * CHANNELS) + tl.arange(0, C)[None, :]
    predicted = tl.load(out + place, mask=here, other=0.0).to(tl.float32)
    variance = tl.load(out + place + CHANNELS, mask=here, other=0.0).to(tl.float32)
    line = table + step * 8
    sqrt_abar = tl.load(line, mask=exists, other=0.0)[:, None]
    sqrt_1m_abar = tl.load(line + 1, mask=exists, other=0.0)[:, None]
    recip = tl.load(line + 2, mask=exists, other=0.0)[:, None]
    recip_m1 = tl.load(line + 3, mask=exists, other=0.0)[:, None]
    c1 = tl.load(line + 4, mask=exists, other=0.0)[:, None]
    c2 = tl.load(line + 5, mask=exists, other=0.0)[:, None]
    log_posterior = tl.load(line + 6, mask=exists, other=0.0)[:, None]
    log_beta = tl.load(line + 7, mask=exists, other=0.0)[:, None]

    span = 0.5 * (log_beta - log_posterior)
    error = predicted - noise
    noisy = sqrt_abar * clean + sqrt_1m_abar * noise
    truth = c1 * clean + c2 * noisy
    mean = c1 * (recip * noisy - recip_m1 * predicted) + c2 * noisy
    log_variance = (variance + 1.0) * span + log_posterior
    precision = tl.exp(-log_variance)
    shrink = tl.exp(log_posterior) * precision
    scaled = (truth - mean) * (truth - mean) * precision
    bound = 0.5 * (log_variance - log_posterior - 1.0 + shrink + scaled)
    slope = 0.5 * (1.0 - shrink - scaled)
    first = exists & (step == 0)
    if tl.max(first.to(tl.int32), 0) > 0:
        score, score_slope = _first_step(clean, mean, log_variance)
        bound = tl.where(first[:, None], score, bound)
        slope = tl.where(first[:, None], score_slope, slope)
    total = tl.sum(tl.where(here, error * error + bound * (1 / LN_2), 0.0), 1)
    tl.store(losses + row, total * (1 / CHANNELS), mask=exists)
    if gradient is not None:
        by_noise, by_variance = error * (2 * (1 / CHANNELS)), slope * (span * (1 / CHANNELS / LN_2))
        tl.store(gradient + place, by_noise.to(out.dtype.element_ty), mask=here)
        tl.store(gradient + place + CHANNELS, by_variance.to(out.dtype.element_ty), mask=here)


# ---- launchers ----


def add_noise(x0: Tensor, t: Tensor, noise: Philox | Tensor, table: Tensor, rows: Tensor | None, out: Tensor) -> None:
    programs, address, compiled = _launch(x0, noise, len(t))
    sizes = len(t), x0.shape[0], table.shape[0]
    if programs:
        with torch.cuda.device_of(out):
            add_noise_kernel[programs,](x0, rows, t, table, *address, out, *sizes, **compiled)


def losses(
    out: Tensor,  # [M, 2 C]
    x0: Tensor,  # [N, C]
    t: Tensor,  # [M]
    noise: Philox | Tensor,
    table: Tensor,  # [steps, 8]
    rows: Tensor | None,  # [M]
    gradient: Tensor | None,  # [M, 2 C]
) -> Tensor:  # fp32 [M]
    losses = torch.empty(len(t), dtype=torch.float32, device=out.device)
    programs, address, compiled = _launch(x0, noise, len(t))
    sizes = len(t), x0.shape[0], table.shape[0]
    if programs:
        with torch.cuda.device_of(out):
            loss_kernel[programs,](x0, rows, t, table, *address, out, gradient, losses, *sizes, **compiled)
    return losses


def _launch(x0: Tensor, noise: Philox | Tensor, count: int) -> tuple[int, tuple[Any, ...], dict[str, Any]]:
    """Return (programs, arguments for the noise, compile-time arguments)."""
    address = flattened(noise)
    explicit = isinstance(noise, Tensor)
    channels = x0.shape[1]
    padded = max(triton.next_power_of_2(channels), 4)
    block = max(ELEMENTS // padded, 1)
    compiled = {"CHANNELS": channels, "EXPLICIT": explicit, "ROWS": block, "C": padded, "num_warps": 4, **FUSE}
    return triton.cdiv(count, block), address, compiled
