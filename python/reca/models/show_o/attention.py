"""What the rows of a sequence may see, as a list of runs."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor


class Run(NamedTuple):
    """Rows that follow one rule. All see the runs before them.

    mode         causal: and own rows up to themselves; full: and their whole run; pad: themselves, and nobody sees them
    seen_before  the rows of earlier runs see this run too
    """

    length: int
    mode: str
    seen_before: bool = False


@functools.lru_cache(maxsize=64)
def dense(runs: tuple[Run, ...]) -> Tensor:
    """bool [L, L]: row (query) sees column (key)."""
    length = sum(run.length for run in runs)
    allowed = torch.ones(length, length, dtype=torch.bool).tril()
    pads = torch.zeros(length, dtype=torch.bool)
    start = 0
    for run in runs:
        rows = slice(start, start + run.length)
        if run.mode == "full":
            allowed[rows, rows] = True
        if run.seen_before:
            allowed[:start, rows] = True
        pads[rows] = run.mode == "pad"
        start += run.length
    return allowed & ~pads & ~pads[:, None] | torch.diag(pads)
