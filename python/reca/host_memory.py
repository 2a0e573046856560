"""Memory of this machine: all of it, and what a process may have within the limits of its container or batch job."""

import contextlib
import os
from pathlib import Path

MEMINFO, CGROUPS, OWN_CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def total() -> int:
    """Count the bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available() -> int:
    """Count the bytes that can be had without swapping, files that are kept in memory among them."""
    fields = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
    return min(int(fields["MemAvailable"].split()[0]) << 10, *_cgroup_rests())


def _cgroup_rests() -> list[int]:
    """List what is left of the limits of this process's cgroups (version 2): its own, and those around it."""
    rests = [1 << 62]
    with contextlib.suppress(OSError, ValueError, StopIteration):
        own = next(line[3:] for line in OWN_CGROUP.read_text().splitlines() if line.startswith("0::"))
        folder = CGROUPS / own.strip("/")
        for group in (folder, *folder.parents):
            if not group.is_relative_to(CGROUPS):
                break
            with contextlib.suppress(OSError, ValueError, KeyError):  # "max"; the root has no limit
                limit = int((group / "memory.max").read_text())
                used = int((group / "memory.current").read_text())
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                rests.append(max(0, limit - used + int(stat["inactive_file"])))
    return rests
