"""Harmon's losses: the diffusion loss of masked image tokens, and the cross-entropy of replies."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reca.data.batch import Batch
from reca.models import base
from reca.models.base import LossTerm
from reca.models.common import by_sample
from reca.models.common.chat import Prompt
from reca.models.harmon import modules, prompt
from reca.models.harmon.masking import Masking, masked_counts
from reca.models.harmon.modules import Network
from reca.models.token_loss import count_labels, token_loss
from reca.rng import CounterRNG, RandomStream
from reca_kernels import diffusion_add_noise, diffusion_loss, diffusion_schedule


@dataclass(frozen=True)
class Prepared(base.Prepared):
    """A batch's sequences. weight: masked tokens times timesteps, or labelled tokens of replies.

    seed_dropout  seed of torch's generator for dropout
    layout        layout of the prompts with h_v, visible tokens and buffers
    """

    seed_dropout: int
    layout: prompt.Layout

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.layout.lengths

    @property
    def labels(self) -> Tensor:
        return self.layout.labels


@dataclass(frozen=True)
class PreparedImages(Prepared):
    """A batch's sequences with images to generate.

    masking  the masked tokens of the images
    rows     int64 [R]: indices of the masked tokens in the flattened batch, repeated once per timestep
    noise    int64 [R]: counters of the timestep and noise of each row
    grid     tokens (m, n) of an image
    """

    masking: Masking
    rows: Tensor
    noise: Tensor
    grid: tuple[int, int]


def prepare(net: Network, batch: Batch, rng: CounterRNG) -> Prepared:
    """Lay out the sequences of a batch; draw its masks and its dropped texts."""
    if batch.task == "i2t":
        return _prepare_replies(net, batch, rng)
    hv_grid = _grid(net, batch, "und" if batch.und is not None else "gen", "h_v") if batch.task == "reca" else None
    prompts, grid = sample_prompts(net, batch, rng), _grid(net, batch, "gen", "latents")
    return prepare_images(net, prompts, batch.host_ids, grid, rng, batch.task, hv_grid)


def prepare_images(
    net: Network,
    prompts: Sequence[Prompt],
    ids: Tensor,  # int64 [B], global ids of the samples, on the host
    grid: tuple[int, int],  # tokens of the target image
    rng: CounterRNG,
    task: str = "t2i",
    hv_grid: tuple[int, int] | None = None,  # tokens of the image that h_v is computed from; None: no h_v
) -> PreparedImages:
    """Lay out prompts and target images, and draw the masks."""
    repeats, size = net.config.mar.repeats, grid[0] * grid[1]
    counts = sample_masked_counts(net, ids, size, rng)
    masking = Masking.of(rng.uniform(RandomStream.MASK_ORDER, ids, size).argsort(dim=1, stable=True), counts)
    assert masking.hidden is not None
    hv_tokens = hv_grid[0] * hv_grid[1] if hv_grid else 0
    layout = prompt.layout(prompts, net.config.mar.buffers, hv_tokens, masking.lengths)
    # Every masked token occurs `repeats` times, with the same latents and condition but its own timestep and noise.
    repeat = torch.arange(repeats)[:, None]
    noise = ((ids[masking.hidden // size] * repeats + repeat) * size + masking.hidden % size).flatten()
    return PreparedImages(
        task=task,
        seed=rng.seed,
        weight=float(int(counts.sum()) * repeats),
        seed_dropout=rng.fold_in(int(ids[0])).seed,
        layout=layout,
        masking=masking,
        rows=masking.hidden.repeat(repeats),
        noise=noise,
        grid=grid,
    )


def _prepare_replies(net: Network, batch: Batch, rng: CounterRNG) -> Prepared:
    grid = _grid(net, batch, "und", "h_v")
    prompts = [prompt.conversation(net.tokenizer, turns) for turns in batch.text]
    layout = prompt.layout(prompts, net.config.mar.buffers, grid[0] * grid[1])
    weight = count_labels(layout.labels)
    return Prepared(batch.task, rng.seed, weight, rng.fold_in(int(batch.host_ids[0])).seed, layout)


def sample_masked_counts(net: Network, ids: Tensor, size: int, rng: CounterRNG) -> Tensor:
    """Draw the number of masked tokens of each image, int64 [B]. size: tokens of an image.

    With parity, one ratio is drawn for all images of a micro-batch, as in the release, so the result depends on the
    micro-batch size.
    """
    uniform = rng.uniform(RandomStream.MASK_RATE, ids)[:, 0]
    if net.config.parity:
        uniform = uniform[:1].expand_as(uniform)
    return masked_counts(uniform, size, net.config.mar.mask_ratio_min)


def sample_prompts(net: Network, batch: Batch, rng: CounterRNG) -> list[Prompt]:
    """Build a prompt per sample from its template or caption. Some texts are dropped, h_v never is."""
    make = prompt.template if batch.task == "reca" else prompt.caption
    drop = rng.uniform(RandomStream.CONDITION_DROP, batch.host_ids)[:, 0] < net.config.text_drop
    texts = zip(batch.text, drop.tolist(), strict=True)
    return [make(net.tokenizer, None if dropped else text) for text, dropped in texts]


def compute_loss(net: Network, prepared: Prepared, features: dict[str, Any], rng: CounterRNG) -> LossTerm:
    """Compute the sum of the diffusion loss over masked tokens and timesteps, or of the cross-entropy over replies."""
    with _dropout(net, prepared):
        if not isinstance(prepared, PreparedImages):
            return reply_loss(net, prepared, features["h_v"])
        h_v = net.mar.encode(features["h_v"]) if prepared.task == "reca" else None
        return image_loss(net, prepared, features["latents"], rng, h_v)


def image_loss(
    net: Network,
    prepared: PreparedImages,
    latents: Tensor,  # [B, m, n, C]
    rng: CounterRNG,
    h_v: Tensor | None = None,  # [B, buffers + S', D], the encoder's output for h_v's image
) -> LossTerm:
    """Compute the sum of the diffusion loss over masked tokens and timesteps."""
    masking, rows = prepared.masking, prepared.rows
    assert masking.hidden is not None
    encoded = net.mar.encode(latents, masking.visible, masking.real)
    z = net.condition(prepared.layout, encoded, masking, prepared.grid, h_v)
    t = (rng.uniform(RandomStream.TIMESTEP, prepared.noise)[:, 0] * modules.STEPS).long()
    noise = rng.noise(RandomStream.NOISE, prepared.noise)
    x0, table = latents.flatten(0, 2), diffusion_schedule(modules.STEPS, device=latents.device)
    x_t = diffusion_add_noise(x0, t, noise, table, rows=rows)
    out = net.mar.diffloss.net(x_t, t, z.flatten(0, 1).index_select(0, masking.hidden))
    total = diffusion_loss(out, x0, t, noise, table, rows=rows, reduction="sum")
    samples = None
    if prepared.by_sample:
        with torch.no_grad():
            each = diffusion_loss(out, x0, t, noise, table, rows=rows, reduction="none")
        samples = by_sample.add_up(each, rows // latents[0, ..., 0].numel(), len(latents))
    return LossTerm.of(total, prepared, samples)


def reply_loss(net: Network, prepared: Prepared, latents: Tensor) -> LossTerm:
    """Compute the sum of the next-token cross-entropy of replies; logits are computed for labelled rows only."""
    h_v = net.encode_understanding(net.mar.encode(latents))
    return token_loss(net.states(prepared.layout, h_v), net.llm.lm_head, prepared.layout.labels, prepared)


@contextlib.contextmanager
def _dropout(net: Network, prepared: Prepared) -> Iterator[None]:
    """Seed torch's generator from the first sample for dropout, and restore its state afterwards.

    Attention draws its dropout inside the kernel, so the draws cannot be addressed by sample. With this seed a
    micro-batch has the same dropout whenever it runs; another micro-batch size changes it.
    """
    if not (net.training and net.config.mar.dropout):
        yield
        return
    devices = [net.device] if net.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(prepared.seed_dropout)
        yield


def _grid(net: Network, batch: Batch, view: str, feature: str) -> tuple[int, int]:
    """Return the token grid (m, n) of a batch's images, from their pixels or from cached latents."""
    if batch.features is not None:
        return tuple(batch.features[feature].shape[1:3])
    return tuple(side // net.factor for side in getattr(batch, view)[0].shape[1:3])
