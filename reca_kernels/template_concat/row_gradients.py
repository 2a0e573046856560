"""Sort positions by the row of a table that they used: the order in which GPUs sum that row's gradient.

The gradient of row k is a sum over the positions that used it, in their order, taken in chunks of CHUNK: each chunk is
summed in order, in fp32, then the chunks' sums are, in order. So a row used 10,000 times is summed by 157 workers at
once, no atomic addition decides the order, and the bits of a row depend on that row's positions alone.
"""

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 64


class ByRow(NamedTuple):
    """The positions of row k are places[starts[k] : starts[k + 1]]."""

    rows: Tensor  # [T] ascending: below 0 before starts[0], those that the table does not have from starts[K] on
    places: Tensor  # int64 [T], the position of each
    starts: Tensor  # int64 [K + 1]


def by_row(
    index: Tensor,  # [T] int32 or int64
    negated: bool,  # the row is -1 - index
    count: int,  # K
) -> ByRow:
    """Sort positions by row, on the index's device and without waiting for it."""
    rows, places = (~index if negated else index).sort(stable=True)  # ~i is -1 - i
    starts = torch.searchsorted(rows, torch.arange(count + 1, dtype=rows.dtype, device=rows.device))
    return ByRow(rows, places, starts)


def mostly_once(index: Tensor, negated: bool, count: int) -> bool:
    """Return whether to expect each row at no more than one position, as with visual rows: a map replaces the sorting.

    Decided by sizes alone, since the values are on the device.
    """
    return negated and 8 * count >= index.shape[0]


def workspace(length: int, width: int, device: torch.device) -> Tensor:  # fp32 [slots, D]
    """Allocate the sums of chunks, two per CHUNK positions; none where no row can have more than one chunk."""
    slots = 2 * -(-length // CHUNK) if length > CHUNK else 0
    return torch.empty(slots, width, dtype=torch.float32, device=device)
