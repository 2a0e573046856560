"""Lay out a batch of text and visual embeddings on the host: where each row comes from. No dense mask anywhere."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100


class TextSegment(NamedTuple):
    """Hold token ids and the labels of the same positions (None: nothing is learned here)."""

    ids: Sequence[int] | Tensor
    labels: Sequence[int] | Tensor | None = None


class VisualSegment(NamedTuple):
    """Take the next n rows of the visual embeddings."""

    n: int


Segment = TextSegment | VisualSegment


@dataclass(frozen=True)
class ConcatPlan:
    """Layout of B samples: packed one after another, [T], or one per row, [B, L].

    src           int32 [T] or [B, L]: >= 0 is a row of the embedding table, < 0 is visual row -1 - src
    position_ids  int64, same shape: 0, 1, 2, … inside each sample; 0 in padding
    segment_ids   int32, same shape: number of the sample; -1 in padding
    labels        int64, same shape: -100 where nothing is learned
    cu_seqlens    int32 [B + 1]: running sum of the samples' lengths, without padding
    """

    src: Tensor
    position_ids: Tensor
    segment_ids: Tensor
    labels: Tensor
    cu_seqlens: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "ConcatPlan":
        """Return the plan with its tensors on `device`."""
        return ConcatPlan(*(getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)))


def concat_plan(
    samples: Sequence[Sequence[Segment]],
    *,
    layout: str = "packed",
    length: int | None = None,
    pad_id: int = 0,
) -> ConcatPlan:
    """Lay out samples made of text and visual segments.

    samples  per sample its segments in order; visual rows are consumed in order over the whole batch
    layout   "packed": one sequence [T]; "left" or "right": [B, L], padded on that side
    length   T or L; default: the total, or the longest sample. Padding embeds `pad_id`.

    Raises ValueError when a sample (packed: all samples) is longer than `length`.
    """
    if layout not in ("packed", "left", "right"):
        raise ValueError(f"layout must be 'packed', 'left' or 'right', got {layout!r}")
    srcs, labels, visual_rows = [], [], 0
    for number, sample in enumerate(samples):
        src, label = [], []
        for segment in sample:
            if isinstance(segment, VisualSegment):
                src.append(torch.arange(-1 - visual_rows, -1 - visual_rows - segment.n, -1, dtype=torch.int32))
                label.append(torch.full((segment.n,), IGNORE_INDEX))
                visual_rows += segment.n
                continue
            ids = torch.as_tensor(segment.ids, dtype=torch.int64).cpu()
            if ids.ndim != 1 or bool((ids < 0).any()):
                raise ValueError(
                    f"sample {number}: token ids must be a 1-D sequence of numbers >= 0, got {segment.ids}"
                )
            src.append(ids.int())
            if segment.labels is None:
                label.append(torch.full_like(ids, IGNORE_INDEX))
                continue
            label.append(torch.as_tensor(segment.labels, dtype=torch.int64).cpu())
            if label[-1].shape != ids.shape:
                raise ValueError(
                    f"sample {number}: {len(ids)} token ids but labels of shape {list(label[-1].shape)}; "
                    "give one label per id"
                )
        srcs.append(torch.cat(src) if src else torch.empty(0, dtype=torch.int32))
        labels.append(torch.cat(label) if label else torch.empty(0, dtype=torch.int64))

    lengths = [len(src) for src in srcs]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    needed = sum(lengths) if layout == "packed" else max(lengths, default=0)
    length = needed if length is None else length
    if needed > length:
        where = "the packed samples have" if layout == "packed" else f"sample {lengths.index(needed)} has"
        raise ValueError(f"{where} {needed} positions, more than length={length}; shorten the text or raise length")

    shape = (length,) if layout == "packed" else (len(srcs), length)
    plan = ConcatPlan(
        src=torch.full(shape, pad_id, dtype=torch.int32),
        position_ids=torch.zeros(shape, dtype=torch.int64),
        segment_ids=torch.full(shape, -1, dtype=torch.int32),
        labels=torch.full(shape, IGNORE_INDEX),
        cu_seqlens=cu_seqlens,
    )
    place: slice | tuple[int, slice]
    for number, (own_src, own_labels) in enumerate(zip(srcs, labels, strict=True)):
        n = len(own_src)
        if layout == "packed":
            place = slice(int(cu_seqlens[number]), int(cu_seqlens[number]) + n)
        else:
            place = (number, slice(length - n, length) if layout == "left" else slice(n))
        plan.src[place] = own_src
        plan.labels[place] = own_labels
        plan.position_ids[place] = torch.arange(n)
        plan.segment_ids[place] = number
    return plan
