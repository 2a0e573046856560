"""`train.deterministic`: bit-identical runs on the same machine."""

import contextlib
import logging
import os
from collections.abc import Iterator

import torch

from reca import distributed
from reca.options.fields import RecipeError

log = logging.getLogger("reca")

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACES = (":4096:8", ":16:8")  # settings with which cuBLAS is deterministic (its documentation, 2.1.4)


@contextlib.contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """Use only deterministic implementations inside this context; an operation without one raises RuntimeError.

    PyTorch's attention and reca_kernels.attention follow torch's setting and use a deterministic backward pass. cuDNN
    selects algorithms without timing them. cuBLAS reads its workspace setting from an environment variable when the
    first matrix product runs on a GPU.
    Raises RecipeError if that variable has a value with which cuBLAS is not deterministic.
    """
    if not on:
        yield
        return
    if os.environ.setdefault(CUBLAS, WORKSPACES[0]) not in WORKSPACES:
        raise RecipeError(
            f"train.deterministic=true needs {CUBLAS}={' or '.join(WORKSPACES)}, and it is {os.environ[CUBLAS]!r}: "
            "unset it, or set one of these"
        )
    cudnn = torch.backends.cudnn
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        cudnn.deterministic,
        cudnn.benchmark,
    )
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark = before[2:]


def describe() -> str:
    """Describe the settings of `deterministic`, for the log."""
    text = (
        "deterministic: torch.use_deterministic_algorithms, cuDNN without autotuning, cuBLAS workspace "
        f"{os.environ.get(CUBLAS)}, attention with a deterministic backward pass"
    )
    ranks = distributed.world_size()
    return text if ranks == 1 else f"{text}; bit-identical only with {ranks} ranks"
