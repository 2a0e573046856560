"""Counter-based random numbers on CUDA devices: csrc/cuda/philox.cu."""

from torch import Tensor

from reca_kernels import native
from reca_kernels.philox.address import Philox
from reca_kernels.philox.cpu import LAWS


def draw(noise: Philox, law: str, out: Tensor) -> None:
    native.module.cuda.philox_fill(*address(noise)[:3], *out.shape, LAWS[law], out.data_ptr(), *native.launch(out))


def address(noise: Philox | Tensor) -> tuple[int, int, int, int]:
    """Addresses of seed and sample ids, stream, address of given noise (fp32). The tensors must outlive the call."""
    if isinstance(noise, Tensor):
        return 0, 0, 0, noise.data_ptr()
    return noise.seed.data_ptr(), noise.sample_ids.data_ptr(), noise.stream, 0
