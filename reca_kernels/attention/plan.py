"""Plan the attention of a batch on the host: which rows attend to which keys, as a few calls of FlashAttention.

No dense mask is built. In all six models a row attends to whole other spans and, within its own span, to all rows or
to the rows up to itself. The rows of a sample therefore form query groups with the same keys. A full group is attention
without a mask. A causal group is aligned bottom-right: its last row attends to its last key. The groups of all samples
are batched into a few variable-length calls. Every row is in exactly one of them, so no partial results are merged.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from reca_kernels import compiling
from reca_kernels.checks import is_whole
from reca_kernels.host import in_mode, indexed, no_modes, on_device

MODES = ("causal", "full", "noise", "pad")

Interval = tuple[int, int]  # [start, stop)


class AttentionSpan(NamedTuple):
    """Consecutive rows of a sample with the same attention rule.

    They attend to all earlier spans, except noise and padding.

    Attributes:
        length: Number of rows.
        mode: A `causal` row attends to its own span up to and including itself. A `full` row attends to its whole span.
            `noise` is `full`, but no other span attends to it (the noised target of BAGEL). `pad` attends to nothing,
            nothing attends to it, and its output is 0.
        visible_to_earlier: Rows of earlier spans attend to this span too (the CLIP features of Show-o).
        cached: The span has keys and values but no queries: a prefix computed earlier. Cached spans come first.
    """

    length: int
    mode: str = "causal"
    visible_to_earlier: bool = False
    cached: bool = False


class QueryGroup(NamedTuple):
    """Rows of one sample that attend to the same keys; both are numbered within the sample.

    causal: the last row attends to all keys, the row before it to all but the last, and so on.
    """

    rows: tuple[Interval, ...]
    keys: tuple[Interval, ...]
    causal: bool


class QueryPiece(NamedTuple):
    """The length of a run of query rows of a sample, and their group; -1: padding."""

    length: int
    group: int


class Call(NamedTuple):
    """One variable-length attention call over groups of several samples.

    rows     number of its query rows
    keys     int64 [sum of keys]: the unpadded key rows that it reads; None: all of them, in order
    cu_q     int32 [n + 1]: cumulative query rows of the groups; cu_k likewise of keys
    max_q    query rows of the longest group; max_k likewise of keys
    """

    rows: int
    keys: Tensor | None
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    causal: bool


class Calls(NamedTuple):
    """All calls of a plan.

    order     int64: the query rows of all calls, concatenated; None: all rows, in order
    unpadded  int64: the key rows without padding; None: there is no padding
    """

    order: Tensor | None
    unpadded: Tensor | None
    calls: tuple[Call, ...]


class AttentionPlan:
    """What the rows of B samples attend to, with index tensors on a device. Made by `attention_plan`.

    samples       the spans of each sample; its rows are those of its spans, in order
    query_sizes   query rows of each sample: those of spans that are not cached, padding included
    key_sizes     key rows of each sample: those of all spans
    groups        query groups of each sample
    pieces        query rows of each sample in order, as runs of one group
    pairs         (row, key) pairs that are computed; a forward pass takes 4 * heads * head_dim * pairs FLOPs
    uniform       all samples have the same sizes and groups, so one call per group serves the whole batch

    It is not a dataclass: FSDP2 rebuilds dataclasses among a block's arguments to cast their fields, and every block
    would get a copy with its own index tensors.
    """

    def __init__(
        self,
        samples: tuple[tuple[AttentionSpan, ...], ...],
        device: torch.device,
        query_sizes: tuple[int, ...],
        key_sizes: tuple[int, ...],
        groups: tuple[tuple[QueryGroup, ...], ...],
        pieces: tuple[tuple[QueryPiece, ...], ...],
        pairs: int,
        uniform: bool,
    ) -> None:
        self.samples, self.device = samples, device
        self.query_sizes, self.key_sizes = query_sizes, key_sizes
        self.groups, self.pieces, self.pairs, self.uniform = groups, pieces, pairs, uniform
        self._cached_calls: list[Calls] = []

    def to(self, device: torch.device | str) -> "AttentionPlan":
        """Return the plan of the same samples on another device."""
        return attention_plan(self.samples, device=device)

    @property
    def cached_sizes(self) -> tuple[int, ...]:
        return tuple(k - q for k, q in zip(self.key_sizes, self.query_sizes, strict=True))

    @property
    def calls(self) -> "Calls":
        """Return the calls. On CPUs they are made at first use, on GPUs together with the plan, for compiled steps."""
        if not self._cached_calls:
            _make_calls(self)
        return in_mode(self._cached_calls[0])


def attention_plan(samples: Iterable[Sequence[AttentionSpan]], *, device: torch.device | str = "cpu") -> AttentionPlan:
    """Plan the attention of samples made of spans.

    Plans are cached by layout and device.

    Args:
        samples: The spans of each sample, in order.
        device: The device of q, k and v; "cuda" is the current device.

    Raises:
        ValueError: An item is not an AttentionSpan, or a span is invalid.
        TypeError: The length of a span is no whole number.
    """
    spans = tuple(tuple(sample) for sample in samples)
    for number, sample in enumerate(spans):  # not in `_problem`, whose cache takes 2.0 for 2
        for i, span in enumerate(sample):
            if isinstance(span, AttentionSpan) and not is_whole(span.length):
                raise TypeError(
                    f"attention_plan: sample {number}, span {i}: length must be a whole number, got {span.length!r}"
                )
    return _plan(spans, indexed(device))


@functools.lru_cache(maxsize=32)
def _plan(samples: tuple[tuple[AttentionSpan, ...], ...], device: torch.device) -> AttentionPlan:
    for number, sample in enumerate(samples):
        if problem := _problem(sample):
            raise ValueError(f"attention_plan: sample {number}, {problem}")
    parts = [_planned(sample) for sample in samples]
    query_sizes, key_sizes, found, pieces, pairs = zip(*parts, strict=True) if parts else ((),) * 5
    plan = AttentionPlan(
        samples, device, query_sizes, key_sizes, found, pieces, sum(pairs), uniform=len(set(parts)) == 1
    )
    if device.type == "cuda":
        _make_calls(plan)
    return plan


class _Sample(NamedTuple):
    """The plan of one sample."""

    queries: int
    keys: int
    groups: tuple[QueryGroup, ...]
    pieces: tuple[QueryPiece, ...]
    pairs: int


@functools.lru_cache(maxsize=4096)
def _planned(sample: tuple[AttentionSpan, ...]) -> _Sample:
    """Plan one sample. The result is cached: new batches often contain samples of known lengths."""
    queries, keys = sum(span.length for span in sample if not span.cached), sum(span.length for span in sample)
    groups = query_groups(sample)
    return _Sample(queries, keys, groups, _pieces(queries, groups), sum(_pairs(group) for group in groups))


@functools.lru_cache(maxsize=4096)
def _problem(sample: tuple[AttentionSpan, ...]) -> str | None:
    for i, span in enumerate(sample):
        where = f"span {i}: "
        if not isinstance(span, AttentionSpan):
            return f"{where}must be an AttentionSpan, got {span!r}; a plan takes a list of spans per sample"
        if span.mode not in MODES:
            return f"{where}mode must be one of {', '.join(MODES)}, got {span.mode!r}"
        if span.length < 0:
            return f"{where}length must be 0 or more, got {span.length}"
        if span.visible_to_earlier and span.mode in ("noise", "pad"):
            return f"{where}no other span attends to a {span.mode} span; drop visible_to_earlier or change the mode"
        if span.cached and i > 0 and not sample[i - 1].cached:
            return f"{where}cached spans are a prefix and must come first, but span {i - 1} is not cached"
    return None


def query_groups(sample: tuple[AttentionSpan, ...]) -> tuple[QueryGroup, ...]:
    """Return the query groups of one sample, in the order of their first rows."""
    ends = _starts([span.length for span in sample])
    skipped = sum(span.length for span in sample if span.cached)  # query rows are numbered without cached ones

    def intervals(spans: Iterable[int]) -> Iterator[Interval]:
        return ((ends[i], ends[i + 1]) for i in spans)

    groups: list[tuple[list[int], set[int], bool]] = []  # own spans, other spans that they attend to, causal
    for i, span in enumerate(sample):
        if span.cached or span.mode == "pad" or span.length == 0:
            continue
        others = {j for j, other in enumerate(sample) if j != i and other.length and _seen(other, j < i)}
        causal = span.mode == "causal"
        for own, seen, own_causal in groups:
            if causal and own_causal and others == seen | set(own):  # a continuation of those rows
                own.append(i)
                break
        else:
            groups.append(([i], others, causal))
    found = []
    for own, others, causal in groups:
        rows = _joined((a - skipped, b - skipped) for a, b in intervals(own))
        keys = _joined([*intervals(sorted(others)), *intervals(own)] if causal else intervals(sorted({*others, *own})))
        found.append(QueryGroup(rows, keys, causal and total(rows) > 1))
    return tuple(found)


def _seen(span: AttentionSpan, before: bool) -> bool:
    """Return whether rows of another span attend to this one; before: it precedes them."""
    return span.mode in ("causal", "full") and (before or span.visible_to_earlier)


def _joined(intervals: Iterable[Interval]) -> tuple[Interval, ...]:
    """Merge adjacent intervals."""
    found: list[Interval] = []
    for start, stop in intervals:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return tuple(found)


def _pieces(rows: int, groups: tuple[QueryGroup, ...]) -> tuple[QueryPiece, ...]:
    pieces, end = [], 0
    for (start, stop), number in sorted((interval, i) for i, group in enumerate(groups) for interval in group.rows):
        if start > end:
            pieces.append(QueryPiece(start - end, -1))
        pieces.append(QueryPiece(stop - start, number))
        end = stop
    if end < rows or not pieces:
        pieces.append(QueryPiece(rows - end, -1))
    return tuple(pieces)


def total(intervals: Iterable[Interval]) -> int:
    return sum(stop - start for start, stop in intervals)


def _pairs(group: QueryGroup) -> int:
    rows, keys = total(group.rows), total(group.keys)
    return rows * keys - (rows * (rows - 1) // 2 if group.causal else 0)


@compiling.disable  # made once, on the host
def _make_calls(plan: AttentionPlan) -> None:
    with no_modes():
        plan._cached_calls.append(_calls(plan))


def _calls(plan: AttentionPlan) -> Calls:
    query_starts, key_starts = _starts(plan.query_sizes), _starts(plan.key_sizes)
    grouped: dict[tuple[bool, int], list[tuple[int, QueryGroup]]] = {}  # call -> its (sample, group)
    for number, sample in enumerate(plan.groups):
        for causal in (False, True):
            # Numbered from the end: the groups with the most keys share a call, which then needs no gather of keys.
            for rank, group in enumerate(reversed([s for s in sample if s.causal == causal])):
                grouped.setdefault((causal, rank), []).append((number, group))

    pads = [
        (key_starts[number] + start, key_starts[number] + start + span.length)
        for number, sample in enumerate(plan.samples)
        for span, start in zip(sample, _starts([span.length for span in sample]), strict=False)
        if span.mode == "pad"
    ]
    unpadded = torch.ones(sum(plan.key_sizes), dtype=torch.bool)
    for start, stop in pads:
        unpadded[start:stop] = False
    place = unpadded.cumsum(0) - 1  # index of a key row among the unpadded ones
    kept = int(unpadded.sum())

    order, calls = [], []
    for (causal, _), members in sorted(grouped.items()):
        rows = _rows((query_starts[number], group.rows) for number, group in members)
        keys = place[_rows((key_starts[number], group.keys) for number, group in members)]
        lengths_q = [total(group.rows) for _, group in members]
        lengths_k = [total(group.keys) for _, group in members]
        order.append(rows)
        calls.append(
            Call(
                rows=len(rows),
                keys=None if _counts_up(keys, kept) else on_device(keys, plan.device),
                cu_q=on_device(torch.tensor(_starts(lengths_q), dtype=torch.int32), plan.device),
                cu_k=on_device(torch.tensor(_starts(lengths_k), dtype=torch.int32), plan.device),
                max_q=max(lengths_q),
                max_k=max(lengths_k),
                causal=causal,
            )
        )
    whole = torch.cat(order) if order else torch.empty(0, dtype=torch.int64)
    return Calls(
        order=None if _counts_up(whole, sum(plan.query_sizes)) else on_device(whole, plan.device),
        unpadded=None if kept == len(unpadded) else on_device(unpadded.nonzero()[:, 0], plan.device),
        calls=tuple(calls),
    )


def _starts(lengths: Sequence[int]) -> list[int]:
    """Return the cumulative sum from 0, [n + 1]."""
    return [0, *itertools.accumulate(lengths)]


def _rows(parts: Iterable[tuple[int, tuple[Interval, ...]]]) -> Tensor:
    """Return the rows of intervals, each list of which is relative to a start, int64."""
    return torch.cat([torch.arange(start + a, start + b) for start, intervals in parts for a, b in intervals])


def _counts_up(index: Tensor, n: int) -> bool:
    """Return whether index is 0, 1, ... n - 1."""
    return len(index) == n and torch.equal(index, torch.arange(n))
