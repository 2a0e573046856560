"""Sort positions by the table row that they used: the order in which GPUs sum the gradient of a row.

The gradient of row k is a sum over the positions that used it, in chunks of CHUNK positions. Each chunk is summed in
order, in fp32; then the chunk sums are added in order. So a row used 10,000 times is summed by 157 programs in parallel
without atomic additions, and the result is deterministic and depends on the positions of that row only.
"""

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 64


class ByRow(NamedTuple):
    """The positions of row k are places[starts[k] : starts[k + 1]]."""

    rows: Tensor  # [T] ascending: negative before starts[0], beyond the table from starts[K] on
    places: Tensor  # int64 [T], the positions of these rows
    starts: Tensor  # int64 [K + 1]


def by_row(
    index: Tensor,  # [T] int32 or int64
    negated: bool,  # the row is -1 - index
    count: int,  # K
) -> ByRow:
    """Sort positions by row, on the index's device, without host synchronisation."""
    rows, places = (~index if negated else index).sort(stable=True)  # ~i is -1 - i
    starts = torch.searchsorted(rows, torch.arange(count + 1, dtype=rows.dtype, device=rows.device))
    return ByRow(rows, places, starts)


def mostly_once(index: Tensor, negated: bool, count: int) -> bool:
    """Return whether most rows are expected at one position at most, as visual rows are. A map then replaces sorting.

    The decision depends on sizes only, because the values are on the device.
    """
    return negated and 8 * count >= index.shape[0]


def workspace(length: int, width: int, device: torch.device) -> Tensor:  # fp32 [slots, D]
    """Allocate the chunk sums, two slots per CHUNK positions; none if no row can have more than one chunk."""
    slots = 2 * -(-length // CHUNK) if length > CHUNK else 0
    return torch.empty(slots, width, dtype=torch.float32, device=device)
