"""python -m benchmarks.full_gpu_run [STEP ...] [--copy-to FOLDER]: everything that wants a GPU, within 25 minutes.

Builds, runs the GPU tests, the benchmarks of every op, regenerates the dispatch table and the documents, and prints a
short table last. A step that fails or runs out of time does not stop the others; the exit status is 1 then. Name steps
to run some of them, where one command may not take that long. Needs no network.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.__main__ import OPS
from benchmarks.docs import summary
from benchmarks.rows import RESULTS
from reca_kernels.dispatch import TABLE

ROOT = Path(__file__).parents[1]
MINUTES = 25
PYTHON = sys.executable


class Step(NamedTuple):
    name: str
    seconds: int
    command: list[str]


class Done(NamedTuple):
    name: str
    rc: int  # 124: out of time
    seconds: float


BENCHMARKS = {
    "philox": 60,
    "template_concat": 150,
    "masked_cross_entropy": 150,
    "masked_linear_cross_entropy": 180,
    "flow_matching": 120,
    "diffusion_loss": 90,
    "attention": 90,
}
STEPS = [
    Step("card", 30, ["nvidia-smi"]),
    Step("build", 180, [PYTHON, "setup.py", "build_ext", "--inplace"]),
    Step("report", 30, [PYTHON, "-c", "import reca_kernels; print(reca_kernels.backend_report())"]),
    Step("test", 330, [PYTHON, "-m", "pytest", "-q", "-m", "gpu", "tests/kernels", "tests/benchmarks"]),
    *(
        Step(
            f"bench_{op}",
            BENCHMARKS[op],
            [PYTHON, "-m", "benchmarks", "--device", "cuda", "--ops", op],
        )
        for op in OPS
    ),
    Step("dispatch", 30, [PYTHON, "-m", "benchmarks.dispatch"]),
    Step("docs", 30, [PYTHON, "-m", "benchmarks.docs"]),
]


def run(steps: list[Step], minutes: float = MINUTES) -> list[Done]:
    """Run them one after another, each within its own time and what is left of all."""
    ends, done = time.monotonic() + 60 * minutes, []
    for step in steps:
        print(f"==== {step.name}: {' '.join(step.command)}", flush=True)
        began = time.monotonic()
        rc = _run(step, min(step.seconds, ends - began))
        done.append(Done(step.name, rc, time.monotonic() - began))
        print(f"==== {step.name}: rc {rc} after {done[-1].seconds:.0f} s", flush=True)
    return done


def _run(step: Step, seconds: float) -> int:
    if seconds <= 0:
        return 124
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")])}
    try:
        process = subprocess.Popen(step.command, cwd=ROOT, env=environment, start_new_session=True)
    except OSError as error:
        print(error)
        return 127
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return 124


def table(done: list[Done]) -> str:
    return "\n".join(f"{step.name:<36} rc {step.rc:>3} {step.seconds:6.0f} s" for step in done)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.full_gpu_run", description=__doc__)
    names = [step.name for step in STEPS]
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"among {', '.join(names)}; default all")
    parser.add_argument("--copy-to", type=Path, help="folder that gets result files, plots and the dispatch table")
    options = parser.parse_args(arguments)
    if unknown := set(options.steps) - set(names):
        parser.error(f"unknown steps {', '.join(sorted(unknown))}; known are {', '.join(names)}")
    done = run([step for step in STEPS if not options.steps or step.name in options.steps])
    if options.copy_to:
        options.copy_to.mkdir(parents=True, exist_ok=True)
        for path in [*(p for p in RESULTS.iterdir() if p.stem != "cpu"), TABLE]:
            shutil.copy(path, options.copy_to)
    print(summary())
    print(table(done))
    return int(any(step.rc for step in done))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
