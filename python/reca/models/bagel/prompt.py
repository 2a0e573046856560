"""BAGEL's sequences: items that each enter as one split, one position per image.

    RECA        [h_v] [template] [noisy image]        a dropped template is left out and takes no position
    t2i         [caption] [noisy image]
    edit        [clean image] [h_v] [instruction] [noisy image]
    i2t         [h_v] [question answer ...]             every text framed by the tokens that begin and end a turn

Text is causal and its positions count up; an image sees all of itself, stands at one position, and moves the next by
one. Its borders are text tokens, so they belong to the understanding expert even around latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from reca.models.bagel.modules import grid
from reca.models.bagel.mot import GEN, UND, Split
from reca.models.common.text import encode as encode
from reca_kernels import TextSegment, VisualSegment, concat_plan
from reca_kernels.host import on_device

BEGIN, END, IMAGE, END_OF_IMAGE = "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"
SPECIAL_TOKENS = (BEGIN, END, IMAGE, END_OF_IMAGE)
IGNORE = -100


@dataclass(frozen=True)
class Vocabulary:
    """Ids of the tokens that frame texts (bos, eos) and images (soi, eoi)."""

    bos: int
    eos: int
    soi: int
    eoi: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "Vocabulary":
        """Raises ValueError when the tokenizer lacks one of SPECIAL_TOKENS."""
        known = tokenizer.get_vocab()
        if missing := [token for token in SPECIAL_TOKENS if token not in known]:
            raise ValueError(f"the tokenizer lacks {', '.join(missing)}; BAGEL needs {', '.join(SPECIAL_TOKENS)}")
        return cls(*(known[token] for token in SPECIAL_TOKENS))


class Text(NamedTuple):
    """Token ids with their frame, and what each position predicts."""

    ids: list[int]
    labels: list[int] | None = None


class Seen(NamedTuple):
    """An image as h_v: rows of SigLIP."""

    height: int
    width: int


class Clean(NamedTuple):
    """An image as latents without noise."""

    height: int
    width: int


class Noisy(NamedTuple):
    """The image that is being drawn. Nothing after it sees it."""

    height: int
    width: int


class Dropped(NamedTuple):
    """An image that was left out; it keeps its position."""


Item = Text | Seen | Clean | Noisy | Dropped


@dataclass
class Layout:
    """The rows of one pass, per expert one sample after another.

    src         int32 [U]: token ids; -1 - r for row r of the pass's h_v
    seen_at     int64 [U]: place of a row of h_v in SigLIP's position table, -1 elsewhere
    labels      int64 [U]: what the row predicts, -100 for nothing
    latent_at   int64 [G]: place in the position table of latents
    image       int64 [G]: number of the image among the pass's latent images
    positions   per expert int64 [U], [G]
    splits      which rows enter together
    cursors     per sample: the position after the pass
    """

    src: Tensor
    seen_at: Tensor
    labels: Tensor
    latent_at: Tensor
    image: Tensor
    positions: dict[str, Tensor]
    splits: list[Split]
    cursors: list[int]

    def to(self, device: torch.device) -> "Layout":
        moved = {f.name: on_device(getattr(self, f.name), device) for f in fields(self) if f.type is Tensor}
        return replace(self, **moved, positions={expert: on_device(p, device) for expert, p in self.positions.items()})


def layout(
    samples: Sequence[Sequence[Item]],
    v: Vocabulary,
    cursors: Sequence[int],
    seen_size: int,
    latent_size: int,
) -> Layout:
    """Lay out the next items of every sample, whose positions go on from `cursors`.

    seen_size, latent_size: sides of the position tables. Raises ValueError for an image beyond its table.
    """
    segments, splits, ends = [], [], []
    seen_at, latent_at, image, und_at, gen_at = [], [], [], [], []
    images = 0
    for number, (items, cursor) in enumerate(zip(samples, cursors, strict=True)):
        mine = []
        for item in items:
            und, gen = 0, 0
            if isinstance(item, Text):
                mine.append(TextSegment(item.ids, item.labels))
                seen_at.append(torch.full((len(item.ids),), -1))
                und_at.append(torch.arange(cursor, cursor + len(item.ids)))
                und, cursor = len(item.ids), cursor + len(item.ids)
            elif isinstance(item, Seen):
                _check(item, seen_size, "vision.image_size")
                n = item.height * item.width
                mine += [TextSegment([v.soi]), VisualSegment(n), TextSegment([v.eoi])]
                border = torch.tensor([-1])
                seen_at += [border, grid(item.height, item.width, seen_size), border]
                und_at.append(torch.full((n + 2,), cursor))
                und, cursor = n + 2, cursor + 1
            elif isinstance(item, Dropped):
                cursor += 1
                continue
            else:
                _check(item, latent_size, "max_latent_size")
                n = item.height * item.width
                mine.append(TextSegment([v.soi, v.eoi]))
                seen_at.append(torch.full((2,), -1))
                latent_at.append(grid(item.height, item.width, latent_size))
                image.append(torch.full((n,), images))
                und_at.append(torch.full((2,), cursor))
                gen_at.append(torch.full((n,), cursor))
                und, gen, images, cursor = 2, n, images + 1, cursor + 1
            splits.append(Split(number, und, gen, isinstance(item, Text), not isinstance(item, Noisy)))
        segments.append(mine)
        ends.append(cursor)
    plan = concat_plan(segments)
    positions = {UND: _cat(und_at), GEN: _cat(gen_at)}
    return Layout(plan.src, _cat(seen_at), plan.labels, _cat(latent_at), _cat(image), positions, splits, ends)


def framed(ids: list[int], v: Vocabulary) -> Text:
    return Text([v.bos, *ids, v.eos])


def talk(turns: Sequence[tuple[list[int], list[int]]], v: Vocabulary) -> Text:
    """Questions and answers as one causal text. An answer's tokens and the eos behind it are learned, each by the row
    before it."""
    ids, labels = [], []
    for asked, answered in turns:
        ids += [v.bos, *asked, v.eos, v.bos, *answered, v.eos]
        labels += [IGNORE] * (len(asked) + 2) + [*answered, v.eos, IGNORE]
    return Text(ids, labels)


def _check(item: Seen | Clean | Noisy, size: int, key: str) -> None:
    if max(item) > size:
        raise ValueError(
            f"an image of {item.height} x {item.width} tokens is beyond the {size} x {size} positions there are; use a "
            f"smaller image (or a model with a larger model.{key})"
        )


def _cat(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)
