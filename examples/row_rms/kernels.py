"""What a backend of row_rms holds."""

from typing import Protocol

from torch import Tensor


class Kernels(Protocol):
    def forward(self, x: Tensor, out: Tensor) -> None:
        """Fill out, fp32 [N], for x [N, D]."""
