"""Memory of freed tensors stays with the process."""

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc only")

# Counts the pages that the kernel gives for a tensor of 64 MiB after others of that size were freed: the least of some
# turns, as a small block that comes to lie in the freed space moves the next tensor once.
FAULTS = """
import resource, torch
from reca.allocator import keep_freed_memory
print(keep_freed_memory() if {keep} else False)
faults = []
for turn in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults[1:]))
"""


def run(keep: bool, **environment: str) -> tuple[str, int]:
    others = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS.format(keep=keep)],
        capture_output=True, text=True, check=True, env=others | environment | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    answer, faults = done.stdout.split()
    return answer, int(faults)


def test_a_second_tensor_takes_the_pages_of_the_first():
    answer, faults = run(keep=True)
    assert answer == "True"
    assert faults < 16
    assert run(keep=False)[1] >= 32  # pages of 2 MiB; 16384 where they are of 4 KiB


def test_settings_of_the_user_stay():
    assert run(keep=True, MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"
