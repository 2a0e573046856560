"""Show-o's sequences: token order, attention layout and labels.

    t2i        (PAD…) t2i bos text eos | soi image eoi                the text ends at a fixed position
    i2t vq     mmu soi h_v eoi text                                   h_v: embeddings of the image's codes
    i2t clip   mmu system soi h_v eoi text                            h_v: projected CLIP features
    reca clip  mmu soi h_v eoi bos template eos (PAD…) | soi image eoi    the part before | has a fixed length
    reca vq    (PAD…) mmu soi h_v eoi bos template eos | soi image eoi

The release fills (PAD…) with tokens that no other token attends to, but counts their positions. Here they are omitted
and position ids skip them: the same result from fewer tokens. Batches are padded on the left.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from reca.data.tasks import Turn
from reca_kernels import (
    IGNORE_INDEX,
    AttentionPlan,
    AttentionSpan,
    TextSegment,
    VisualSegment,
    attention_plan,
    concat_plan,
)
from reca_kernels.host import on_device

SPECIAL_TOKENS = (
    "[PAD]", "<|soi|>", "<|eoi|>", "<|sov|>", "<|eov|>", "<|t2i|>", "<|mmu|>", "<|t2v|>", "<|v2v|>", "<|lvg|>",
)  # fmt: skip
END_OF_TEXT = "<|endoftext|>"
TEMPLATE = "USER: \n {} ASSISTANT:"
WORDS = ("USER", "ASSISTANT", ":", "\n")  # words that prompts add to the user's text
Tokens = Callable[[str], list[int]]  # tokenises text to ids, without control tokens


@dataclass(frozen=True)
class Vocabulary:
    """Ids of the tokens other than text. Image code c is token offset + c; the mask is the last token."""

    pad: int
    soi: int
    eoi: int
    t2i: int
    mmu: int
    bos: int
    eos: int
    offset: int
    codes: int

    @property
    def mask(self) -> int:
        return self.offset + self.codes

    @property
    def size(self) -> int:
        return self.mask + 1

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, codes: int) -> "Vocabulary":
        """Look up END_OF_TEXT and all of SPECIAL_TOKENS. Raises ValueError if one is missing, or if ids have gaps."""
        tokens = [END_OF_TEXT, *SPECIAL_TOKENS]
        known = tokenizer.get_vocab()
        if missing := [token for token in tokens if token not in known]:
            raise ValueError(f"the tokenizer lacks {', '.join(missing)}; Show-o needs {', '.join(tokens)}")
        if (ids := set(known.values())) != set(range(len(known))):
            raise ValueError(
                f"the tokenizer has {len(known)} tokens, with {len(ids)} ids up to {max(ids)}; Show-o's image codes "
                "follow the last token, so every id from 0 on must be that of one token. Set model.tokenizer to that "
                "of the weights, or to microsoft/phi-1_5"
            )
        end, pad, soi, eoi, _, _, t2i, mmu, *_ = (known[token] for token in tokens)
        return cls(pad, soi, eoi, t2i, mmu, end, end, len(tokenizer), codes)


class Sample(NamedTuple):
    """One sequence.

    segments  text and h_v in order; a label belongs to the row that predicts it
    runs      the same rows as attention spans
    starts    (row, position): from this row on, position ids count up from `position`
    """

    segments: list[TextSegment | VisualSegment]
    runs: list[AttentionSpan]
    starts: tuple[tuple[int, int], ...] = ((0, 0),)


@dataclass(frozen=True)
class Layout:
    """A batch of sequences, padded on the left, so that every image ends one row before the end of the sequence.

    src           int32 [B, L]: token ids; -1 - r for row r of the batch's h_v, flattened to B*n rows
    position_ids  int64 [B, L]
    labels        int64 [B, L]: target of each row, IGNORE_INDEX for rows without a loss
    runs          attention spans of each sample

    `packed` concatenates the samples to [1, T].
    """

    src: Tensor
    position_ids: Tensor
    labels: Tensor
    runs: list[tuple[AttentionSpan, ...]]

    def to(self, device: torch.device) -> "Layout":
        src, positions, labels = (on_device(tensor, device) for tensor in (self.src, self.position_ids, self.labels))
        return Layout(src, positions, labels, self.runs)

    def plan(self) -> AttentionPlan:
        """Return the attention plan."""
        return attention_plan(self.runs, device=self.src.device)

    def places(self) -> Tensor | None:
        """Return the indices of the rows other than padding among all B * L, int64; None if there is no padding."""
        pads = [sum(run.length for run in runs if run.mode == "pad") for runs in self.runs]
        if not any(pads):
            return None
        filled = np.arange(self.src.shape[1]) >= np.array(pads)[:, None]
        return on_device(torch.from_numpy(filled.ravel().nonzero()[0]), self.src.device)

    def packed(self, places: Tensor) -> "Layout":
        """Return the layout of these rows with all samples concatenated, [1, T]."""
        runs = [tuple(run for run in runs if run.mode != "pad") for runs in self.runs]
        src, positions, labels = (x.flatten()[places][None] for x in (self.src, self.position_ids, self.labels))
        return Layout(src, positions, labels, runs)


def layout(samples: Sequence[Sample], v: Vocabulary) -> Layout:
    """Lay out samples as one left-padded batch."""
    plan = concat_plan([sample.segments for sample in samples], layout="left", pad_id=v.pad)
    length = plan.src.shape[1]
    positions, runs = np.zeros((len(samples), length), np.int64), []
    for row, sample in zip(positions, samples, strict=True):
        first = length - sum(run.length for run in sample.runs)
        for start, position in sample.starts:
            row[first + start :] = np.arange(position, position + length - first - start)
        runs.append((AttentionSpan(first, "pad"), *sample.runs) if first else tuple(sample.runs))
    return Layout(plan.src, torch.tensor(positions), plan.labels, runs)


def image_rows(image_tokens: int) -> slice:
    """Return the slice of columns with the image's codes; it is the same in every layout that has an image."""
    return slice(-1 - image_tokens, -1)


