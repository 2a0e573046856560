"""BAGEL's sequences: items that each enter as one split, one position per image.

    RECA        [h_v] [template] [noisy image]        a dropped template is left out and takes no position
    t2i         [caption] [noisy image]
    edit        [clean image] [h_v] [instruction] [noisy image]
    i2t         [h_v] [question answer ...]           every text between the tokens that begin and end a turn

Text is causal and its positions count up; an image sees all of itself, stands at one position, and moves the next by
one. Its borders are text tokens, so they belong to the understanding expert even around latents.
"""

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
        """Look the ids up. Raises ValueError when the tokenizer lacks one of SPECIAL_TOKENS."""
        known = tokenizer.get_vocab()
        if missing := [token for token in SPECIAL_TOKENS if token not in known]:
            raise ValueError(f"the tokenizer lacks {', '.join(missing)}; BAGEL needs {', '.join(SPECIAL_TOKENS)}")
        return cls(*(known[token] for token in SPECIAL_TOKENS))


class Text(NamedTuple):
    """Token ids with bos and eos, and what each position predicts."""

    ids: list[int]
    labels: list[int] | None = None


class VitImage(NamedTuple):
    """An image as h_v, tokens of SigLIP. Sizes are in tokens."""

    height: int
    width: int


class CleanImage(NamedTuple):
    """An image as latents without noise. Sizes are in tokens."""

    height: int
    width: int


class NoisyImage(NamedTuple):
    """The image that is being generated. Nothing after it sees it. Sizes are in tokens."""

    height: int
    width: int


class DroppedImage(NamedTuple):
    """An image that was left out; it keeps its position."""


Item = Text | VitImage | CleanImage | NoisyImage | DroppedImage


class Prompt(NamedTuple):
    """What samples are given.

    items    per sample
    h_v      [h, w, C] per VitImage, in order; None: there is none
    latents  [C, h, w] per CleanImage, in order; None: there is none
    """

    items: Sequence[Sequence[Item]]
    h_v: Sequence[Tensor] | None = None
    latents: Sequence[Tensor] | None = None


@dataclass
class Layout:
    """The rows of one pass, per expert one sample after another.

    src               int32 [U]: token ids; -1 - r for row r of the pass's h_v
    vit_positions     int64 [U]: place of a token of h_v in SigLIP's position table, -1 elsewhere
    labels            int64 [U]: what the row predicts, IGNORE_INDEX for nothing
    latent_positions  int64 [G]: place in the position table of latents
    image_ids         int64 [G]: number of the image among the pass's latent images
    positions         per expert int64 [U], [G]: rotary positions
    splits            which rows enter together
    next_positions    per sample: the rotary position after the pass
    labelled          how many labels there are
    """

    src: Tensor
    vit_positions: Tensor
    labels: Tensor
    latent_positions: Tensor
    image_ids: Tensor
    positions: dict[str, Tensor]
    splits: list[Split]
    next_positions: list[int]
    labelled: int

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
    """Lay out the next items of every sample, whose rotary positions go on from `positions`.

    vit_size, latent_size: height and width of the position tables. Raises ValueError for an image beyond its table.
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
    labelled = int((plan.labels != IGNORE_INDEX).sum())
    return Layout(plan.src, _cat(vit_at), plan.labels, _cat(latent_at), _cat(image_ids), rotary, splits, ends, labelled)


def add_bos_eos(ids: Sequence[int], v: Vocabulary) -> Text:
    return Text([v.bos, *ids, v.eos])


def conversation(turns: Sequence[tuple[Sequence[int], Sequence[int]]], v: Vocabulary) -> Text:
    """Join questions and answers to one causal text.

    Learned are an answer's tokens and the eos behind it, each by the row before it.
    """
    ids, labels = [], []
    for question, answer in turns:
        ids += [v.bos, *question, v.eos, v.bos, *answer, v.eos]
        labels += [IGNORE_INDEX] * (len(question) + 2) + [*answer, v.eos, IGNORE_INDEX]
    return Text(ids, labels)


def grid(height: int, width: int, size: int) -> Tensor:
    """Number the height x width corner of a size x size grid, row by row, int64 [height width]."""
    return (torch.arange(height)[:, None] * size + torch.arange(width)).flatten()


def _check(item: VitImage | CleanImage | NoisyImage, size: int, key: str) -> None:
    if max(item) > size:
        raise ValueError(
            f"an image of {item.height} x {item.width} tokens is beyond the {size} x {size} positions there are; use a "
            f"smaller image (or a model with a larger model.{key})"
        )


def _cat(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
