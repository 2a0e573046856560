"""Which codes of an image are hidden: the cosine schedule of MaskGIT."""

import math

import torch
from torch import Tensor

from reca.rng import CounterRNG, RandomStream


def cosine(t: Tensor) -> Tensor:
    """Return the share of codes that are hidden at time t in [0, 1], in fp32 as the release computes it."""
    return torch.cos(t * math.pi * 0.5)


def sample_mask(rng: CounterRNG, sample_ids: Tensor, image_tokens: int) -> Tensor:  # int64 [B]
    """Draw which codes of each image are hidden, bool [B, N]: cos(pi/2 t) of them, at least one."""
    share = cosine(rng.uniform(RandomStream.MASK_RATE, sample_ids)).clamp(min=0)
    order = rng.uniform(RandomStream.MASK_ORDER, sample_ids, image_tokens).argsort(dim=-1, stable=True)
    return order < (image_tokens * share).round().clamp(min=1)
