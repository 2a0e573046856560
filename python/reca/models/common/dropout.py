"""Dropout, and attention with it, at the speed of a CPU where there is one: torch draws its masks there one by one."""

import torch
import torch.nn.functional as F
from torch import Tensor

from reca_kernels.memory import has_values

LEVELS = 1 << 16  # a mask is drawn from 16 bits an element


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Drop elements with probability p and scale the others by 1 / (1 - p), in training.

    On a CPU p is rounded to a multiple of 2^-16, and the scale is that of the rounded one. The draws are of torch's
    generator.
    """
    if not (training and p):
        return x
    if not _by_bits(x, p):
        return F.dropout(x, p)
    dropped = round(p * LEVELS)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    keep = (bits[: x.numel()] >= dropped - LEVELS // 2).view(x.shape)
    return torch.where(keep, x, 0) * (LEVELS / (LEVELS - dropped))


def attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, p: float) -> Tensor:  # [B, H, L, d]
    """Attend to the keys that are seen, bool [..., L] (None: all), and drop probabilities with probability p."""
    if not (p and _by_bits(q, p)):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=p)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    return dropout(scores.softmax(-1), p, True) @ v


def _by_bits(x: Tensor, p: float) -> bool:
    return x.device.type == "cpu" and has_values(x) and 0 < round(p * LEVELS) < LEVELS
