"""JanusFlow's losses: flow matching on an image's latents (reca, t2i), and cross-entropy on replies (i2t)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reca.data.batch import Batch
from reca.models.base import LossTerm
from reca.models.common import by_sample
from reca.models.janus import loss as janus
from reca.models.janusflow import prompt
from reca.models.janusflow.modules import Network
from reca.models.janusflow.prompt import Layout
from reca.rng import CounterRNG, RandomStream
from reca_kernels import flow_matching_add_noise, flow_matching_loss


@dataclass(frozen=True)
class Prepared(janus.Prepared):
    """A batch's sequences. weight: number of images, or of labelled tokens of replies.

    sample_ids  int64 [B], global sample ids
    """

    sample_ids: Tensor


def prepare(net: Network, batch: Batch, rng: CounterRNG) -> Prepared:
    """Lay out the sequences of a batch and draw which conditions are dropped."""
    if batch.task == "i2t":
        return Prepared(batch.task, rng.seed, *janus.replies(net, batch), batch.host_ids)
    layout = prompt.image_layout(*janus.image_prompts(net, batch, rng), net.vocabulary, net.image_tokens + 1)
    return Prepared(batch.task, rng.seed, float(len(batch)), layout, batch.host_ids)


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
