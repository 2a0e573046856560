"""Limits of the control groups (cgroups) that this process runs in, such as those of a container or a batch job."""

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

ROOT, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
MEMORY = {  # by version: files of the limit and of what is used, and the line of memory.stat with reclaimable cache
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def groups(controller: str) -> Iterator[tuple[Path, int]]:
    """Yield the cgroups of this process that may limit it, innermost first, each with the version of its files.

    A container may see them under other paths than those that the system names; some of the paths do not exist then.
    """
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = OWN.read_text().splitlines()
    for _, controllers, own in (line.split(":", 2) for line in lines):
        if not controllers:
            root, version = ROOT, 2
        elif controller in controllers.split(","):
            root, version = ROOT / controller, 1
        else:
            continue
        folder = root / own.strip("/")
        yield from ((group, version) for group in (folder, *folder.parents) if group.is_relative_to(root))


def memory_limits() -> Iterator[tuple[int, int]]:
    """Yield the limit in bytes of every cgroup that has one, with what is left below it and reclaimable cache."""
    for group, version in groups("memory"):
        limit_file, used_file, cache = MEMORY[version]
        with contextlib.suppress(OSError, ValueError, KeyError):  # "max" is no limit, and the root has no such file
            limit = rest = int((group / limit_file).read_text())
            with contextlib.suppress(OSError, ValueError, KeyError):
                used = int((group / used_file).read_text())
                stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                rest = max(0, limit - used + int(stat[cache]))
            yield limit, rest


def cpus() -> int:
    """Count the CPUs that this process may use: those of its affinity, or fewer by its quota of time, rounded up."""
    counts = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    for group, version in groups("cpu"):
        with contextlib.suppress(OSError, ValueError):  # "max" is no quota, and neither is -1 of version 1
            files = ("cpu.max",) if version == 2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            quota, period = map(int, " ".join((group / name).read_text() for name in files).split())
            if quota > 0:
                counts.append(math.ceil(quota / period))
    return min(counts)