def split_image(layout: Layout, image_tokens: int) -> tuple[Layout, Layout]:
    """Split a layout before soi. No row of the first part, the prompts, attends to one of the second, the images."""
    at = layout.src.shape[1] - image_tokens - 2
    prompts, images = [], []
    for runs in layout.runs:
        ends = list(itertools.accumulate(run.length for run in runs))
        before = [min(run.length, max(0, at - end + run.length)) for run, end in zip(runs, ends, strict=True)]
        prompts.append(tuple(run._replace(length=n) for run, n in zip(runs, before, strict=True) if n))
        rest = [run._replace(length=run.length - n) for run, n in zip(runs, before, strict=True)]
        images.append(tuple(run for run in rest if run.length))

    def part(columns: slice, runs: list[tuple[AttentionSpan, ...]]) -> Layout:
        return Layout(layout.src[:, columns], layout.position_ids[:, columns], layout.labels[:, columns], runs)

    return part(slice(at), prompts), part(slice(at, None), images)


def put_image(layout: Layout, ids: Tensor) -> Layout:  # int64 [B, N]
    """Return the layout with these token ids as its images."""
    src = layout.src.clone()
    src[:, image_rows(ids.shape[1])] = ids.int()
    return replace(layout, src=src)


def apply_mask(layout: Layout, codes: Tensor, masked: Tensor, v: Vocabulary) -> Layout:  # int64, bool [B, N]
    """Return the layout with its images filled in: masked codes become the mask token, labelled with the code."""
    ids, labels = codes + v.offset, layout.labels.clone()
    labels[:, image_rows(ids.shape[1])] = torch.where(masked, ids, IGNORE_INDEX)
    return replace(put_image(layout, torch.where(masked, v.mask, ids)), labels=labels)


def add_bos_eos(text: list[int], v: Vocabulary, budget: int) -> list[int]:
    """Return bos text eos, truncated to `budget` tokens and still ending in eos."""
    ids = [v.bos, *text, v.eos]
    return ids if len(ids) <= budget else [*ids[: budget - 1], v.eos]


def image(v: Vocabulary, image_tokens: int, ends: bool = False) -> TextSegment:
    """Return soi, masked codes, eoi. ends: soi and eoi are labelled with themselves."""
    ids = [v.soi, *[v.mask] * image_tokens, v.eoi]
    return TextSegment(ids, [v.soi, *[IGNORE_INDEX] * image_tokens, v.eoi] if ends else None)


