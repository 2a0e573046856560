"""BAGEL's sequences: lists of items, each of which is one split. An image has a single rotary position.

    RECA        [h_v] [template] [noisy image]        a dropped template takes no position
    t2i         [caption] [noisy image]
    edit        [clean image] [h_v] [instruction] [noisy image]
    i2t         [h_v] [question answer ...]           every text has the tokens that begin and end a turn

Text is causal and its positions count up. Attention within an image is bidirectional; all its tokens share one
position, and the next item starts one later. The tokens around an image are text tokens, so the understanding expert
processes them even around latents.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from reca.models.bagel.transformer import GEN, UND, Split
from reca_kernels import IGNORE_INDEX, TextSegment, VisualSegment, concat_plan
from reca_kernels.host import on_device

BEGIN, END, IMAGE, END_OF_IMAGE = "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"
MAX_LENGTH = 16384  # maximum tokens of a sample; the release skips longer ones, here texts are truncated
SPECIAL_TOKENS = (BEGIN, END, IMAGE, END_OF_IMAGE)


@dataclass(frozen=True)
class Vocabulary:
    """Ids of the tokens around texts (bos, eos) and images (soi, eoi)."""

    bos: int
    eos: int
    soi: int
    eoi: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "Vocabulary":
        known = tokenizer.get_vocab()
        return cls(*(known[token] for token in SPECIAL_TOKENS))


class Text(NamedTuple):
    """Token ids with bos and eos, and the label of each position: the token it predicts, or IGNORE_INDEX."""

    ids: list[int]
    labels: list[int] | None = None


class VitImage(NamedTuple):
    """An image as h_v, SigLIP's tokens. Sizes are in tokens."""

    height: int
    width: int


class CleanImage(NamedTuple):
    """An image as noise-free latents. Sizes are in tokens."""

    height: int
    width: int


class NoisyImage(NamedTuple):
    """The image being generated. Later items do not attend to it. Sizes are in tokens."""

    height: int
    width: int


class DroppedImage(NamedTuple):
    """An omitted image, which still takes a position."""


Item = Text | VitImage | CleanImage | NoisyImage | DroppedImage


class Prompt(NamedTuple):
    """The items of a batch and the features of their images.

    items    items of each sample
    h_v      [h, w, C] per VitImage, in order; None: no VitImage
    latents  [C, h, w] per CleanImage, in order; None: no CleanImage
    """

    items: Sequence[Sequence[Item]]
    h_v: Sequence[Tensor] | None = None
    latents: Sequence[Tensor] | None = None


@dataclass
class Layout:
    """The tokens of one pass, packed per expert: U of the understanding expert and G of the generation expert.

    src               int32 [U]: token ids; -1 - r for row r of the pass's h_v
    vit_positions     int64 [U]: index of an h_v token in SigLIP's position table, -1 for other tokens
    labels            int64 [U]: the token that a row predicts, IGNORE_INDEX without a loss
    latent_positions  int64 [G]: index in the position table of latents
    image_ids         int64 [G]: index of the image among the pass's latent images
    positions         rotary positions per expert, int64 [U] and [G]
    splits            the splits of the pass, in order
    next_positions    rotary position of each sample after the pass
    """

    src: Tensor
    vit_positions: Tensor
    labels: Tensor
    latent_positions: Tensor
    image_ids: Tensor
    positions: dict[str, Tensor]
    splits: list[Split]
    next_positions: list[int]

    def to(self, device: torch.device) -> "Layout":
        moved: dict[str, Any] = {
            f.name: on_device(getattr(self, f.name), device) for f in fields(self) if f.type is Tensor
        }
        return replace(self, **moved, positions={expert: on_device(p, device) for expert, p in self.positions.items()})


