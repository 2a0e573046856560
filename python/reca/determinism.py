"""`train.deterministic`: the same bits in every run on the same machine."""

import contextlib
import logging
import os
from collections.abc import Iterator

import torch

from reca import distributed
from reca.options import RecipeError

log = logging.getLogger("reca")

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACES = (":4096:8", ":16:8")  # those with which cuBLAS adds up in one order (its documentation, 2.1.4)


@contextlib.contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """Let torch run deterministic implementations only inside of this context, and refuse operations without one.

    PyTorch's attention and this package's (reca_kernels.attention) ask torch for it, and take a deterministic gradient.
    cuDNN chooses its algorithms by rule, not by timing. cuBLAS gets its workspace by an environment variable, which is
    read when the first matrix product runs on a GPU.
    Raises RecipeError where the variable has a value that leaves the order of sums open.
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
    """Describe what `deterministic` has set, for the log."""
    text = (
        "deterministic: torch.use_deterministic_algorithms, cuDNN by rule, cuBLAS workspace "
        f"{os.environ.get(CUBLAS)}, attention with a deterministic gradient"
    )
    ranks = distributed.world_size()
    return text if ranks == 1 else f"{text}; the bits are those of {ranks} ranks"
