"""Host memory: its size and what is free, within the limits of a container or batch job, and reuse of freed memory."""

import ctypes
import mmap
import os
import platform
from pathlib import Path

from reca.hardware import cgroups
from reca.io.paths import exists

MEMINFO = Path("/proc/meminfo")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def total() -> int:
    """Return the bytes of memory of this machine, or of the container or batch job that this process runs in."""
    machine = mmap.PAGESIZE * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *(limit for limit, _ in cgroups.memory_limits())])


def available() -> int:
    """Return the bytes that are available without swapping, including reclaimable file cache.

    Only Linux reports them; on other systems, return an upper bound: all memory.
    """
    if not exists(MEMINFO):
        return total()
    fields = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
    return min([int(fields["MemAvailable"].split()[0]) << 10, *(rest for _, rest in cgroups.memory_limits())])


class FreedMemory:
    """Makes the C library keep freed memory for the tensors of the next step.

    Every step allocates the same large tensors. The kernel clears new memory page by page on first access, which takes
    about an eighth of a step on a CPU. But kept memory fragments: if a small, long-lived allocation takes the end of a
    freed block, the block is too small for the same tensor, and memory would grow without limit. So free memory is
    returned to the system every TRIM_EVERY steps, which costs the page faults of one step.
    """

    TRIM_EVERY = 20  # steps

    def __init__(self) -> None:
        self.kept = False

    def keep(self) -> bool:
        """Begin to keep freed memory. Return False for a C library other than glibc, which is left unchanged."""
        if platform.libc_ver()[0] == "glibc":
            mallopt = ctypes.CDLL(None).mallopt
            self.kept = bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))
        return self.kept

    def after_step(self, step: int) -> None:
        """Return free memory to the system every TRIM_EVERY steps."""
        if step % self.TRIM_EVERY == 0:
            self.give_back()

    def give_back(self) -> None:
        """Return free memory to the system, if it is kept."""
        if self.kept:
            ctypes.CDLL(None).malloc_trim(0)