def layout(
    samples: Sequence[Sequence[Item]],
    v: Vocabulary,
    positions: Sequence[int],
    vit_size: int,
    latent_size: int,
) -> Layout:
    """Lay out the next items of every sample, whose rotary positions start at `positions`.

    vit_size, latent_size: sides of the position tables. Raises ValueError for an image larger than its table.
    """
    segments, splits, ends = [], [], []
    vit_at, latent_at, image_ids, und_at, gen_at = [], [], [], [], []
    images = 0
    border = torch.tensor([-1])
    for number, (items, position) in enumerate(zip(samples, positions, strict=True)):
        mine: list[TextSegment | VisualSegment] = []
        for item in items:
            if isinstance(item, Text):
                n = len(item.ids)
                mine.append(TextSegment(item.ids, item.labels))
                vit_at.append(border.expand(n))
                und_at.append(torch.arange(position, position + n))
                splits.append(Split(number, n, 0, "causal"))
                position += n
                continue
            if isinstance(item, VitImage):
                _check(item, vit_size, "vision.image_size")
                n = item.height * item.width
                mine += [TextSegment([v.soi]), VisualSegment(n), TextSegment([v.eoi])]
                vit_at += [border, grid(item.height, item.width, vit_size), border]
                und_at.append(torch.full((n + 2,), position))
                splits.append(Split(number, n + 2, 0, "full"))
            elif not isinstance(item, DroppedImage):
                _check(item, latent_size, "max_latent_size")
                n = item.height * item.width
                mine.append(TextSegment([v.soi, v.eoi]))
                vit_at.append(border.expand(2))
                latent_at.append(grid(item.height, item.width, latent_size))
                image_ids.append(torch.full((n,), images))
                und_at.append(torch.full((2,), position))
                gen_at.append(torch.full((n,), position))
                splits.append(Split(number, 2, n, "noise" if isinstance(item, NoisyImage) else "full"))
                images += 1
            position += 1
        segments.append(mine)
        ends.append(position)
    plan = concat_plan(segments)
    rotary = {UND: _cat(und_at), GEN: _cat(gen_at)}
    return Layout(plan.src, _cat(vit_at), plan.labels, _cat(latent_at), _cat(image_ids), rotary, splits, ends)


def image_tokens(items: Sequence[Item]) -> int:
    """Return the number of tokens of the images of a sample, with the tokens around them."""
    return sum(math.prod(item) + 2 for item in items if isinstance(item, VitImage | CleanImage | NoisyImage))


def add_bos_eos(ids: Sequence[int], v: Vocabulary) -> Text:
    """Return bos ids eos."""
    return Text([v.bos, *ids, v.eos])


def truncated(text: Text, beside: int) -> Text:
    """Truncate a text to MAX_LENGTH with the `beside` other tokens of its sample; bos and eos remain."""
    bos, *ids, eos = text.ids
    return Text([bos, *ids[: max(0, MAX_LENGTH - beside - 2)], eos])


def conversation(turns: Sequence[tuple[Sequence[int], Sequence[int]]], v: Vocabulary, beside: int = 0) -> Text:
    """Join questions and answers to one causal text, in which answers and their eos are labelled.

    A label belongs to the position before its token. The text is truncated to MAX_LENGTH with the `beside` other
    tokens of the sample.
    """
    ids, labels = [], []
    for question, answer in turns:
        ids += [v.bos, *question, v.eos, v.bos, *answer, v.eos]
        labels += [IGNORE_INDEX] * (len(question) + 2) + [*answer, v.eos, IGNORE_INDEX]
    most = max(0, MAX_LENGTH - beside)
    return Text(ids[:most], labels[:most])


def grid(height: int, width: int, size: int) -> Tensor:
    """Return row-major indices of the top-left height x width corner of a size x size grid, int64 [height * width]."""
    return (torch.arange(height)[:, None] * size + torch.arange(width)).flatten()


def _check(item: VitImage | CleanImage | NoisyImage, size: int, key: str) -> None:
    if max(item) > size:
        raise ValueError(
            f"an image of {item.height} x {item.width} tokens exceeds the {size} x {size} positions of the model; use "
            f"a smaller image (or a model with a larger model.{key})"
        )


def _cat(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
