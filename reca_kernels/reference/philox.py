"""Philox-4x32-10 in plain PyTorch: the definition that every backend reproduces bit for bit.

Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3 (SC 2011).

One draw is addressed by a seed, a sample and a stream inside the sample, and by its element index there:
    key      (seed low, seed high)
    counter  (block low, block high, sample low, sample high << 8 | stream)   with block = element // 4
    word     element % 4
"""

import torch
from torch import Tensor

M0, M1 = 0xD2511F53, 0xCD9E8D57
W0, W1 = 0x9E3779B9, 0xBB67AE85
LOW = 0xFFFFFFFF


def philox_4x32_10(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four uint32 words (held in int64) per counter. Counter and key words are int64 tensors in [0, 2^32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * M0, c2 * M1  # int64 products wrap modulo 2^64; the masks below read them as unsigned
        c0, c1, c2, c3 = ((p1 >> 32) & LOW) ^ c1 ^ k0, p1 & LOW, ((p0 >> 32) & LOW) ^ c3 ^ k1, p0 & LOW
        k0, k1 = (k0 + W0) & LOW, (k1 + W1) & LOW
    return c0, c1, c2, c3


def philox_bits(seed: Tensor, sample_ids: Tensor, stream: int, n: int) -> Tensor:
    """int64 [B, n] holding uint32 words."""
    blocks = torch.arange((n + 3) // 4, device=sample_ids.device)[None, :]
    ids = sample_ids[:, None]
    zero = torch.zeros_like(blocks + ids)
    counter = (zero + (blocks & LOW), zero + (blocks >> 32), zero + (ids & LOW), zero + (((ids >> 32) & 0xFFFFFF) << 8 | stream))
    words = philox_4x32_10(counter, (seed & LOW, (seed >> 32) & LOW))
    return torch.stack(words, dim=-1).flatten(1)[:, :n]


def uniform(bits: Tensor) -> Tensor:
    """uint32 words -> fp32 in [0, 1), 24 bits."""
    return (bits >> 8).float() * 2.0**-24


def philox_uniform(seed: Tensor, sample_ids: Tensor, stream: int, n: int) -> Tensor:
    return uniform(philox_bits(seed, sample_ids, stream, n))


def philox_normal(seed: Tensor, sample_ids: Tensor, stream: int, n: int) -> Tensor:
    """Box-Muller on word pairs (0, 1) and (2, 3): radius from the first, angle from the second."""
    bits = philox_bits(seed, sample_ids, stream, (n + 3) // 4 * 4).unflatten(1, (-1, 2))
    u = bits[..., 0].float() * 2.0**-32 + 2.0**-33  # (0, 1]
    angle = uniform(bits[..., 1]) * (2.0 * torch.pi)
    radius = torch.sqrt(-2.0 * torch.log(u))
    return torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1).flatten(1)[:, :n]
