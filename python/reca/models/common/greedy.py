"""Greedy decoding and detokenisation."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


@torch.no_grad()
def greedy_tokens(
    next_logits: Callable[[Tensor | None], Tensor], batch: int, max_new_tokens: int, eos: int | None
) -> Tensor:
    """Decode `batch` sequences greedily, int64 [B, n], n <= max_new_tokens.

    next_logits: maps the previous tokens, int64 [B] (None in the first step), to the logits [B, V] of the next ones.
    eos: decoding stops when every sequence has generated it; None never stops early.
    """
    tokens: list[Tensor] = []
    ended: Tensor | bool = False  # [B]: the sequence has generated eos
    for _ in range(max_new_tokens):
        tokens.append(next_logits(tokens[-1] if tokens else None).argmax(-1))
        if eos is not None and (ended := (tokens[-1] == eos) | ended).all():
            break
    return torch.stack(tokens, 1) if tokens else torch.empty(batch, 0, dtype=torch.int64)


def decode_replies(tokenizer: PreTrainedTokenizerBase, tokens: Tensor, eos: int) -> list[str]:  # int64 [B, n]
    """Detokenise each sequence up to its first `eos`, without special tokens and surrounding whitespace."""
    rows = (row[: row.index(eos)] if eos in row else row for row in tokens.tolist())
    return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]
