"""Attention by a plan in place of a mask, for language models of transformers: attn_implementation=PLANNED, plan=..."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel

from reca.models.common.greedy import greedy_tokens
from reca_kernels import AttentionPlan, AttentionSpan, attention, attention_plan

PLANNED = "reca_planned"


@torch.compiler.disable  # outside compiled layers: a new layout would compile them again
def _planned(
    module: nn.Module,
    query: Tensor,  # [B, H, L, d]
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # None: transformers makes masks only for implementations that it knows
    *,
    plan: AttentionPlan | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: object,
) -> tuple[Tensor, None]:
    if plan is None:
        raise ValueError(f"{type(module).__name__} attends by a plan; call the model with plan=attention_plan(...)")
    if dropout:
        raise ValueError(f"{type(module).__name__} drops {dropout:g} of its attention, which a planned one cannot")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return attention(q, k, v, plan, scale=scaling), None


AttentionInterface.register(PLANNED, _planned)


@torch.no_grad()
def greedy(
    model: PreTrainedModel,  # without its head
    head: nn.Module,
    embeddings: Tensor,  # [B, L, H]
    positions: Tensor,  # int64 [B, L]
    samples: Sequence[Sequence[AttentionSpan]],
    max_new_tokens: int,
    end: int,
) -> Tensor:
    """Continue prompts by the likeliest tokens, int64 [B, n], n <= max_new_tokens; ends when every row has met `end`.

    A new token sees all rows before it but the padding, which stands on the left; K/V of earlier rows are kept.
    """
    cache, count = DynamicCache(config=model.config), itertools.count(1)

    def next_logits(tokens: Tensor | None) -> Tensor:
        if tokens is None:
            rows, at, layout = embeddings, positions, samples
        else:
            new = next(count)
            rows, at = model.embed_tokens(tokens[:, None]), positions[:, -1:] + new
            layout = [_behind(sample, new) for sample in samples]
        hidden = model(
            inputs_embeds=rows,
            position_ids=at,
            plan=attention_plan(layout, device=embeddings.device),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return head(hidden[:, -1])

    return greedy_tokens(next_logits, len(embeddings), max_new_tokens, end)


def _behind(sample: Sequence[AttentionSpan], new: int) -> tuple[AttentionSpan, ...]:
    """Give spans for decoding token number `new`: the prompt and earlier tokens are cached."""
    pads = sum(run.length for run in sample if run.mode == "pad")
    rows = sum(run.length for run in sample) - pads + new - 1
    return AttentionSpan(pads, "pad", cached=True), AttentionSpan(rows, cached=True), AttentionSpan(1)
