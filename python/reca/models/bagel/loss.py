"""BAGEL's losses: flow matching on an image's latents (reca, t2i, srum), and cross-entropy on answers (i2t).

Prompt and noisy image are two passes, so that a frozen prompt runs without a gradient. `prepare` computes sequences,
dropped texts and the weight on the host.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from reca.data.batch import Batch
from reca.models import base
from reca.models.bagel import prompt
from reca.models.bagel.modules import Network, shift_timesteps
from reca.models.bagel.prompt import CleanImage, Item, Layout, NoisyImage, Prompt, Text, VitImage, image_tokens
from reca.models.base import LossTerm
from reca.models.common import by_sample
from reca.models.common.inference import check_template
from reca.models.common.scored_flow import scored_flow_loss, token_rewards
from reca.models.token_loss import count_labels, token_loss
from reca.rng import CounterRNG, RandomStream
from reca_kernels import flow_matching_add_noise, flow_matching_loss
from reca_kernels.host import on_device

Size = tuple[int, int]  # height and width of an image in tokens


@dataclass(frozen=True)
class Prepared(base.Prepared):
    """A batch's sequences. weight: number of image tokens, or of labels for i2t.

    sample_ids  int64 [B], global sample ids
    items       prompt of each sample
    prompt      layout of the prompts; for i2t, of the whole sequences
    image       layout of the noisy images; None for i2t
    rewards     srum: fp32 [T, 1], the reward of each image token
    """

    sample_ids: Tensor
    items: list[list[Item]]
    prompt: Layout
    image: Layout | None
    rewards: Tensor | None = None
    packed = True

    @property
    def tokens(self) -> list[int]:
        found = [0] * len(self.items)
        for split in (*self.prompt.splits, *(self.image.splits if self.image else ())):
            found[split.sample] += split.und + split.gen
        return found

    @property
    def labels(self) -> Tensor:
        return self.prompt.labels


def prepare(net: Network, batch: Batch, rng: CounterRNG) -> Prepared:
    """Tokenise and lay out a batch. Some texts are dropped and then take no position; h_v is never dropped."""
    given: list[list[Item]] = [[] for _ in batch.text]
    if batch.task in ("reca", "i2t"):
        given = with_images(net, batch, given)
    sizes = [] if batch.task == "i2t" else image_sizes(net, batch)
    wanted: list[list[Item]] = [[NoisyImage(*size)] for size in sizes] or [[] for _ in given]
    beside = [image_tokens([*images, *target]) for images, target in zip(given, wanted, strict=True)]
    if batch.task == "i2t":
        texts = [[net.conversation(turns, n)] for turns, n in zip(batch.text, beside, strict=True)]
    else:
        share = net.config.template_drop if batch.task == "reca" else net.config.caption_drop
        dropped = (rng.uniform(RandomStream.CONDITION_DROP, batch.host_ids)[:, 0] < share).tolist()
        captions = [said.caption for said in batch.text] if batch.task == "srum" else batch.text
        make = template if batch.task == "reca" else caption
        texts = [[] if drop else [make(net, *said)] for drop, *said in zip(dropped, captions, beside, strict=True)]
    items: list[list[Item]] = [[*images, *text] for images, text in zip(given, texts, strict=True)]
    layout = net.layout(items)
    made = batch.task, rng.seed
    if batch.task == "i2t":
        return Prepared(*made, count_labels(layout.labels), batch.host_ids, items, layout, None)
    image = net.layout(wanted, layout.next_positions)
    tokens = float(sum(height * width for height, width in sizes))
    rewards = None
    if batch.task == "srum":
        scored = zip(batch.text, sizes, strict=True)
        rewards = torch.cat([token_rewards(said, *size) for said, size in scored])[:, None]
    return Prepared(*made, tokens, batch.host_ids, items, layout, image, rewards)


def template(net: Network, text: str, beside: int) -> Text:
    """Tokenise a template. Raises ValueError if it is too long beside so many tokens of images."""
    said = net.text(text)
    check_template(text, len(said.ids), prompt.MAX_LENGTH - beside)
    return said


def caption(net: Network, text: str, beside: int) -> Text:
    """Tokenise a caption, truncated as in `truncated`."""
    return prompt.truncated(net.text(text), beside)


def with_images(net: Network, batch: Batch, texts: Sequence[Sequence[Item]]) -> list[list[Item]]:
    """Prepend the images of h_v to texts."""
    item: type[CleanImage | VitImage] = CleanImage if _copies_latents(net, batch) else VitImage
    return [[item(*size), *text] for size, text in zip(_hv_sizes(net, batch), texts, strict=True)]


def given_images(net: Network, items: Sequence[Sequence[Item]], h_v: Sequence[Tensor]) -> Prompt:
    """Build a Prompt from the items of `with_images` and the result of `encode` for their images."""
    if isinstance(items[0][0], CleanImage):
        return Prompt(items, latents=[net.codec.latents(moments) for moments in h_v])
    return Prompt(items, h_v)


def compute_loss(net: Network, prepared: Prepared, features: dict[str, Any], rng: CounterRNG) -> LossTerm:
    """Compute the sum of the velocity's MSE over image tokens, or of the cross-entropy over labels."""
    given, prepared = _prompt(net, prepared, features)
    if prepared.image is None:
        return reply_loss(net, prepared, given)
    layouts, scored = (prepared.prompt, prepared.image), (prepared.rewards, features.get("target"))
    total, samples = flow_loss(
        net, given, *layouts, features["moments"], prepared.sample_ids, rng, *scored, prepared.by_sample
    )
    return LossTerm.of(total, prepared, samples)


