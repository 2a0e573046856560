"""Counter-based random numbers in C++ and CUDA: csrc/philox."""

from torch import Tensor

from reca_kernels import native
from reca_kernels.philox.address import Philox
from reca_kernels.philox.kernels import DISTRIBUTIONS


def draw(noise: Philox, distribution: str, out: Tensor) -> None:
    native.kernels().philox_fill(
        address(noise), *out.shape, DISTRIBUTIONS[distribution], out.data_ptr(), native.launch(out)
    )


def address(noise: Philox | Tensor) -> tuple[int, int, int]:
    """Return a NoiseAddress: the addresses of seed and sample ids, and the stream; zeros for explicit noise."""
    if isinstance(noise, Tensor):
        return 0, 0, 0
    return noise.seed.data_ptr(), noise.sample_ids.data_ptr(), noise.stream


def explicit(noise: Philox | Tensor) -> Tensor | None:
    """Return explicit noise in fp32; None for an address."""
    return noise.float() if isinstance(noise, Tensor) else None
