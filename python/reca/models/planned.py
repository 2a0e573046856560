"""Attention by a plan in place of a mask, for language models of transformers: attn_implementation=PLANNED, plan=..."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel

from reca_kernels import AttentionPlan, Run, attention, attention_plan

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
    rows = (x.transpose(1, 2) for x in (query, key, value))
    return attention(*rows, plan, scale=scaling), None


AttentionInterface.register(PLANNED, _planned)


@torch.no_grad()
def greedy(
    model: PreTrainedModel,  # without its head
    head: nn.Module,
    embeddings: Tensor,  # [B, L, H]
    positions: Tensor,  # int64 [B, L]
    samples: Sequence[Sequence[Run]],
    max_new_tokens: int,
    end: int,
) -> Tensor:
    """The likeliest continuation, int64 [B, n], n <= max_new_tokens; ends when every row has met `end`.

    A new token sees all rows before it but the padding, which stands on the left; K/V of earlier rows are kept.
    """
    cache, plan = DynamicCache(config=model.config), attention_plan(samples, device=embeddings.device)
    tokens: list[Tensor] = []
    for _ in range(max_new_tokens):
        hidden = model(
            inputs_embeds=embeddings,
            position_ids=positions,
            plan=plan,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1:]
        tokens.append(head(hidden)[:, 0].argmax(-1, keepdim=True))
        if bool((torch.cat(tokens, 1) == end).any(1).all()):
            break
        embeddings, positions = model.embed_tokens(tokens[-1]), positions[:, -1:] + 1
        plan = attention_plan([_behind(sample, len(tokens)) for sample in samples], device=embeddings.device)
    return torch.cat(tokens, dim=1) if tokens else positions.new_empty(len(positions), 0)


def _behind(sample: Sequence[Run], new: int) -> tuple[Run, ...]:
    """The `new`-th row behind a sample, everything before it cached."""
    pads = sum(run.length for run in sample if run.mode == "pad")
    rows = sum(run.length for run in sample) - pads + new - 1
    return Run(pads, "pad", cached=True), Run(rows, cached=True), Run(1)
