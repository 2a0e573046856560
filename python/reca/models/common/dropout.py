"""Dropout, and attention with dropout, that is fast on CPUs: torch draws its masks there one element at a time."""

import torch
import torch.nn.functional as F
from torch import Tensor

from reca_kernels import Philox, philox_uniform
from reca_kernels.memory import has_values


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Drop elements with probability p and scale the others by 1 / (1 - p), in training.

    On a CPU the mask is drawn by Philox, with a key drawn from torch's generator, and multiplied in x's dtype: where()
    is not vectorised there and would double the time of the forward and backward pass.
    """
    if not (training and p):
        return x
    if not _by_philox(x, p):
        return F.dropout(x, p)
    key = Philox(torch.randint(2**62, ()), torch.zeros(1, dtype=torch.int64), stream=0)
    keep = philox_uniform(key, x.numel()).ge_(p).view(x.shape).to(x.dtype)
    return x * keep.mul_(1 / (1 - p))


def attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, p: float) -> Tensor:  # [B, H, L, d]
    """Compute attention with dropout p. seen: attention mask, bool, broadcastable to [B, H, L, L]; None: all keys."""
    if not (p and _by_philox(q, p)):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=p)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    return dropout(scores.softmax(-1), p, True) @ v


def _by_philox(x: Tensor, p: float) -> bool:
    return x.device.type == "cpu" and has_values(x) and 0 < p < 1
