"""What the C library does with freed memory."""

import platform
import subprocess
import sys
import textwrap

import pytest

# Prints the page faults of filling 64 MiB for the second time.
FAULTS = """
    import ctypes, resource, sys
    from reca.host_memory import keep_freed

    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    if sys.argv[1] == "keep":
        assert keep_freed()

    def fill():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        memory = libc.malloc(64 << 20)
        ctypes.memset(memory, 1, 64 << 20)
        libc.free(memory)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    fill()
    print(fill())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_freed_memory_is_used_again_without_page_faults():
    def faults(how):
        command = [sys.executable, "-c", textwrap.dedent(FAULTS), how]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert faults("give back") > 32  # 16,384 of 4 KiB, or 32 of 2 MiB
    assert faults("keep") < 16
