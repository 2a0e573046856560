"""Whether a model computes on a CPU, where it may leave out what costs a GPU less than leaving it out."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from torch import Tensor

_AS_GPU = ContextVar("_AS_GPU", default=False)


def on_cpu(x: Tensor) -> bool:
    """Tell whether what is made of a tensor is computed on a CPU."""
    return x.device.type == "cpu" and not _AS_GPU.get()


@contextlib.contextmanager
def as_gpu() -> Iterator[None]:
    """Take tensors of a CPU, which have no memory, for a GPU's: a GPU's FLOPs and memory are counted with them."""
    token = _AS_GPU.set(True)
    try:
        yield
    finally:
        _AS_GPU.reset(token)
