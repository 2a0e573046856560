"""The functions of a backend of row_rms."""

from typing import Protocol

from torch import Tensor


class Kernels(Protocol):
    def forward(self, x: Tensor, out: Tensor) -> None:
        """Write the root mean squares of x [N, D] into out, fp32 [N]."""
