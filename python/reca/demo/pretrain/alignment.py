"""Alignment of h_v with the text space, which large models bring along: each token of h_v on a word of its image."""

import torch.nn.functional as F
from torch import Tensor

ALIGN, NORM, TEMPERATURE = 0.3, 1.0, 0.1


def alignment(h_v: Tensor, words: Tensor, table: Tensor) -> Tensor:  # [B, n, H], int64 [B, n], [V, H]
    """Pull every token of h_v to the embedding of its word: cross-entropy of cosines, and distance over length."""
    cosine = F.normalize(h_v, dim=-1) @ F.normalize(table, dim=-1).T
    target = table[words].detach()
    distance = (h_v - target).square().sum(-1) / target.square().sum(-1)
    return ALIGN * F.cross_entropy((cosine / TEMPERATURE).flatten(0, 1), words.flatten()) + NORM * distance.mean()


def pad_tokens(ids: list[int], count: int, filler: int) -> list[int]:
    """Pad a caption's token ids to `count` tokens of h_v. Raises ValueError if they are more."""
    if len(ids) > count:
        raise ValueError(f"a caption of {len(ids)} tokens does not fit {count} tokens of h_v")
    return ids + [filler] * (count - len(ids))
