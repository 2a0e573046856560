"""Every test runs on as many threads as its runner's share of the cores, on no GPU unless it is marked `gpu`.

Runners begin with the files that take longest: a runner that ends with one would leave the others idle.

Where there is no GPU, Triton kernels run in Triton's interpreter (tests/kernels/backends.py).
"""

import os
from pathlib import Path

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


TESTS = Path(__file__).parent
# Files that take more than some 15 s on one core, the longest first.
SLOWEST = """
models/test_contract.py driver/test_distributed.py test_style.py driver/test_memory.py demo/test_demo.py
models/test_compiled.py
kernels/test_masked_linear_cross_entropy.py kernels/test_nvcc.py driver/test_simulated_cuda.py models/test_waits.py
driver/test_check.py kernels/test_flow_matching.py driver/test_failing_ranks.py driver/test_memory_on_ranks.py
kernels/test_masked_cross_entropy.py eval/test_evaluation.py kernels/test_diffusion_loss.py
kernels/test_template_concat.py kernels/test_attention.py driver/test_step_benchmark.py eval/test_comparison.py
driver/test_loading.py kernels/test_kernel_op.py driver/test_serve.py driver/test_errors.py models/test_harmon.py
driver/test_overfit.py eval/test_statistics.py driver/test_fit.py driver/test_lora.py
""".split()


def pytest_configure(config: pytest.Config) -> None:
    # xdist's own order, by the number of tests in a file, ends with files of one test that takes a minute.
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = {TESTS / name: number for number, name in enumerate(SLOWEST)}
        items.sort(key=lambda item: place.get(item.path, len(place)))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):  # keywords hold names of folders, too
            item.add_marker(skip)
