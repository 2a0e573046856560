"""Dropout, and attention with it, at the speed of a CPU where there is one: torch draws its masks there one by one."""

import torch
import torch.nn.functional as F
from torch import Tensor

from reca_kernels import Philox, philox_uniform
from reca_kernels.memory import has_values


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Drop elements with probability p and scale the others by 1 / (1 - p), in training.

    On a CPU the draws are of Philox, whose key is drawn from torch's generator, and the mask is a factor in the type of
    x: of where(), which is no vector code there, backward and forward pass take twice the time.
    """
    if not (training and p):
        return x
    if not _by_philox(x, p):
        return F.dropout(x, p)
    key = Philox(torch.randint(2**62, ()), torch.zeros(1, dtype=torch.int64), stream=0)
    keep = philox_uniform(key, x.numel()).ge_(p).view(x.shape).to(x.dtype)
    return x * keep.mul_(1 / (1 - p))


def attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, p: float) -> Tensor:  # [B, H, L, d]
    """Attend to the keys that are seen, bool [..., L] (None: all), and drop probabilities with probability p."""
    if not (p and _by_philox(q, p)):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=p)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    return dropout(scores.softmax(-1), p, True) @ v


def _by_philox(x: Tensor, p: float) -> bool:
    return x.device.type == "cpu" and has_values(x) and 0 < p < 1
