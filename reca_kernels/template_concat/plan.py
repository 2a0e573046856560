"""Lay out a batch of text and visual embeddings on the host: the source of each row. No dense mask is made."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from reca_kernels.checks import whole

IGNORE_INDEX = -100


class TextSegment(NamedTuple):
    """Token ids and the labels of the same positions. None: no labels."""

    ids: Sequence[int] | Tensor
    labels: Sequence[int] | Tensor | None = None


class VisualSegment(NamedTuple):
    """The next n rows of the visual embeddings."""

    n: int


Segment = TextSegment | VisualSegment


@dataclass(frozen=True)
class ConcatPlan:
    """The layout of B samples: packed, [T], or padded with one sample per row, [B, L].

    src           int32 [T] or [B, L]: >= 0 is a row of the embedding table, < 0 is visual row -1 - src
    position_ids  int64, same shape: 0, 1, 2, … within each sample; 0 in padding
    segment_ids   int32, same shape: index of the sample; -1 in padding
    labels        int64, same shape: IGNORE_INDEX (-100) at positions without a label
    cu_seqlens    int32 [B + 1]: cumulative lengths of the samples, without padding
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

    samples  the segments of each sample, in order; visual rows are consumed in order over the whole batch
    layout   "packed": one sequence [T]; "left" or "right": [B, L], padded on that side
    length   T or L; default: the total length, or that of the longest sample
    pad_id   token id of padding

    Raises:
        ValueError: A sample (packed: all samples together) is longer than `length`, token ids and labels differ in
            number, a visual segment has n < 0, or the layout is unknown.
        TypeError: A segment is neither a TextSegment nor a VisualSegment, or its ids, labels or n, `length` or `pad_id`
            are not whole numbers.
    """
    if layout not in ("packed", "left", "right"):
        raise ValueError(f"layout must be 'packed', 'left' or 'right', got {layout!r}")
    whole("concat_plan", length=length or 0, pad_id=pad_id)
    srcs: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    visual_rows = 0
    for number, sample in enumerate(samples):
        src, label = [_NO_ROWS], [_NO_ROWS]
        for segment in sample:
            if isinstance(segment, VisualSegment):
                whole(f"sample {number}: a visual segment", n=segment.n)
                if segment.n < 0:
                    raise ValueError(f"sample {number}: a visual segment must have n >= 0 rows, got {segment.n}")
                src.append(np.arange(-1 - visual_rows, -1 - visual_rows - segment.n, -1))
                label.append(_ignored(segment.n))
                visual_rows += segment.n
                continue
            if not isinstance(segment, TextSegment):
                raise TypeError(
                    f"sample {number}: a segment must be a TextSegment or a VisualSegment, got {segment!r}; a plan "
                    "takes a list of segments per sample"
                )
            ids = _numbers(segment.ids)
            if ids.ndim != 1 or (ids < 0).any() or (ids >= 2**31).any():
                raise ValueError(
                    f"sample {number}: token ids must be a 1-D sequence of numbers in [0, 2^31), got {segment.ids}"
                )
            src.append(ids)
            label.append(_ignored(len(ids)) if segment.labels is None else _numbers(segment.labels))
            if label[-1].shape != ids.shape:
                raise ValueError(
                    f"sample {number}: {len(ids)} token ids but labels of shape {list(label[-1].shape)}; "
                    "give one label per id"
                )
        srcs.append(np.concatenate(src))
        labels.append(np.concatenate(label))

    lengths = [len(src) for src in srcs]
    starts = [0, *accumulate(lengths)]
    needed = sum(lengths) if layout == "packed" else max(lengths, default=0)
    length = needed if length is None else length
    if needed > length:
        where = "the packed samples have" if layout == "packed" else f"sample {lengths.index(needed)} has"
        raise ValueError(f"{where} {needed} positions, more than length={length}; shorten the text or raise length")

    shape = (length,) if layout == "packed" else (len(srcs), length)
    src_rows, label_rows = np.full(shape, pad_id, np.int32), np.full(shape, IGNORE_INDEX)
    positions, segments = np.zeros(shape, np.int64), np.full(shape, -1, np.int32)
    place: slice | tuple[int, slice]
    for number, (own_src, own_labels) in enumerate(zip(srcs, labels, strict=True)):
        n = len(own_src)
        if layout == "packed":
            place = slice(starts[number], starts[number] + n)
        else:
            place = (number, slice(length - n, length) if layout == "left" else slice(n))
        src_rows[place], label_rows[place] = own_src, own_labels
        positions[place], segments[place] = np.arange(n), number
    # torch.tensor copies, so a dispatch mode sees the operation and can return fake tensors.
    return ConcatPlan(
        src=torch.tensor(src_rows),
        position_ids=torch.tensor(positions),
        segment_ids=torch.tensor(segments),
        labels=torch.tensor(label_rows),
        cu_seqlens=torch.tensor(starts, dtype=torch.int32),
    )


_NO_ROWS = np.zeros(0, np.int64)


def _numbers(values: Sequence[int] | Tensor) -> np.ndarray:
    array = values.cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"token ids and labels must be integers, got {values}")
    return array.astype(np.int64)


@lru_cache(maxsize=256)
def _ignored(n: int) -> np.ndarray:
    return np.full(n, IGNORE_INDEX)
