"""The compiled module, when it is there. Without it every op still runs, on `reference` or `triton`."""

from types import ModuleType

import torch
from torch import Tensor

try:
    from reca_kernels import _native

    module: ModuleType | None = _native
    missing: str | None = None
except ImportError as error:
    module = None
    missing = f"the native module did not load ({error}); install a C++ compiler and reinstall with RECA_NATIVE=ON"

# csrc/include/reca/types.h
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def launch(tensor: Tensor) -> tuple[int, int]:
    """The tensor's device and its current stream, as numbers: the last two arguments of every CUDA launcher."""
    return tensor.get_device(), torch.cuda.current_stream(tensor.device).cuda_stream


def cuda_runs_on(capability: tuple[int, int]) -> bool:
    """Whether the module holds machine code, or PTX, for a device of this compute capability."""
    archs = module.cuda_archs.split() if module else []
    for arch in archs:
        number = int(arch.removesuffix("-real"))
        major, minor = divmod(number, 10)
        if major == capability[0] and minor <= capability[1]:
            return True
        if not arch.endswith("-real") and (major, minor) <= capability:
            return True
    return False
