"""Counter-based random numbers on CUDA devices: csrc/cuda/philox.cu."""

from torch import Tensor

from reca_kernels import native
from reca_kernels.cpu.philox import LAWS
from reca_kernels.ops.philox import Philox


def draw(noise: Philox, law: str, out: Tensor) -> None:
    native.module.cuda.philox_fill(*address(noise), *out.shape, LAWS[law], out.data_ptr(), *native.launch(out))


def address(noise: Philox) -> tuple[int, int, int]:
    return noise.seed.data_ptr(), noise.sample_ids.data_ptr(), noise.stream