def t2i(text: list[int], v: Vocabulary, budget: int, image_tokens: int) -> Sample:
    """Build a text-to-image sequence; an empty text is the unconditional prompt. budget: text tokens besides t2i."""
    ids = [v.t2i, *add_bos_eos(text, v, budget)]
    return Sample(
        [TextSegment(ids), image(v, image_tokens, ends=True)],
        [AttentionSpan(len(ids), "causal"), AttentionSpan(image_tokens + 2, "full")],
        ((0, budget + 1 - len(ids)),),
    )


def i2t_vq(text: list[int], labels: list[int], v: Vocabulary, visual: int) -> Sample:
    """Build a conversation about an image given as codes. labels: targets of the text, IGNORE_INDEX without a loss."""
    return Sample(
        [TextSegment([v.mmu, v.soi]), VisualSegment(visual), TextSegment([v.eoi, *text], [*labels, IGNORE_INDEX])],
        [AttentionSpan(visual + 3, "full"), AttentionSpan(len(text), "causal")],
    )


def i2t_clip(text: list[int], labels: list[int], v: Vocabulary, system: list[int], visual: int) -> Sample:
    """Build a conversation about an image given as CLIP features, to which earlier tokens attend, too."""
    before = [v.mmu, *system, v.soi]
    return Sample(
        [TextSegment(before), VisualSegment(visual), TextSegment([v.eoi, *text], [*labels, IGNORE_INDEX])],
        [
            AttentionSpan(len(before), "causal"),
            AttentionSpan(visual, "full", visible_to_earlier=True),
            AttentionSpan(len(text) + 1, "causal"),
        ],
    )


def reca_clip(template: list[int], v: Vocabulary, budget: int, visual: int, image_tokens: int) -> Sample:
    """Build the reconstruction from CLIP features. Raises ValueError for a template longer than the budget."""
    text = [v.eoi, v.bos, *template, v.eos]
    if len(text) + 2 > budget:
        raise _too_long(template, "max_reca_tokens", budget, budget - 5)
    end = 2 + visual + len(text)
    return Sample(
        [TextSegment([v.mmu, v.soi]), VisualSegment(visual), TextSegment(text), image(v, image_tokens)],
        [
            AttentionSpan(2, "causal"),
            AttentionSpan(visual, "full", visible_to_earlier=True),
            AttentionSpan(len(text) + 1, "causal"),
            AttentionSpan(image_tokens, "full"),
            AttentionSpan(1, "causal"),
        ],
        ((0, 0), (end, budget + visual)),
    )


def reca_vq(template: list[int], v: Vocabulary, budget: int, visual: int, image_tokens: int) -> Sample:
    """Build the reconstruction from codes. Raises ValueError for a template longer than the budget."""
    text = [v.bos, *template, v.eos]
    if len(text) >= budget:  # the release needs at least one PAD
        raise _too_long(template, "max_text_tokens", budget, budget - 3)
    return Sample(
        [TextSegment([v.mmu, v.soi]), VisualSegment(visual), TextSegment([v.eoi, *text]), image(v, image_tokens)],
        [
            AttentionSpan(1, "causal"),
            AttentionSpan(visual + 2, "full"),
            AttentionSpan(len(text), "causal"),
            AttentionSpan(image_tokens + 2, "full"),
        ],
        ((0, budget - len(text)),),
    )


def _too_long(template: list[int], key: str, budget: int, room: int) -> ValueError:
    return ValueError(f"a template has {len(template)} tokens; model.{key}={budget} leaves room for {room}")


def conversation(tokens: Tokens, turns: Sequence[Turn], v: Vocabulary) -> tuple[list[int], list[int]]:
    """Join turns into ids and labels; the answers and the eos after each are labelled."""
    ids, labels = [], []
    for asked, answered in turns:
        whole = [*tokens(f"USER: {asked} ASSISTANT: {answered}"), v.eos]
        given = len(tokens(f"USER: {asked} ASSISTANT:"))
        ids += whole
        labels += [IGNORE_INDEX] * given + whole[given:]
    return ids, labels
