"""Attention plans instead of masks in transformers language models: attn_implementation=PLANNED, then plan=..."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from reca.models.common.greedy import greedy_tokens
from reca.models.common.kv_cache import decoding_cache, prompt_cache, with_cache
from reca_kernels import AttentionPlan, AttentionSpan, attention, attention_plan
from reca_kernels.host import on_device

PLANNED = "reca_planned"
CAUSAL = "reca_causal"  # causal attention unless there is a plan


class OneRow(NamedTuple):
    """What one new row of each sample attends to, in place of a plan: RECA_ATTENTION does not choose its kernel.

    keys  bool [B, 1, 1, L]: the cached rows, the new one included; None: all
    """

    keys: Tensor | None

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None = None
    ) -> Tensor:  # [B, H, 1, d], [B, key heads, L, d] twice -> [B, H, d]
        # Heads that share a key head are rows of it: no kernel has to support groups of heads.
        rows = query.view(len(key), key.shape[1], -1, key.shape[3])
        return F.scaled_dot_product_attention(rows, key, value, attn_mask=self.keys, scale=scaling).flatten(1, 2)

    def behind(self) -> "OneRow":
        """Return what the row after this one attends to."""
        return self if self.keys is None else OneRow(F.pad(self.keys, (0, 1), value=True))


@torch.compiler.disable  # else every new layout would recompile the layers
def _planned(
    module: nn.Module,
    query: Tensor,  # [B, H, L, d]
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # None: transformers makes masks only for implementations that it knows
    *,
    plan: AttentionPlan | OneRow | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: object,
) -> tuple[Tensor, None]:
    if plan is None:
        raise ValueError(f"{type(module).__name__} needs an attention plan; pass plan=attention_plan(...) to the model")
    if dropout:
        raise ValueError(
            f"{type(module).__name__} has attention dropout {dropout:g}; attention plans do not support it, set it to 0"
        )
    if isinstance(plan, OneRow):
        return plan.attend(query, key, value, scaling)[:, None], None
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if len(q) == 1 < len(plan.samples):  # packed
        return attention(q[0], k[0], v[0], plan, scale=scaling)[None], None
    return attention(q, k, v, plan, scale=scaling), None


def _causal(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    plan: AttentionPlan | OneRow | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if plan is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return _planned(module, query, key, value, attention_mask, plan=plan, **kwargs)


AttentionInterface.register(PLANNED, _planned)
AttentionInterface.register(CAUSAL, _causal)


class CachedPrompts:
    """Run a model on tokens that follow prompts. The prompts are in a KV cache, in which other tokens are not kept."""

    def __init__(
        self,
        model: PreTrainedModel,  # without the output head
        embeddings: Tensor,  # [B, L, H], of the prompts
        positions: Tensor,  # int64 [B, L]
        samples: Sequence[Sequence[AttentionSpan]],
    ):
        self.model = model
        self.prompts = [tuple(span._replace(cached=True) for span in sample) for sample in samples]
        self.following = positions.amax(dim=1, keepdim=True) + 1
        self.cached = with_cache(model, prompt_cache(model))
        plan = attention_plan(samples, device=embeddings.device)
        model(inputs_embeds=embeddings, position_ids=positions, plan=plan, **self.cached)

    def __call__(
        self,
        rows: Tensor,  # [B, n, H]
        samples: Sequence[Sequence[AttentionSpan]] | None = None,  # None: causal
        positions: Tensor | None = None,  # int64 [B, n]; None: those after the prompt's
    ) -> Tensor:
        """Return the last hidden states of n tokens after each prompt, [B, n, H]."""
        n, device = rows.shape[1], rows.device
        new = [(AttentionSpan(n),)] * len(rows) if samples is None else samples
        plan = attention_plan([(*old, *spans) for old, spans in zip(self.prompts, new, strict=True)], device=device)
        if positions is None:
            positions = self.following + torch.arange(n, device=device)
        return self.model(inputs_embeds=rows, position_ids=positions, plan=plan, **self.cached).last_hidden_state


class Continuation:
    """Continue left-padded prompts one token at a time with a KV cache.

    A new token attends to all earlier tokens of its sample except the padding.
    """

    def __init__(
        self,
        model: PreTrainedModel,  # without the output head
        embeddings: Tensor,  # [B, L, H]
        positions: Tensor,  # int64 [B, L]
        samples: Sequence[Sequence[AttentionSpan]],
    ):
        self.model, self.embeddings, self.positions, self.samples = model, embeddings, positions, samples
        self.cached, self.new = with_cache(model, decoding_cache(model)), 0
        self.row = OneRow(unpadded(samples, embeddings.device))

    def __call__(self, rows: Tensor | None) -> Tensor:
        """Return the last hidden states [B, H] after the next embedding of each sample, [B, 1, H]; None: prefill."""
        plan: AttentionPlan | OneRow
        if rows is None:
            rows, at, plan = self.embeddings, self.positions, attention_plan(self.samples, device=self.positions.device)
        else:
            self.new += 1
            at = self.positions[:, -1:] + self.new
            plan = self.row = self.row.behind()
        hidden = self.model(inputs_embeds=rows, position_ids=at, plan=plan, **self.cached).last_hidden_state
        return hidden[:, -1]


@torch.no_grad()
def greedy(
    model: PreTrainedModel,  # without the output head
    head: nn.Module,
    embeddings: Tensor,  # [B, L, H]
    positions: Tensor,  # int64 [B, L]
    samples: Sequence[Sequence[AttentionSpan]],
    max_new_tokens: int,
    end: int,
) -> Tensor:
    """Decode greedily, int64 [B, n], n <= max_new_tokens; stop once every sample has generated `end`."""
    advance = Continuation(model, embeddings, positions, samples)

    def next_logits(tokens: Tensor | None) -> Tensor:
        return head(advance(None if tokens is None else model.embed_tokens(tokens[:, None])))

    return greedy_tokens(next_logits, max_new_tokens, end)


def padded(lengths: Sequence[int], width: int, side: str = "left") -> list[tuple[AttentionSpan, ...]]:
    """Return the spans of causal samples of these lengths, padded on one side to `width`."""
    pairs = [(AttentionSpan(width - length, "pad"), AttentionSpan(length)) for length in lengths]
    return [tuple(span for span in pair[:: 1 if side == "left" else -1] if span.length) for pair in pairs]


def unpadded(samples: Sequence[Sequence[AttentionSpan]], device: torch.device) -> Tensor | None:
    """Return which rows of left-padded samples are not padding, bool [B, 1, 1, L]; None: all."""
    pads = [sum(run.length for run in sample if run.mode == "pad") for sample in samples]
    if not any(pads):
        return None
    length = sum(run.length for run in samples[0])
    return on_device((torch.arange(length) >= torch.tensor(pads)[:, None])[:, None, None], device)
