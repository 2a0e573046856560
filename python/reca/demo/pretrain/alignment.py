"""Alignment of h_v with the text space, as large models have it: one word of the caption per token of h_v."""

import torch.nn.functional as F
from torch import Tensor

ALIGN, NORM, TEMPERATURE = 0.3, 1.0, 0.1


def alignment(h_v: Tensor, words: Tensor, table: Tensor) -> Tensor:  # [B, n, H], int64 [B, n], [V, H]
    """Compute the alignment loss: cross-entropy of cosine similarities, plus relative squared distance to targets."""
    cosine = F.normalize(h_v, dim=-1) @ F.normalize(table, dim=-1).T
    target = table[words].detach()
    distance = (h_v - target).square().sum(-1) / target.square().sum(-1)
    return ALIGN * F.cross_entropy((cosine / TEMPERATURE).flatten(0, 1), words.flatten()) + NORM * distance.mean()


def pad_tokens(ids: list[int], count: int, filler: int) -> list[int]:
    """Pad a caption's token ids to the `count` tokens of h_v. Raises ValueError if there are more."""
    if len(ids) > count:
        raise ValueError(f"a caption of {len(ids)} tokens does not fit {count} tokens of h_v")
    return ids + [filler] * (count - len(ids))
