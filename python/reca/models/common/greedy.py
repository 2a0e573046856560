"""Greedy decoding and detokenisation."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


@torch.no_grad()
def greedy_tokens(next_logits: Callable[[Tensor | None], Tensor], max_new_tokens: int, eos: int) -> Tensor:
    """Decode a batch of sequences greedily, int64 [B, n], n <= max_new_tokens; stop once all have generated `eos`.

    next_logits: maps the previous tokens, int64 [B] (None in the first step), to the logits [B, V] of the next ones.
    """
    tokens: list[Tensor] = []
    ended: Tensor | bool = False  # [B]: the sequence has generated eos
    for _ in range(max_new_tokens):
        tokens.append(next_logits(tokens[-1] if tokens else None).argmax(-1))
        ended = (tokens[-1] == eos) | ended
        if ended.all():
            break
    return torch.stack(tokens, 1)


def decode_replies(tokenizer: PreTrainedTokenizerBase, tokens: Tensor, eos: int) -> list[str]:  # int64 [B, n]
    """Detokenise each sequence up to its first `eos`, without special tokens and surrounding whitespace."""
    rows = (row[: row.index(eos)] if eos in row else row for row in tokens.tolist())
    return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]
