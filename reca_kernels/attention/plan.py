"""Which rows of a batch see which, and that as a few calls of FlashAttention. Host side; a dense mask is never made.

Every row of the four models sees whole runs of other rows and, of its own run, everything or what is not behind it. So
rows group into segments that see the same keys: a full segment is attention without a mask, a causal one is aligned
bottom-right (its last row sees its last key). The segments of all samples make a few variable-length calls. Every row
is in exactly one of them, so no results are merged.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from reca_kernels.host import in_mode, no_modes, on_device

MODES = ("causal", "full", "noise", "pad")

Span = tuple[int, int]  # [start, stop)


class AttentionSpan(NamedTuple):
    """Rows of a sample that follow one rule. They see all runs before them, except noise and padding.

    mode         causal: and of their own run the rows up to themselves
                 full:   and their whole run
                 noise:  as full, and no other run sees this one (the noised target of BAGEL)
                 pad:    nothing; nobody sees them, their output is 0
    visible_to_earlier  rows of earlier runs see this run too (the CLIP features of Show-o)
    cached       the run has keys and values but no queries: a prefix that was computed before. Such runs come first.
    """

    length: int
    mode: str = "causal"
    visible_to_earlier: bool = False
    cached: bool = False


class Segment(NamedTuple):
    """Rows of one sample that see the same keys. Both in rows of the sample; causal: the last row sees the last key."""

    rows: tuple[Span, ...]
    keys: tuple[Span, ...]
    causal: bool


class Cut(NamedTuple):
    """The next rows of a sample, and the number of the segment that they belong to; -1: padding."""

    length: int
    segment: int


class Call(NamedTuple):
    """One variable-length attention call over segments of several samples.

    rows     number of its query rows
    keys     int64 [sum of keys]: which of the unpadded key rows it reads; None: all of them, in order
    cu_q     int32 [n + 1]: running sum of query rows per segment; cu_k likewise of keys
    max_q    query rows of the longest segment; max_k likewise of keys
    """

    rows: int
    keys: Tensor | None
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    causal: bool


class Calls(NamedTuple):
    """order: int64, the query row at each place of the calls, one call after another; None: all rows, in order.
    unpadded: int64, key rows without padding; None: there is no padding."""

    order: Tensor | None
    unpadded: Tensor | None
    calls: tuple[Call, ...]


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """What the rows of B samples see, and where its index tensors live. Made by `attention_plan`.

    samples       per sample its runs; rows are counted through them, samples one after another or one per line
    query_sizes   per sample its query rows: those of runs that are not cached, padding included
    key_sizes     per sample its key rows: those of all runs
    segments      per sample, what `Segment` says
    cuts          per sample, its query rows in order
    pairs         pairs (row, key) that see each other; a forward pass takes 4 * heads * head_dim * pairs FLOPs
    alike         all samples have the same sizes and segments, so one call per segment serves the whole batch
    """

    samples: tuple[tuple[AttentionSpan, ...], ...]
    device: torch.device
    query_sizes: tuple[int, ...]
    key_sizes: tuple[int, ...]
    segments: tuple[tuple[Segment, ...], ...]
    cuts: tuple[tuple[Cut, ...], ...]
    pairs: int
    alike: bool
    made: list["Calls"] = field(default_factory=list, repr=False)

    def to(self, device: torch.device | str) -> "AttentionPlan":
        return attention_plan(self.samples, device=device)

    @property
    def cached_sizes(self) -> tuple[int, ...]:
        return tuple(k - q for k, q in zip(self.key_sizes, self.query_sizes, strict=True))

    @property
    def calls(self) -> "Calls":
        """Made when first needed, on GPUs with the plan, so that a compiled step finds them."""
        if not self.made:
            _make_calls(self)
        return in_mode(self.made[0])


def attention_plan(samples: Iterable[Sequence[AttentionSpan]], *, device: torch.device | str = "cpu") -> AttentionPlan:
    """Plan the attention of samples made of runs. Plans are kept: the same layout costs nothing the next time.

    device  where q, k and v will be

    Raises ValueError for a run that contradicts itself.
    """
    return _plan(tuple(tuple(sample) for sample in samples), torch.device(device))


@functools.lru_cache(maxsize=32)
def _plan(samples: tuple[tuple[AttentionSpan, ...], ...], device: torch.device) -> AttentionPlan:
    for number, sample in enumerate(samples):
        if problem := _problem(sample):
            raise ValueError(f"attention_plan: sample {number}, {problem}")
    query_sizes = tuple(sum(run.length for run in sample if not run.cached) for sample in samples)
    key_sizes = tuple(sum(run.length for run in sample) for sample in samples)
    found = tuple(segments(sample) for sample in samples)
    pairs = sum(_pairs(segment) for sample in found for segment in sample)
    alike = len(set(zip(query_sizes, key_sizes, found, strict=True))) == 1
    cuts = tuple(_cuts(*one) for one in zip(query_sizes, found, strict=True))
    plan = AttentionPlan(samples, device, query_sizes, key_sizes, found, cuts, pairs, alike)
    if device.type == "cuda":
        _make_calls(plan)
    return plan


def _problem(sample: tuple[AttentionSpan, ...]) -> str | None:
    for i, run in enumerate(sample):
        where = f"run {i}: "
        if run.mode not in MODES:
            return f"{where}mode must be one of {', '.join(MODES)}, got {run.mode!r}"
        if run.length < 0:
            return f"{where}length must be 0 or more, got {run.length}"
        if run.visible_to_earlier and run.mode in ("noise", "pad"):
            return f"{where}a {run.mode} run is seen by no other run; drop visible_to_earlier or change the mode"
        if run.cached and i > 0 and not sample[i - 1].cached:
            return f"{where}cached runs are a prefix and must come first, but run {i - 1} is not cached"
    return None


@functools.lru_cache(maxsize=4096)
def segments(sample: tuple[AttentionSpan, ...]) -> tuple[Segment, ...]:
    """The segments of one sample, in the order of their first rows."""
    ends = [0]
    for run in sample:
        ends.append(ends[-1] + run.length)
    skipped = sum(run.length for run in sample if run.cached)  # query rows are counted without cached ones

    def spans(runs: Iterable[int]) -> Iterator[Span]:
        return ((ends[i], ends[i + 1]) for i in runs)

    groups: list[tuple[list[int], set[int], bool]] = []  # own runs, other runs that they see, causal
    for i, run in enumerate(sample):
        if run.cached or run.mode == "pad" or run.length == 0:
            continue
        others = {j for j, other in enumerate(sample) if j != i and other.length and _seen(other, j < i)}
        causal = run.mode == "causal"
        for own, seen, own_causal in groups:
            if causal and own_causal and others == seen | set(own):  # continues those rows
                own.append(i)
                break
        else:
            groups.append(([i], others, causal))
    found = []
    for own, others, causal in groups:
        rows = _joined((a - skipped, b - skipped) for a, b in spans(own))
        keys = _joined([*spans(sorted(others)), *spans(own)] if causal else spans(sorted({*others, *own})))
        found.append(Segment(rows, keys, causal and total(rows) > 1))
    return tuple(found)


def _seen(run: AttentionSpan, before: bool) -> bool:
    """Whether rows of another run see this one; before: it stands before them."""
    return run.mode in ("causal", "full") and (before or run.visible_to_earlier)


def _joined(spans: Iterable[Span]) -> tuple[Span, ...]:
    """The same rows in the same order in fewer spans."""
    found: list[Span] = []
    for start, stop in spans:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return tuple(found)


def _cuts(rows: int, segments: tuple[Segment, ...]) -> tuple[Cut, ...]:
    cuts, end = [], 0
    for (start, stop), number in sorted((span, i) for i, segment in enumerate(segments) for span in segment.rows):
        if start > end:
            cuts.append(Cut(start - end, -1))
        cuts.append(Cut(stop - start, number))
        end = stop
    if end < rows or not cuts:
        cuts.append(Cut(rows - end, -1))
    return tuple(cuts)


def total(spans: Iterable[Span]) -> int:
    return sum(stop - start for start, stop in spans)


def _pairs(segment: Segment) -> int:
    rows, keys = total(segment.rows), total(segment.keys)
    return rows * keys - (rows * (rows - 1) // 2 if segment.causal else 0)


@torch.compiler.disable  # made once, on the host
def _make_calls(plan: AttentionPlan) -> None:
    with no_modes():
        plan.made.append(_calls(plan))


def _calls(plan: AttentionPlan) -> Calls:
    query_starts, key_starts = _starts(plan.query_sizes), _starts(plan.key_sizes)
    grouped: dict[tuple[bool, int], list[int]] = {}  # call -> its (sample, segment)
    for number, sample in enumerate(plan.segments):
        for causal in (False, True):
            # Counted from the end: the segments that see most share a call, which then needs no gathered keys.
            for rank, segment in enumerate(reversed([s for s in sample if s.causal == causal])):
                grouped.setdefault((causal, rank), []).append((number, segment))

    pads = [
        (key_starts[number] + start, key_starts[number] + start + run.length)
        for number, sample in enumerate(plan.samples)
        for run, start in zip(sample, _starts([run.length for run in sample]), strict=False)
        if run.mode == "pad"
    ]
    unpadded = torch.ones(sum(plan.key_sizes), dtype=torch.bool)
    for start, stop in pads:
        unpadded[start:stop] = False
    place = unpadded.cumsum(0) - 1  # of a key row among the unpadded ones
    kept = int(unpadded.sum())

    order, calls = [], []
    for (causal, _), members in sorted(grouped.items()):
        rows = _rows((query_starts[number], segment.rows) for number, segment in members)
        keys = place[_rows((key_starts[number], segment.keys) for number, segment in members)]
        lengths_q = [total(segment.rows) for _, segment in members]
        lengths_k = [total(segment.keys) for _, segment in members]
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
    """Running sum, [n + 1]."""
    found = [0]
    for length in lengths:
        found.append(found[-1] + length)
    return found


def _rows(parts: Iterable[tuple[int, tuple[Span, ...]]]) -> Tensor:
    """int64: the rows of spans that are counted from a start each."""
    return torch.cat([torch.arange(start + a, start + b) for start, spans in parts for a, b in spans])


def _counts_up(index: Tensor, n: int) -> bool:
    """Whether it is 0, 1, ... n - 1."""
    return len(index) == n and torch.equal(index, torch.arange(n))
