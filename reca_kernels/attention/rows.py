"""Isolate the values of noise and padding rows, including NaN and infinity, from all other rows.

Where such rows are not among the keys of a call (query groups, variable-length calls) they are isolated already. Under
a mask they are not: their weight is 0, and 0 * NaN is NaN; also, the backward pass multiplies the NaN of a noise row's
output by the keys of that row. A hidden span with NaN or infinity is therefore replaced by 0, and its own rows become
NaN.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from reca_kernels import checks, compiling
from reca_kernels.attention.plan import AttentionPlan
from reca_kernels.host import on_device, outside_of_modes


class Hidden(NamedTuple):
    """The noise and padding spans, numbered from 0. All other rows have the number after the last of these."""

    queries: Tensor  # int64 [query rows]: the number of a row's span
    keys: Tensor  # int64 [key rows]: likewise
    padding: Tensor  # bool [spans + 1]: whether a span is padding


@functools.lru_cache(maxsize=32)
def has_hidden(plan: AttentionPlan) -> bool:
    return any(span.mode in ("noise", "pad") for sample in plan.samples for span in sample)


@compiling.disable
@outside_of_modes
def _hidden(plan: AttentionPlan) -> Hidden:
    spans = [span for sample in plan.samples for span in sample]
    hidden = [i for i, span in enumerate(spans) if span.mode in ("noise", "pad")]
    number = torch.full((len(spans),), len(hidden))
    number[hidden] = torch.arange(len(hidden))
    lengths = torch.tensor([span.length for span in spans], dtype=torch.int64)
    asked = torch.tensor([not span.cached for span in spans])
    return Hidden(
        on_device(number[asked].repeat_interleave(lengths[asked]), plan.device),
        on_device(number.repeat_interleave(lengths), plan.device),
        on_device(torch.tensor([spans[i].mode == "pad" for i in hidden] + [False]), plan.device),
    )


def shielded(
    run: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, raw: bool
) -> Tensor:
    """Return run(q, k, v), isolated from NaN and infinity in noise and padding rows."""
    if raw and q.is_cpu and all(map(checks.all_finite, (q, k, v))):
        return run(q, k, v)
    queries, keys, padding = _hidden(plan)
    held = torch.zeros(len(padding), dtype=torch.float32, device=q.device)
    for x in (k, v):
        held = held.index_add(0, keys, (~_finite(x)).float())
    lost = held > 0
    lost = torch.cat((lost[:-1], lost.new_zeros(1)))  # other rows are attended to, so their NaN propagates
    bad_keys = lost[keys]
    bad_queries = lost[queries] | ((queries < len(padding) - 1) & ~_finite(q))
    out = run(_cleared(q, bad_queries), _cleared(k, bad_keys), _cleared(v, bad_keys))
    return out.masked_fill(_along(bad_queries & ~padding[queries], out), torch.nan)


def _finite(x: Tensor) -> Tensor:
    """Return which rows are finite, bool [rows]."""
    return x.detach().isfinite().flatten(-2).all(-1).flatten()


def _along(rows: Tensor, x: Tensor) -> Tensor:
    return rows.view(*x.shape[:-2], 1, 1)


def _cleared(x: Tensor, rows: Tensor) -> Tensor:
    return torch.where(_along(rows, x), 0, x)
