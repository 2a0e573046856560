"""Memory of this machine: all of it, what a process may have within its container or batch job, and what it keeps."""

import contextlib
import ctypes
import os
import platform
from collections.abc import Iterator
from pathlib import Path

MEMINFO, CGROUPS, OWN_CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def total() -> int:
    """Count the bytes of memory of this machine, or of the container or batch job that this process is in."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *(limit for _, limit in _cgroup_limits())])


def available() -> int:
    """Count the bytes that can be had without swapping, files that are kept in memory among them."""
    fields = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
    return min(int(fields["MemAvailable"].split()[0]) << 10, *_cgroup_rests())


class FreedMemory:
    """Lets the C library keep what is freed for the tensors of the next step.

    A step allocates the same large tensors again and again. Memory that comes anew from the kernel is cleared at its
    first touch, page by page, about an eighth of a step on a CPU. A freed block may have become too small by some
    bytes, where a small one that lives on has taken its end: blocks would add up without a limit. So what is free is
    given back every TRIM_EVERY steps, which costs the first touches of one of them.
    """

    TRIM_EVERY = 20  # steps

    def __init__(self) -> None:
        self.kept = False

    def keep(self) -> bool:
        """Begin to keep what is freed. Returns False for a C library that is not glibc, which is left as it is."""
        if platform.libc_ver()[0] == "glibc":
            mallopt = ctypes.CDLL(None).mallopt
            self.kept = bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))
        return self.kept

    def after_step(self, step: int) -> None:
        """Give back what is free, if it is time."""
        if step % self.TRIM_EVERY == 0:
            self.give_back()

    def give_back(self) -> None:
        """Give back what is free, where it is kept."""
        if self.kept:
            ctypes.CDLL(None).malloc_trim(0)


def _cgroup_rests() -> list[int]:
    """List what is left of the limits of this process's cgroups."""
    rests = [1 << 62]
    for group, limit in _cgroup_limits():
        with contextlib.suppress(OSError, ValueError, KeyError):
            used = int((group / "memory.current").read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            rests.append(max(0, limit - used + int(stat["inactive_file"])))
    return rests


def _cgroup_limits() -> Iterator[tuple[Path, int]]:
    """Yield this process's cgroups (version 2) that have a limit, its own and those around it, and the limits."""
    with contextlib.suppress(OSError, StopIteration):
        own = next(line[3:] for line in OWN_CGROUP.read_text().splitlines() if line.startswith("0::"))
        folder = CGROUPS / own.strip("/")
        for group in (folder, *folder.parents):
            if group.is_relative_to(CGROUPS):
                with contextlib.suppress(OSError, ValueError):  # "max"; the root has no limit
                    yield group, int((group / "memory.max").read_text())
