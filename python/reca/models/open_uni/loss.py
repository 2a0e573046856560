"""OpenUni's losses: flow matching on an image's latents (reca, t2i, srum), and cross-entropy on replies (i2t)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reca.data.batch import Batch
from reca.models import base
from reca.models.base import LossTerm
from reca.models.common import by_sample
from reca.models.common.chat import Prompt
from reca.models.common.inference import check_template
from reca.models.common.scored_flow import scored_flow_loss, token_rewards
from reca.models.open_uni import modules, prompt
from reca.models.open_uni.modules import Network
from reca.models.token_loss import count_labels, token_loss
from reca.rng import CounterRNG, RandomStream
from reca_kernels import attention_plan, flow_matching_add_noise, flow_matching_loss

STEPS = 1000


@dataclass(frozen=True)
class Prepared(base.Prepared):
    """A batch's sequences. weight: number of images, or of labelled tokens of replies.

    sample_ids  int64 [B], global sample ids
    rewards     srum: fp32 [B, 1, h, w], the reward of each latent
    """

    sample_ids: Tensor
    layout: prompt.Layout
    rewards: Tensor | None = None

    @property
    def tokens(self) -> list[int]:
        queries = self.layout.positions.shape[1] - self.layout.src.shape[1]
        return [length + queries for length in self.layout.lengths]

    @property
    def labels(self) -> Tensor:
        return self.layout.labels


def prepare(net: Network, batch: Batch, rng: CounterRNG) -> Prepared:
    """Lay out the sequences of a batch and draw which captions are dropped."""
    hv_tokens, made = modules.hv_tokens(net.config), (batch.task, rng.seed)
    if batch.task == "i2t":
        most = prompt.MAX_LENGTH - hv_tokens
        prompts = [prompt.conversation(net.tokenizer, turns, most) for turns in batch.text]
        layout = prompt.layout(prompts, hv_tokens, "right")
        return Prepared(*made, count_labels(layout.labels), batch.host_ids, layout)
    side = "left" if batch.task == "reca" else "right"
    layout = prompt.layout(sample_prompts(net, batch, rng), hv_tokens, side, net.config.queries)
    rewards = None
    if batch.task == "srum":
        size = net.config.image_size // modules.codec_sizes(net.config).size
        rewards = torch.stack([token_rewards(said, size, size).view(1, size, size) for said in batch.text])
    return Prepared(*made, float(len(batch)), batch.host_ids, layout, rewards)


def sample_prompts(net: Network, batch: Batch, rng: CounterRNG) -> list[Prompt]:
    """Build a prompt per sample. Some captions are dropped, templates never are."""
    if batch.task == "reca":
        return reca_prompts(net, batch.text)
    dropped = (rng.uniform(RandomStream.CONDITION_DROP, batch.host_ids)[:, 0] < net.config.caption_drop).tolist()
    captions = [said.caption for said in batch.text] if batch.task == "srum" else batch.text
    texts = [None if drop else text for text, drop in zip(captions, dropped, strict=True)]
    return [prompt.caption(net.tokenizer, text) for text in texts]


def reca_prompts(net: Network, templates: Sequence[str]) -> list[Prompt]:
    """Build the reconstruction prompts of these templates. Raises ValueError for one that is too long."""
    prompts = [prompt.with_image(net.tokenizer, text) for text in templates]
    for text, asked in zip(templates, prompts, strict=True):
        check_template(text, len(asked.ids), prompt.MAX_LENGTH - modules.hv_tokens(net.config))
    return prompts


def compute_loss(net: Network, prepared: Prepared, features: dict[str, Any], rng: CounterRNG) -> LossTerm:
    """Compute the sum of the velocity's MSE over images, or of the cross-entropy over labelled tokens of replies."""
    if prepared.task == "i2t":
        return reply_loss(net, prepared, features["h_v"])
    condition = net.condition(prepared.layout, features["h_v"] if prepared.task == "reca" else None)
    scored = prepared.rewards, features.get("target")
    errors = flow_loss(net, condition, features["latents"], prepared.sample_ids, rng, *scored)
    samples = by_sample.table(errors, torch.ones_like(errors)) if prepared.by_sample else None
    return LossTerm.of(errors.sum(), prepared, samples)


def flow_loss(
    net: Network,
    condition: Tensor,  # [B, queries, caption_channels]
    latents: Tensor,  # [B, C, h, w]
    sample_ids: Tensor,  # int64 [B], global sample ids
    rng: CounterRNG,
    rewards: Tensor | None = None,  # [B, 1, h, w]
    target: Tensor | None = None,  # [B, C, h, w], latents of SRUM's constraint
) -> Tensor:
    """Compute the MSE of the velocity per sample, fp32 [B]; with rewards, SRUM's loss."""
    t, noise = noise_level(rng, sample_ids), rng.noise(RandomStream.NOISE, sample_ids)
    noisy = flow_matching_add_noise(latents, t.to(torch.bfloat16).float() if net.config.parity else t, noise)
    velocity = net.transformer(noisy, encoder_hidden_states=condition, timestep=t * STEPS, return_dict=False)[0]
    if rewards is None:
        return flow_matching_loss(velocity, latents, t, noise, reduction="sample")
    loss = scored_flow_loss(velocity, latents, target, noise, rewards, net.config.srum_constraint)
    return loss.flatten(1).mean(1)


def noise_level(rng: CounterRNG, sample_ids: Tensor) -> Tensor:
    """Draw the noise level per sample, fp32 [B]: uniform over 1/1000, ..., 1, without the shift used at inference."""
    index = (rng.uniform(RandomStream.TIMESTEP, sample_ids)[:, 0] * STEPS).floor()
    return (STEPS - index) / STEPS


def reply_loss(net: Network, prepared: Prepared, h_v: Tensor) -> LossTerm:
    """Compute the sum of the next-token cross-entropy of replies; logits are computed for labelled rows only."""
    layout = prepared.layout
    hidden = net.mllm.model.language_model(
        inputs_embeds=net.embed(layout.src, h_v),
        position_ids=layout.positions,
        plan=attention_plan(layout.spans(), device=h_v.device),
    ).last_hidden_state
    return token_loss(hidden[:, :-1], net.mllm.lm_head, layout.labels[:, 1:], prepared)
