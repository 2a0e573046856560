"""Counter-based random numbers in Triton, bit-identical to reference.py.

The reference rounds every multiplication and addition separately. Kernels that draw numbers are therefore launched with
FUSE, which disables FMA contraction; explicit tl.fma is used where the product is exact.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from reca_kernels.philox.address import Philox
from reca_kernels.philox.kernels import DISTRIBUTIONS

FUSE = {"enable_fp_fusion": False}
BLOCK = 256  # Philox blocks, of four elements, per program


@triton.jit
def words(seed, sample, stream, block):
    """Return the four words of each Philox block. seed, sample and block are int64; stream is an integer."""
    high = ((sample >> 32).to(tl.uint32) << 8) | stream.to(tl.uint32)
    middle = (block >> 32).to(tl.uint32) | ((sample >> 56).to(tl.uint32) << 24)
    return tl.philox(seed, block.to(tl.uint32), middle, sample.to(tl.uint32), high)


@triton.jit
def normal_pair(a, b):
    """Compute two standard normals from two words by Box-Muller: radius from the first, angle from the second.

    csrc/common/noise.cuh explains why each step is bit-identical to the reference.
    """
    u = tl.fma(a.to(tl.float32), 2.0**-32, 2.0**-33)
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) & -0x800000
    f = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    e = exponent.to(tl.float32)
    z = f * f
    p = 2 * 7.0376836292e-2 * f + 2 * -1.1514610310e-1
    p = p * f + 2 * 1.1676998740e-1
    p = p * f + 2 * -1.2420140846e-1
    p = p * f + 2 * 1.4249322787e-1
    p = p * f + 2 * -1.6668057665e-1
    p = p * f + 2 * 2.0000714765e-1
    p = p * f + 2 * -2.4999993993e-1
    p = p * f + 2 * 3.3333331174e-1
    p = p * f * z
    p = p + e * (2.0**-22 * -2.12194440e-4)
    p = p - z
    # Multiplied by -1, because Triton's unary minus is 0 - x, which loses the sign of zero.
    radius = tl.sqrt_rn(tl.fma(e, 2.0**-22 * 0.693359375, tl.fma(f, 2.0, p)) * -1.0)

    quadrant = b + 0x20000000
    t = ((b << 2) & 0xFFFFFC00).to(tl.int32, bitcast=True).to(tl.float32) * (6.283185307179586 * 2.0**-34)
    q = t * t
    s = (-1.9515295891e-4 * q + 8.3321608736e-3) * q + -1.6666654611e-1
    c = (2.443315711809948e-5 * q + -1.388731625493765e-3) * q + 4.166664568298827e-2
    s = s * q * t + t
    c = tl.fma(q, -0.5, c * q * q) + 1.0
    odd = (quadrant & 0x40000000) != 0
    sine = tl.where(odd, c, s).to(tl.uint32, bitcast=True) ^ (quadrant & 0x80000000)
    cosine = tl.where(odd, s, c).to(tl.uint32, bitcast=True) ^ ((quadrant + 0x40000000) & 0x80000000)
    return radius * cosine.to(tl.float32, bitcast=True), radius * sine.to(tl.float32, bitcast=True)


@triton.jit
def interleave(x0, x1, x2, x3):
    """Interleave four vectors [N] into [4 N]: x0[0] x1[0] x2[0] x3[0] x0[1] ..."""
    return tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), (4 * x0.shape[0],))


@triton.jit
def normals(seed, sample, stream, block):
    """Return the normals of the elements of N Philox blocks, [4 N]."""
    w0, w1, w2, w3 = words(seed, sample, stream, block)
    x0, x1 = normal_pair(w0, w1)
    x2, x3 = normal_pair(w2, w3)
    return interleave(x0, x1, x2, x3)


@triton.jit(do_not_specialize=["stream"])
def fill_kernel(seed, ids, stream, out, tasks, n, DISTRIBUTION: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    task = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = task < tasks
    # Arguments below 2^31 are int32, in which 4 * tasks or n + 3 could overflow.
    blocks = n // 4 + (0 if EVEN else 1)
    sample, block = task // blocks, task % blocks
    w0, w1, w2, w3 = words(tl.load(seed), tl.load(ids + sample, mask=here, other=0), stream, block)
    if DISTRIBUTION == 0:
        x = interleave(w0, w1, w2, w3).to(tl.float32, bitcast=True)
    elif DISTRIBUTION == 1:
        x = interleave(w0 >> 8, w1 >> 8, w2 >> 8, w3 >> 8).to(tl.float32) * 2.0**-24
    else:
        x0, x1 = normal_pair(w0, w1)
        x2, x3 = normal_pair(w2, w3)
        x = interleave(x0, x1, x2, x3)
    element = tl.program_id(0).to(tl.int64) * BLOCK * 4 + tl.arange(0, 4 * BLOCK)
    if EVEN:  # n is a multiple of 4, so the blocks of all samples are contiguous
        tl.store(out + element, x, mask=element // 4 < tasks)
    else:
        row = element // 4 // blocks
        inner = element - row * blocks * 4
        tl.store(out + row * n + inner, x, mask=(element // 4 < tasks) & (inner < n))


def draw(noise: Philox, distribution: str, out: Tensor) -> None:
    samples, n = out.shape
    tasks = samples * triton.cdiv(n, 4)
    if tasks == 0:
        return
    compiled = {"DISTRIBUTION": DISTRIBUTIONS[distribution], "EVEN": n % 4 == 0, "BLOCK": BLOCK, **FUSE}
    with torch.cuda.device_of(out):
        fill_kernel[triton.cdiv(tasks, BLOCK),](*noise, out, tasks, n, **compiled)
