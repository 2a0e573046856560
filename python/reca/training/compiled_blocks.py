"""torch.compile of a model's blocks (train.compile), in regions that a new layout does not recompile.

Planned attention (models/common/planned.py) is not compiled: a plan describes one layout, so a graph that contained it
would be recompiled for every batch. The rest is compiled for any number of samples and tokens.
"""

import contextlib
import inspect
import os
import re
import tempfile
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._triton import has_triton

from reca.config.recipe import TrainConfig
from reca.data.errors import DataError
from reca.models.base import Adapter
from reca.options.fields import RecipeError

KINDS = 32  # graphs per function: with and without gradient, cache and single samples; at most 6 occurred in practice
_OF_A_DISK = re.compile("No space left on device|Disk quota exceeded|Read-only file system|Permission denied")


def wanted(config: TrainConfig, device: torch.device) -> bool:
    """Tell whether to compile the blocks. The default is to do so on GPUs with Triton, which inductor needs.

    With train.deterministic the default is not to: inductor times kernels that round differently, and picks one.
    """
    if config.compile is None:
        return device.type == "cuda" and has_triton() and not config.deterministic
    return config.compile


def check_usable(config: TrainConfig, device: torch.device) -> None:
    """Raise RecipeError if `train.compile` cannot run: on a CPU inductor needs a C++ compiler."""
    if device.type == "cpu" and wanted(config, device):
        from torch._inductor import cpp_builder, exc

        try:
            cpp_builder.get_cpp_compiler()
        except exc.InvalidCxxCompiler:
            raise RecipeError(
                "train.compile=true needs a C++ compiler on a CPU, and neither g++ nor that of CXX was found: install "
                "one, or set it to false"
            ) from None


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Raise DataError if torch.compile cannot write its files, of which its own errors are only the traceback."""
    try:
        yield
    except RuntimeError as error:
        by_compiler = type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
        if not by_compiler or (reason := _OF_A_DISK.search(str(error))) is None:
            raise
        folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or tempfile.gettempdir()
        raise DataError(
            f"torch.compile cannot write its files to {folder} ({reason[0]}); free space there, set TMPDIR or "
            "TORCHINDUCTOR_CACHE_DIR to a folder with some, or set train.compile=false"
        ) from error


def compile_blocks(adapter: Adapter, backend: str = "inductor") -> None:
    """Compile the encoders for the shapes that occur, and the blocks' forward passes that record gradients.

    Passes without gradients stay eager: in sampling, the KV cache is indexed by layer, so every layer would be
    recompiled until Dynamo reaches its limit. Wrappers that transformers puts around a layer's forward pass are
    removed: all layers share them, so they would be recompiled for each kind of layer.
    """
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, KINDS)
    for block in adapter.blocks():
        forward = _own_forward(block)
        block.forward = _with_a_graph(forward, torch.compile(forward, backend=backend, dynamic=True))

    for encoder in adapter.encoders():
        encoder.forward = torch.compile(_own_forward(encoder), backend=backend)


def _own_forward(module: nn.Module) -> Callable[..., Any]:
    return module.__dict__.get("forward") or types.MethodType(inspect.unwrap(type(module).forward), module)


def _with_a_graph(plain: Callable[..., Any], compiled: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else plain)(*args, **kwargs)

    return forward
