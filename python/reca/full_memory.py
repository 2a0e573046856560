"""How errors say that memory is full: of a GPU, by whatever library asked for it, or of the host."""

import torch

KINDS = (RuntimeError, MemoryError)
# What a RuntimeError says that is no torch.OutOfMemoryError: cuBLAS, cuDNN, CUDA itself, and the allocator of a CPU.
WORDS = (
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "can't allocate memory",
    "not enough memory",
)


def is_memory_full(error: BaseException) -> bool:
    """Tell whether an error means that memory is full.

    False for one of this package that quotes such an error, with advice of its own.
    """
    if getattr(error, "exit_code", None) is not None:
        return False
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS)
