"""Runs on a simulated GPU, by the Triton and the CUDA kernels, do what they do on a CPU, without waits of the host."""

import json
import os
import subprocess
import sys

import pytest
import torch

from reca.models import UMMS
from reca_kernels import native
from tests import interpreter
from tests.driver.simulated_cuda import ROOT, build
from tests.kernels import emulated

RECIPES = tuple(f"{umm}_tiny" for umm in UMMS)
# The norm of the gradients decides whether the step is made, and the losses are read with it.
OF_A_STEP = ["_local_scalar_dense in python/reca/optim/gradients.py", "copy_ in python/reca/objective.py"]


@pytest.mark.skipif(sys.platform != "linux", reason="the simulated device is built for Linux")
@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has a CUDA device of its own")
def test_runs_on_a_simulated_gpu():
    try:
        library = build()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"the simulated device does not compile against this torch: {getattr(error, 'stderr', error)}")
    backends = ["reference" if interpreter.problem() else "triton"]
    backends += ["cuda"] if native.module and emulated.missing() is None else []
    command = [sys.executable, "-m", "tests.driver.simulated_cuda", str(library), ",".join(backends), *RECIPES]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    environment = os.environ | {"PYTHONPATH": paths, "RECA_ATTENTION": "sdpa", "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert list(report) == [f"{recipe} {backend}" for backend in backends for recipe in RECIPES]
    for recipe, waits in report.items():
        assert waits["differences"] == [], recipe
        for step in ("step 0", "step 1"):
            assert [wait.partition(":")[0] for wait in waits[step]] == OF_A_STEP, recipe
        for made in ("generated", "reconstructed", "edited"):  # waits to begin with, and none per sampling step
            assert waits.get(f"{made} 2") == waits.get(f"{made} 3"), recipe
