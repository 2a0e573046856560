"""Every test runs on as many threads as the test runner chose, on no GPU unless it is marked `gpu`.

Where there is no GPU, Triton kernels run in Triton's interpreter (tests/kernels/backends.py).
"""

import os

import pytest
import torch

from tests import interpreter

if not torch.cuda.is_available() and interpreter.problem() is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, which torch and reca_kernels do late


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):  # keywords hold names of folders, too
            item.add_marker(skip)
