"""MAR's random masking of image tokens."""

from typing import NamedTuple

import torch
from torch import Tensor

from reca_kernels.host import on_device

WIDTH = 0.25  # standard deviation of the truncated normal distribution of the mask ratio, whose mode is 1


class Masking(NamedTuple):
    """The visible and masked tokens of B images of S tokens.

    visible  int64 [B, V]: indices of the visible tokens in raster order; V: the largest number of them
    real     bool [B, V]: False where `visible` is padding; None: no padding
    lengths  number of visible tokens of each image
    hidden   int64 [N]: indices of the masked tokens of all images, in the flattened batch
    """

    visible: Tensor
    real: Tensor | None
    lengths: list[int]
    hidden: Tensor | None = None

    @classmethod
    def of(cls, order: Tensor, counts: Tensor) -> "Masking":  # int64 [B, S], int64 [B]
        """Mask the tokens with order < count. Both arguments are on the host, because counts determine shapes."""
        (batch, size), hide = order.shape, counts.tolist()
        hidden = order < counts[:, None]
        places = torch.arange(size)
        lengths = [size - count for count in hide]
        visible = torch.where(hidden, size, places).sort(dim=1).values[:, : max(lengths, default=0)]
        rows = torch.where(hidden, torch.arange(batch)[:, None] * size + places, batch * size)
        real = visible < size if len(set(lengths)) > 1 else None
        return cls(visible.clamp(max=size - 1), real, lengths, rows.flatten().sort().values[: sum(hide)])

    def to(self, device: torch.device) -> "Masking":
        real, hidden = (x if x is None else on_device(x, device) for x in (self.real, self.hidden))
        return Masking(on_device(self.visible, device), real, self.lengths, hidden)


def masked_counts(uniform: Tensor, size: int, smallest: float) -> Tensor:
    """Compute the number of masked tokens of `size`, int64 [B], with a ratio from normal(1, 0.25) on [smallest, 1].

    uniform: uniform random numbers, [B].
    """
    low = torch.special.ndtr(torch.tensor((smallest - 1) / WIDTH, dtype=torch.float64, device=uniform.device))
    share = 1 + WIDTH * torch.special.ndtri(low + uniform.double() * (0.5 - low))
    return (size * share.clamp(smallest, 1)).ceil().long().clamp(max=size)
