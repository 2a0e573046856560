"""Every test runs on as many threads as its runner's share of the cores, on no GPU unless it is marked `gpu`.

Where there is no GPU, Triton kernels run in Triton's interpreter (tests/kernels/backends.py).
"""

import os

import pytest
import torch

from tests import interpreter

if not torch.cuda.is_available() and interpreter.problem() is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, which torch and reca_kernels do late


# Threads of OpenMP wait for each other in a loop: two runners with two threads each on two cores take far longer.
if "OMP_NUM_THREADS" not in os.environ and (runners := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))) > 1:
    threads = max(1, torch.get_num_threads() // runners)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of the processes that tests start
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):  # keywords hold names of folders, too
            item.add_marker(skip)
