"""Rows that no other row attends to: what stands in them, NaN and infinity too, reaches nothing else.

Where such rows are no keys of a call (segments, variable-length calls) that is so by itself. Under a mask it is not:
their weight is 0, and 0 * NaN is NaN; and a backward pass multiplies what a row of noise has made of its NaN with the
keys that it saw. So rows that hold such a number are taken for 0 with all of their run, and what the run's own rows get
is NaN.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from reca_kernels import checks
from reca_kernels.attention.plan import AttentionPlan
from reca_kernels.host import on_device, outside_of_modes


class Hidden(NamedTuple):
    """Runs of noise and of padding, numbered from 0; the last number, of all other rows, is that of no such run."""

    queries: Tensor  # int64 [query rows]: a row's run
    keys: Tensor  # int64 [key rows]
    padding: Tensor  # bool [runs + 1]


@functools.lru_cache(maxsize=32)
def has_hidden(plan: AttentionPlan) -> bool:
    return any(run.mode in ("noise", "pad") for sample in plan.samples for run in sample)


@torch.compiler.disable
def _hidden(plan: AttentionPlan) -> Hidden:
    return _hidden_of(plan)


@outside_of_modes
def _hidden_of(plan: AttentionPlan) -> Hidden:
    runs = [run for sample in plan.samples for run in sample]
    hidden = [i for i, run in enumerate(runs) if run.mode in ("noise", "pad")]
    number = torch.full((len(runs),), len(hidden))
    number[hidden] = torch.arange(len(hidden))
    lengths = torch.tensor([run.length for run in runs], dtype=torch.int64)
    asked = torch.tensor([not run.cached for run in runs])
    return Hidden(
        on_device(number[asked].repeat_interleave(lengths[asked]), plan.device),
        on_device(number.repeat_interleave(lengths), plan.device),
        on_device(torch.tensor([runs[i].mode == "pad" for i in hidden] + [False]), plan.device),
    )


def shielded(
    run: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, plain: bool
) -> Tensor:
    """run(q, k, v), without what rows hold that no other row attends to."""
    if plain and q.device.type == "cpu" and all(map(checks.all_finite, (q, k, v))):
        return run(q, k, v)
    queries, keys, padding = _hidden(plan)
    held = torch.zeros(len(padding), dtype=torch.float32, device=q.device)
    for x in (k, v):
        held = held.index_add(0, keys, (~_finite(x)).float())
    lost = held > 0
    lost = torch.cat((lost[:-1], lost.new_zeros(1)))  # other rows are seen, and what they hold is
    bad_keys = lost[keys]
    bad_queries = lost[queries] | ((queries < len(padding) - 1) & ~_finite(q))
    out = run(_cleared(q, bad_queries), _cleared(k, bad_keys), _cleared(v, bad_keys))
    return out.masked_fill(_along(bad_queries & ~padding[queries], out), torch.nan)


def _finite(x: Tensor) -> Tensor:
    """bool [rows]"""
    return x.detach().isfinite().flatten(-2).all(-1).flatten()


def _along(rows: Tensor, x: Tensor) -> Tensor:
    return rows.view(*x.shape[:-2], 1, 1)


def _cleared(x: Tensor, rows: Tensor) -> Tensor:
    return torch.where(_along(rows, x), 0, x)
