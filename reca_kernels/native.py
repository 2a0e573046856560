"""The compiled module, if it is available. Without it every op still runs, on `reference` or `triton`.

A launcher of the module takes tensors as addresses, structs as tuples of their fields (csrc/<op>/op.h) and, as its last
argument, a Launch. The caller keeps the tensors alive until the launcher returns.
"""

import hashlib
import importlib
import re
import warnings
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
# Otherwise pip keeps the installed package, or installs the wheel it once built, whatever this machine has now.
REINSTALL = "reinstall with pip's --force-reinstall --no-deps --no-cache-dir and"


def _sources() -> str:
    """Compute the SHA-256 of the sources as CMakeLists.txt does. Return "" if the package has no sources with it."""
    found = [path for kind in ("*.cpp", "*.cu", "*.h", "*.cuh") for path in (ROOT / "csrc").rglob(kind)]
    if not found or not (ROOT / "CMakeLists.txt").is_file():
        return ""
    paths = [ROOT / "CMakeLists.txt", *sorted(found, key=Path.as_posix)]
    digests = "".join(hashlib.sha256(path.read_bytes()).hexdigest() for path in paths)
    return hashlib.sha256(digests.encode()).hexdigest()


module: ModuleType | None
try:
    module, missing = importlib.import_module("reca_kernels._native"), ""
except ImportError as error:
    module = None
    missing = f"the native module did not load ({error}); install a C++ compiler and {REINSTALL} RECA_NATIVE=ON"
if module and (expected := _sources()) and getattr(module, "sources", "") != expected:
    missing = (
        f"{module.__file__} was built from other sources than those in {ROOT / 'csrc'}; "
        f"rebuild it: pip install -e {ROOT}"
    )
    module = None
    warnings.warn(f"{missing}. Until then CPUs run the slow PyTorch reference", RuntimeWarning, stacklevel=2)

# csrc/common/types.h
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def kernels() -> ModuleType:
    """Return the compiled module. Raise RuntimeError, with instructions to build it, if it is missing."""
    if module is None:
        raise RuntimeError(missing)
    return module


class Launch(NamedTuple):
    """Where a launcher runs: on the host with `threads` threads, or on a CUDA device in `stream`."""

    device: int  # -1: the host
    stream: int
    threads: int

    @property
    def on_host(self) -> bool:
        return self.device < 0


def launch(tensor: Tensor) -> Launch:
    """Return the tensor's device and its current stream, or the host and torch's number of threads."""
    if tensor.is_cuda:
        return Launch(tensor.get_device(), torch.cuda.current_stream(tensor.device).cuda_stream, 0)
    return Launch(-1, 0, torch.get_num_threads())


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def cuda_runs_on(capability: tuple[int, int]) -> bool:
    """Return whether the module contains machine code or PTX for a device of this compute capability.

    Code for 90a runs on 9.0 only, and code for 100f on 10.x only; their PTX is no more portable.
    """
    built = module.cuda_archs if module else ""
    for number, only, real in re.findall(r"(\d+)([af]?)(-real)?", built):
        major, minor = divmod(int(number), 10)
        same_major = major == capability[0] and minor <= capability[1]
        if (major, minor) == capability or (same_major and only != "a"):
            return True
        if not (only or real) and (major, minor) <= capability:  # PTX
            return True
    return False
