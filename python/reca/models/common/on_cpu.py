"""Tell whether a model runs on a CPU, where skipping work can be faster although on a GPU it is not."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from torch import Tensor

_AS_GPU = ContextVar("_AS_GPU", default=False)


def on_cpu(x: Tensor) -> bool:
    """Tell whether operations on a tensor run on a CPU."""
    return x.device.type == "cpu" and not _AS_GPU.get()


@contextlib.contextmanager
def as_gpu() -> Iterator[None]:
    """Treat CPU tensors as GPU tensors, to count a GPU's FLOPs and memory with fake tensors."""
    token = _AS_GPU.set(True)
    try:
        yield
    finally:
        _AS_GPU.reset(token)
