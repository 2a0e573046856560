"""What stands for the language that a large model brings along: h_v on the words of what it shows."""

import torch.nn.functional as F
from torch import Tensor

ALIGN, NORM, TEMPERATURE = 0.3, 1.0, 0.1


def alignment(h_v: Tensor, words: Tensor, table: Tensor) -> Tensor:  # [B, n, H], int64 [B, n], [V, H]
    """Every row of h_v pulled to the embedding of its word: cross-entropy of cosines, and distance over length."""
    cosine = F.normalize(h_v, dim=-1) @ F.normalize(table, dim=-1).T
    target = table[words].detach()
    distance = (h_v - target).square().sum(-1) / target.square().sum(-1)
    return ALIGN * F.cross_entropy((cosine / TEMPERATURE).flatten(0, 1), words.flatten()) + NORM * distance.mean()


def filled(ids: list[int], count: int, filler: int) -> list[int]:
    """A caption's token ids on `count` rows of h_v. Raises ValueError if they are more."""
    if len(ids) > count:
        raise ValueError(f"a caption of {len(ids)} tokens does not fit {count} rows of h_v")
    return ids + [filler] * (count - len(ids))
