"""Detection of out-of-memory errors: of a GPU, raised by any library, or of the host."""

import torch

KINDS = (RuntimeError, MemoryError)
# Messages of RuntimeErrors other than torch.OutOfMemoryError: from cuBLAS, cuDNN, CUDA itself, and the CPU allocator.
WORDS = (
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "can't allocate memory",
    "not enough memory",
)


def is_memory_full(error: BaseException) -> bool:
    """Tell whether an error means that memory is exhausted.

    False for an error of this package that quotes such an error and has its own advice.
    """
    if getattr(error, "exit_code", None) is not None:
        return False
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS)
