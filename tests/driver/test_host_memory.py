"""What the C library does with freed memory."""

import platform
import subprocess
import sys
import textwrap

import pytest

from reca.hardware.host_memory import FreedMemory
from reca.trainer import Trainer
from tests.driver.toy import ToyAdapter

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")

START = """
    import ctypes, resource, sys
    from reca.hardware.host_memory import FreedMemory

    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.aligned_alloc.restype, libc.aligned_alloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t] * 2
    freed = FreedMemory()
    if sys.argv[1] == "keep":
        assert freed.keep()
"""

# Prints the page faults of filling 64 MiB for the second time.
FAULTS = """
    def fill():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        memory = libc.malloc(64 << 20)
        ctypes.memset(memory, 1, 64 << 20)
        libc.free(memory)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    fill()
    print(fill())
"""

# Prints the most MiB that came on top while a tensor of 16 MiB came and went with each step, and small ones stayed.
GROWTH = """
    import torch

    def resident():
        return int(open("/proc/self/statm").read().split()[1]) >> 8

    before, most, stay = resident(), 0, []
    for step in range(1, 61):
        tensor = torch.ones(4 << 20)
        stay += [bytes(3000) for _ in range(50)] + [torch.ones(20000)]
        del tensor
        stay.append(bytes(2000))
        freed.after_step(step)
        most = max(most, resident() - before)
    print(most)
"""


def run(program: str, how: str) -> int:
    command = [sys.executable, "-c", textwrap.dedent(START + program), how]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_freed_memory_is_used_again_without_page_faults():
    assert run(FAULTS, "give back") > 32  # 16,384 of 4 KiB, or 32 of 2 MiB
    assert run(FAULTS, "keep") < 16


def test_kept_memory_does_not_grow_without_end():
    if run(GROWTH.replace("freed.after_step(step)", ""), "keep") <= 600:
        pytest.skip("memory that is kept does not grow here, with nothing done about it")
    assert run(GROWTH, "keep") < 400


def test_a_run_on_a_cpu_keeps_freed_memory_and_returns_it_now_and_then(recipe, monkeypatch):
    trainer, returned = Trainer(recipe("train.steps=6"), ToyAdapter()), []
    assert trainer.freed.kept
    monkeypatch.setattr(FreedMemory, "TRIM_EVERY", 2)
    monkeypatch.setattr(FreedMemory, "give_back", lambda _: returned.append(trainer.step))
    trainer.run()
    assert returned == [2, 4, 6]
