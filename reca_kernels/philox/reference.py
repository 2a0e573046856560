"""Philox-4x32-10 and standard normals in plain PyTorch: the reference that every backend reproduces bit for bit.

Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3 (SC 2011).

A number is addressed by a seed, a sample, a stream of the sample, and its element index in the stream:
    key      (seed low, seed high)
    counter  (block low, block high | sample >> 56 << 24, sample low, sample >> 32 << 8 | stream)
             with block = element // 4, below 2^56
    word     element % 4

So each of the 2^64 sample ids has its own noise. For ids below 2^56 the second word is that of the block alone.
"""

import torch
from torch import Tensor

Address = tuple[Tensor, Tensor, int]  # seed int64 [], sample ids int64 [B], stream: a reca_kernels.Philox

M0, M1 = 0xD2511F53, 0xCD9E8D57
W0, W1 = 0x9E3779B9, 0xBB67AE85
LOW = 0xFFFFFFFF

# Cephes' single precision polynomials, highest power first.
LOG = (7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
       -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1)  # fmt: skip
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
SQRT_HALF_BITS = 0x3F3504F3


def philox_4x32_10(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Compute four uint32 words (held in int64) per counter. Counter and key words are int64 tensors in [0, 2^32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * M0, c2 * M1  # int64 products wrap modulo 2^64; the masks below read them as unsigned
        c0, c1, c2, c3 = ((p1 >> 32) & LOW) ^ c1 ^ k0, p1 & LOW, ((p0 >> 32) & LOW) ^ c3 ^ k1, p0 & LOW
        k0, k1 = (k0 + W0) & LOW, (k1 + W1) & LOW
    return c0, c1, c2, c3


def philox_bits(seed: Tensor, sample_ids: Tensor, stream: int, n: int) -> Tensor:
    """Draw uint32 words, held in int64 [B, n]."""
    blocks = torch.arange((n + 3) // 4, device=sample_ids.device)[None, :]
    ids = sample_ids[:, None]
    zero = torch.zeros_like(blocks + ids)
    counter = (blocks & LOW, blocks >> 32 | (ids >> 56 & 0xFF) << 24, ids & LOW, ((ids >> 32) & 0xFFFFFF) << 8 | stream)
    words = philox_4x32_10(tuple(zero + c for c in counter), (seed & LOW, (seed >> 32) & LOW))
    return torch.stack(words, dim=-1).flatten(1)[:, :n]


def uniform(bits: Tensor) -> Tensor:
    """Convert the upper 24 bits of uint32 words to fp32 in [0, 1)."""
    return (bits >> 8).float() * 2.0**-24


def philox_uniform(seed: Tensor, sample_ids: Tensor, stream: int, n: int) -> Tensor:
    return uniform(philox_bits(seed, sample_ids, stream, n))


def philox_normal(seed: Tensor, sample_ids: Tensor, stream: int, n: int) -> Tensor:
    """Apply Box-Muller to the word pairs (0, 1) and (2, 3): radius from the first word, angle from the second."""
    bits = philox_bits(seed, sample_ids, stream, (n + 3) // 4 * 4).unflatten(1, (-1, 2))
    u = bits[..., 0].float() * 2.0**-32 + 2.0**-33  # (0, 1]
    radius = torch.sqrt((log(u) * -2.0).double()).float()  # torch's fp32 sqrt is not always correctly rounded
    sin, cos = sincos_turns(bits[..., 1] >> 8)
    return torch.stack((radius * cos, radius * sin), dim=-1).flatten(1)[:, :n]


def log(u: Tensor) -> Tensor:
    """Compute the natural logarithm of fp32 numbers in (0, 1], with separately rounded products and sums."""
    bits = u.view(torch.int32)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0  # u = (1 + f) 2^exponent, 1 + f in [sqrt(1/2), sqrt(2))
    e, z = exponent.float(), f * f
    y = horner(LOG, f) * f * z
    y = y + e * LN2_LOW
    y = y - z * 0.5
    return (f + y) + e * LN2_HIGH


def sincos_turns(k: Tensor) -> tuple[Tensor, Tensor]:
    """Compute sin and cos of k / 2^24 turns, k int64 in [0, 2^24). The range reduction is exact."""
    quadrant = (k + (1 << 21)) >> 22
    x = (k - (quadrant << 22)).float() * 2.0**-24 * (2.0 * torch.pi)
    z = x * x
    sin = horner(SIN, z) * z * x + x
    cos = horner(COS, z) * z * z - z * 0.5 + 1.0
    odd = (quadrant & 1).bool()
    s, c = torch.where(odd, cos, sin), torch.where(odd, sin, cos)
    return torch.where((quadrant & 2).bool(), -s, s), torch.where(((quadrant + 1) & 2).bool(), -c, c)


def horner(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    y = torch.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        y = y * x + c
    return y
