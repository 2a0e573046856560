"""OpenUni as released.

Prompt and queries are one sequence in one forward pass of the language model. The queries need gradients, so the frozen
prompt is part of the autograd graph too. h_v is written over placeholders by boolean indexing. FlashAttention's padded
interface gathers the valid rows. Noise, noisy latents and target are materialised.
"""

import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.step.release.eager import UNPADDED, extended, mean_squares
from reca.data.batch import Batch
from reca.models.base import LossTerm
from reca.models.common.text import control
from reca.models.open_uni import loss as ours
from reca.models.open_uni.loss import STEPS
from reca.models.open_uni.model import OpenUni
from reca.models.open_uni.modules import hv_tokens
from reca.models.open_uni.prompt import CONTEXT, PAD_ID
from reca.rng import CounterRNG, RandomStream
from reca_kernels import philox_normal


@dataclass(frozen=True, kw_only=True)
class Prepared(ours.Prepared):
    """Prepared samples with token ids int64 [B, L], padded on the left, and valid bool [B, L]."""

    ids: Tensor
    valid: Tensor


def formulate(adapter: OpenUni, checkpointed: bool) -> None:
    """Replace preparation and loss by the released ones."""
    adapter.mllm.model.language_model.config._attn_implementation = UNPADDED
    adapter.prepare = types.MethodType(prepare, adapter)
    adapter.loss = types.MethodType(loss, adapter)


def prepare(self: OpenUni, batch: Batch, rng: CounterRNG) -> Prepared:
    """Tokenise and pad the prompts, with placeholders for h_v."""
    context, n = control(self.tokenizer, CONTEXT), hv_tokens(self.config)
    rows = [
        [*asked.ids[: asked.slot], *[context] * n, *asked.ids[asked.slot :]]
        for asked in ours.sample_prompts(self, batch, rng)
    ]
    longest = max(map(len, rows))
    ids = torch.tensor([[*[PAD_ID] * (longest - len(row)), *row] for row in rows])
    valid = torch.arange(longest) >= torch.tensor([[longest - len(row)] for row in rows])
    return extended(Prepared, ours.prepare(self, batch, rng), ids=ids, valid=valid)


def loss(self: OpenUni, prepared: Prepared, features: dict[str, Any], rng: CounterRNG) -> LossTerm:
    """Return the sum over images of the mean squared error of the velocity."""
    ids, queries, model = prepared.ids, self.config.queries, self.mllm.model.language_model
    embeds = model.embed_tokens(ids).clone()
    embeds[ids == control(self.tokenizer, CONTEXT)] = features["h_v"].to(embeds.dtype).flatten(0, 1)
    embeds = torch.cat([embeds, self.meta_queries.expand(len(ids), -1, -1).to(embeds.dtype)], dim=1)
    valid = torch.cat([prepared.valid, prepared.valid.new_ones(len(ids), queries)], dim=1)
    hidden = model(
        inputs_embeds=embeds,
        attention_mask={"full_attention": None},
        position_ids=(valid.long().cumsum(1) - 1).clamp(min=0),
        use_cache=False,
        valid=valid,
    ).last_hidden_state[:, -queries:]
    condition = self.projector(self.connector(inputs_embeds=hidden).last_hidden_state)

    latents, samples = features["latents"], prepared.sample_ids
    t = ours.noise_level(rng, samples)
    sigma = (t.to(torch.bfloat16).float() if self.config.parity else t).view(-1, 1, 1, 1)
    noise = philox_normal(rng.noise(RandomStream.NOISE, samples), latents[0].numel()).view_as(latents)
    noisy, target = (1.0 - sigma) * latents + sigma * noise, noise - latents
    velocity = self.transformer(
        noisy.to(latents.dtype), encoder_hidden_states=condition, timestep=t * STEPS, return_dict=False
    )[0]
    return LossTerm.of(mean_squares(velocity, target).flatten(1).mean(1).sum(), prepared)
