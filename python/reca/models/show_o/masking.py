"""MaskGIT's cosine schedule: which codes of an image are masked."""

import math

import torch
from torch import Tensor

from reca.rng import CounterRNG, RandomStream


def cosine(t: Tensor) -> Tensor:
    """Return the share of codes masked at time t in [0, 1], in fp32 as in the release."""
    return torch.cos(t * math.pi * 0.5)


def sample_mask(rng: CounterRNG, sample_ids: Tensor, image_tokens: int) -> Tensor:  # int64 [B]
    """Draw the mask of each image, bool [B, N]: a share cos(pi/2 t) of its codes is masked, at least one."""
    share = cosine(rng.uniform(RandomStream.MASK_RATE, sample_ids)).clamp(min=0)
    order = rng.uniform(RandomStream.MASK_ORDER, sample_ids, image_tokens).argsort(dim=-1, stable=True)
    return order < (image_tokens * share).round().clamp(min=1)