def reply_loss(net: Network, prepared: Prepared, given: Prompt) -> LossTerm:
    """Compute the sum of the next-token cross-entropy of answers; logits are computed for labelled rows only."""
    layout = prepared.prompt
    hidden, _ = net.prefill(given, layout=layout)
    rows = torch.tensor([split.und for split in layout.splits])
    owners = torch.tensor([split.sample for split in layout.splits]).repeat_interleave(rows)
    return token_loss(hidden, net.language_model.lm_head, layout.labels, prepared, owners)


def flow_loss(
    net: Network,
    given: Prompt,
    layout: Layout,  # of the prompt
    image: Layout,  # of one noisy image per sample, after the prompt
    moments: Sequence[Tensor] | Tensor,  # of these images, [2 C, h, w] per sample
    sample_ids: Tensor,  # int64 [B], global sample ids
    rng: CounterRNG,
    rewards: Tensor | None = None,  # [T, 1], of image tokens
    target: Sequence[Tensor] | Tensor | None = None,  # moments of SRUM's constraint images
    per_sample: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute the sum of the velocity's MSE over image tokens, and with `per_sample` that of each image.

    With rewards it is SRUM's loss.
    """
    patch = net.config.latent_patch_size
    latents = sample_posterior(net, moments, rng, sample_ids)
    t = noise_level(net, rng, sample_ids)
    constraint = None if target is None else sample_posterior(net, target, rng, sample_ids)
    if net.config.parity:
        latents, t = [z.bfloat16() for z in latents], t.bfloat16().float()
        constraint = constraint and [z.bfloat16() for z in constraint]
    noise = rng.noise(RandomStream.NOISE, sample_ids)
    tokens = flow_matching_add_noise(latents, t, noise, patch=patch)
    _, cache = net.prefill(given, layout=layout)
    velocity = net.predict_velocity(cache, image, tokens, t)
    width, samples = velocity.shape[1], None
    counts = torch.tensor([latent.numel() // width for latent in latents])  # tokens per image, on the host
    if rewards is None:
        total = flow_matching_loss(velocity, latents, t, noise, patch=patch, reduction="sum")
        if per_sample:
            with torch.no_grad():
                means = flow_matching_loss(velocity, latents, t, noise, patch=patch, reduction="sample")
            counts = on_device(counts, means.device)
            samples = by_sample.table(means * counts, counts)
    else:
        each = scored_flow_loss(velocity, latents, constraint, noise, rewards, net.config.srum_constraint, patch)
        total = each.sum()
        if per_sample:
            owners = on_device(torch.repeat_interleave(counts), each.device)
            samples = by_sample.add_up(each.detach().mean(1), owners, len(latents))
    return total / width, samples


def sample_posterior(net: Network, moments: Sequence[Tensor] | Tensor, rng: CounterRNG, ids: Tensor) -> list[Tensor]:
    """Sample every image's posterior, fp32 [C, h, w], as the release does in training and inference."""
    latents = []
    for i, one in enumerate(moments):
        noise = rng.normal(RandomStream.POSTERIOR, ids[i : i + 1], one.numel() // 2)
        latents.append(net.codec.latents(one, noise.view(-1, *one.shape[1:])))
    return latents


def noise_level(net: Network, rng: CounterRNG, ids: Tensor) -> Tensor:
    """Draw the noise level of every image, fp32 [B], from a shifted logit-normal distribution."""
    return shift_timesteps(rng.normal(RandomStream.TIMESTEP, ids)[:, 0].sigmoid(), net.config.timestep_shift)


def _prompt(net: Network, prepared: Prepared, features: dict[str, Any]) -> tuple[Prompt, Prepared]:
    """Insert features into the prompt. If h_v has another size, as it may come from another image, redo the layout."""
    h_v = features.get("h_v")
    if h_v is None:
        return Prompt(prepared.items), prepared
    h_v, clean = list(h_v), isinstance(prepared.items[0][0], CleanImage)
    patch = net.config.latent_patch_size
    sizes = [(x.shape[1] // patch, x.shape[2] // patch) if clean else tuple(x.shape[:2]) for x in h_v]
    if sizes != [tuple(items[0]) for items in prepared.items]:
        items = [[type(first)(*size), *text] for size, (first, *text) in zip(sizes, prepared.items, strict=True)]
        prepared = replace(prepared, items=items, prompt=net.layout(items).to(net.device))
    return given_images(net, prepared.items, h_v), prepared


def _copies_latents(net: Network, batch: Batch) -> bool:
    """Tell whether h_v comes from the codec (model.hv_source=vae)."""
    return batch.task == "reca" and net.config.hv_source == "vae"


def _hv_sizes(net: Network, batch: Batch) -> list[Size]:
    latents = _copies_latents(net, batch)
    if batch.und is None:
        assert batch.features is not None, "a batch has images or features"
        h_v, patch = batch.features["h_v"], net.config.latent_patch_size
        return [(x.shape[1] // patch, x.shape[2] // patch) if latents else (x.shape[0], x.shape[1]) for x in h_v]
    side = net.token_side if latents else net.config.vision.patch_size
    return [(image.shape[1] // side, image.shape[2] // side) for image in batch.und]


def image_sizes(net: Network, batch: Batch) -> list[Size]:
    """Return the sizes of the images to generate, in tokens."""
    images, side = batch.gen, net.token_side
    if images is None:
        assert batch.features is not None, "a batch has images or features"
        images, side = batch.features["moments"], net.config.latent_patch_size
    return [(image.shape[-2] // side, image.shape[-1] // side) for image in images]
