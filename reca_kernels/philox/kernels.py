"""The functions of a backend of philox."""

from typing import Protocol

from torch import Tensor

from reca_kernels.philox.address import Philox

DISTRIBUTIONS = {"bits": 0, "uniform": 1, "normal": 2}  # name -> number in kernels (csrc/common/philox.h)


class Kernels(Protocol):
    def draw(
        self,
        noise: Philox,
        distribution: str,  # "bits" (uint32 words), "uniform" or "normal"
        out: Tensor,  # fp32 [B, n]
    ) -> None:
        """Fill out."""
