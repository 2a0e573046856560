"""The C library's allocator, set for training on a CPU."""

import ctypes
import os
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Let glibc keep the memory of freed tensors for the next ones, instead of returning it to the kernel.

    A training step allocates the same tensors again and again. By default glibc maps each large one anew, and the
    kernel zeroes its pages at the first touch. It is a setting of the whole process, so programs call it, not
    libraries. Does nothing without glibc, or where the environment has settings of malloc (MALLOC_*, GLIBC_TUNABLES).

    Returns whether it was set.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    library = ctypes.CDLL(None)
    return bool(library.mallopt(M_MMAP_MAX, 0) and library.mallopt(M_TRIM_THRESHOLD, -1))
