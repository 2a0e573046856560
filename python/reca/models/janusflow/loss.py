"""JanusFlow's losses: flow matching on an image's latents (reca, t2i), and cross-entropy on replies (i2t)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reca.data.batch import Batch
from reca.models.base import LossTerm
from reca.models.common import by_sample
from reca.models.common.inference import check_lengths
from reca.models.janus import loss as janus
from reca.models.janus import prompt as janus_prompt
from reca.models.janusflow import prompt
from reca.models.janusflow.modules import Network
from reca.models.janusflow.prompt import Layout, Segment
from reca.rng import CounterRNG, RandomStream
from reca_kernels import IGNORE_INDEX, TextSegment, flow_matching_add_noise, flow_matching_loss


@dataclass(frozen=True)
class Prepared(janus.Prepared):
    """A batch's sequences. weight: number of images, or of labelled tokens of replies.

    sample_ids  int64 [B], global sample ids
    """

    sample_ids: Tensor


def prepare(net: Network, batch: Batch, rng: CounterRNG) -> Prepared:
    """Lay out the sequences of a batch and draw which conditions are dropped."""
    v, config, ids = net.vocabulary, net.config, batch.host_ids
    if batch.task == "i2t":
        talks = [
            prompt.conversation(net.tokens, turns, v, net.hv_tokens, config.system_prompt, config.max_length)
            for turns in batch.text
        ]
        replies = janus_prompt.layout(talks, v)
        return Prepared(batch.task, rng.seed, float((replies.labels != IGNORE_INDEX).sum()), replies, ids)
    make, share = (reca_prompt, config.reca_drop) if batch.task == "reca" else (t2i_prompt, config.caption_drop)
    dropped = (rng.uniform(RandomStream.CONDITION_DROP, ids)[:, 0] < share).tolist()
    layout = prompt.image_layout([make(net, text) for text in batch.text], dropped, v, net.image_tokens + 1)
    return Prepared(batch.task, rng.seed, float(len(batch)), layout, ids)


def reca_prompt(net: Network, text: str) -> list[Segment]:
    """Build RECA's prompt: image and template."""
    system, most = net.config.reca_system_prompt, longest_prompt(net)
    return prompt.with_image(net.tokens, text, net.vocabulary, net.hv_tokens, system, most)


def check_templates(net: Network, templates: Sequence[str]) -> None:
    """Raise ValueError for a template that `reca_prompt` would truncate."""

    def length(text: str) -> int:
        system = net.config.reca_system_prompt
        given = prompt.with_image(net.tokens, text, net.vocabulary, net.hv_tokens, system)
        return janus_prompt.text_length(given) + 1  # one more row of the image takes the place of boi

    check_lengths(templates, length, longest_prompt(net) - net.hv_tokens)


def t2i_prompt(net: Network, text: str) -> list[Segment]:
    """Build the prompt of a caption."""
    return [TextSegment(prompt.caption(net.tokens, text, net.vocabulary, longest_prompt(net)))]


def longest_prompt(net: Network) -> int:
    """Return the maximum number of prompt tokens."""
    return net.config.max_length - net.image_tokens - 1


def compute_loss(net: Network, prepared: Prepared, features: dict[str, Any], rng: CounterRNG) -> LossTerm:
    """Compute the sum of the velocity's MSE over images, or of the cross-entropy over labelled tokens of replies."""
    if prepared.task == "i2t":
        return janus.reply_loss(net, prepared, features["h_v"])
    assert isinstance(prepared.layout, Layout)
    latents = sample_posterior(net, features["moments"], prepared.sample_ids, rng)
    errors = flow_loss(net, prepared.layout, features.get("h_v"), latents, prepared.sample_ids, rng)
    samples = by_sample.table(errors, torch.ones_like(errors)) if prepared.by_sample else None
    return LossTerm.of(errors.sum(), prepared, samples)


def flow_loss(
    net: Network,
    layout: Layout,
    h_v: Tensor | None,  # [B, n, H]
    latents: Tensor,  # [B, C, H, W]
    sample_ids: Tensor,  # int64 [B], global sample ids
    rng: CounterRNG,
) -> Tensor:
    """Compute the MSE of the velocity per sample, fp32 [B].

    JanusFlow's time is 0 for noise and 1 for an image, and its velocity is image - noise. The kernel has the opposite
    convention.
    """
    level, noise = noise_level(rng, sample_ids), rng.noise(RandomStream.NOISE, sample_ids)
    noisy = flow_matching_add_noise(latents, level, noise)
    velocity = net.predict_velocity(layout, h_v, noisy, 1 - level)
    return flow_matching_loss(-velocity, latents, level, noise, reduction="sample")


def noise_level(rng: CounterRNG, sample_ids: Tensor) -> Tensor:
    """Draw the noise level per sample, fp32 [B], from a logit-normal distribution (paper, section 3.4)."""
    return rng.normal(RandomStream.TIMESTEP, sample_ids)[:, 0].sigmoid()


def sample_posterior(net: Network, moments: Tensor, sample_ids: Tensor, rng: CounterRNG) -> Tensor:
    """Sample every image's posterior, fp32 [B, C, H, W]. moments: [B, 2 C, H, W]."""
    shape = (len(moments), moments.shape[1] // 2, *moments.shape[2:])
    noise = rng.normal(RandomStream.POSTERIOR, sample_ids, moments[0].numel() // 2).view(shape)
    return net.codec.latents(moments, noise)
