"""python -m benchmarks.full_gpu_run [STEP ...] [--call N] [--out FOLDER]: all tests and benchmarks that need a GPU.

Builds, runs the GPU tests and the benchmarks of every op, regenerates the dispatch tables and the documentation, times
whole training steps of the models, and finally prints summary tables with targets. A step that fails or times out does
not stop the others; the exit status is then 1. No network is needed. The output of a step goes to FOLDER/STEP.log
(default $OUT, else build/gpu_run); its last lines are shown. Result files are copied there after every step, and when
SIGINT or SIGTERM ends the run.

--call N runs one of 8 groups of steps within ten minutes, or --seconds S, for GPUs with a time limit: a step gets at
most the time that earlier ones left. The groups are in order of importance: 1 correctness, 2 speed of the ops with the
largest share of a step, 3 whole training steps. If the CUDA kernels are not built yet, a call builds them first. The
first tests are those of one op with CUDA_LAUNCH_BLOCKING: after an invalid memory access all later tests of the process
fail, and without blocking the wrong kernel is reported.
"""

import argparse
import contextlib
import importlib.util
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import verdicts
from benchmarks.data.rows import FOLDER as DATA_RESULTS
from benchmarks.docs import summary
from benchmarks.rows import RESULTS
from benchmarks.step.rows import FOLDER as STEP_RESULTS
from reca_kernels import native
from reca_kernels.attention.order import TABLE as ORDER_TABLE
from reca_kernels.dispatch import TABLE

ROOT = Path(__file__).parents[1]
PYTHON = sys.executable
GRACE = 15  # seconds between SIGINT, after which pytest and the benchmarks report what they have, and SIGKILL
SHOWN = 40  # last lines of a step's log that are printed
CALL_SECONDS = 585  # of a call, so that its last results are copied before ten minutes are over
SHORTEST = 20  # a step with fewer seconds left is not started


@dataclass
class Step:
    """A command and its time limit in seconds, of which the last GRACE are for shutting down."""

    name: str
    seconds: float
    command: list[str]
    environment: Mapping[str, str] = field(default_factory=dict)


class Done(NamedTuple):
    name: str
    rc: int  # 124: timed out, or not started for lack of time
    seconds: float


def _tests(*options: str, processes: int = 1) -> list[str]:
    """Return a command for GPU tests. Each process has its own context, so a failed kernel affects only its tests.

    The log names every test as it ends, in case the process is killed before its summary.
    """
    split = ["-n", str(processes), "--dist", "worksteal"] if processes > 1 and importlib.util.find_spec("xdist") else []
    output = ["-v", "-ra", "--durations=10", "--continue-on-collection-errors"]
    return [PYTHON, "-m", "pytest", *output, "-m", "gpu", *split, *options]


def _benchmark(op: str, seconds: int) -> Step:
    return Step(f"bench_{op}", seconds, [PYTHON, "-m", "benchmarks", "--device", "cuda", "--ops", op])


def _training(model: str, seconds: int, *options: str, size: str = "real") -> Step:
    """Return a step that times whole training steps, one form after the other, as both need most of the memory."""
    command = [PYTHON, "-m", "benchmarks.step", "--device", "cuda", "--apart", "--verbose"]
    command += ["--size", size, "--model", model]
    return Step(f"step_{model}" + ("" if size == "real" else f"_{size}"), seconds, [*command, *options])


KERNEL_TESTS = ("tests/kernels", "tests/benchmarks")
DRIVER_TESTS = ("tests/models", "tests/data", "tests/driver/test_memory.py")  # need the driver's dependencies
# KiB of cuBLAS workspace: the default is larger than a whole tiny model, and these tests compare peak memory.
SMALL_WORKSPACES = {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "CUBLASLT_WORKSPACE_SIZE": "128"}
REPORT = "import subprocess; from reca.commands import doctor; print(doctor.report()); subprocess.run('nvidia-smi')"
# Sanitizer tests start a process each, and tests with more than 2^31 elements need most of the memory.
LARGE, SANITIZED = "more_than_2_31", "sanitizer"
# ON: without a compiler, CMake or nvcc the build fails, instead of making a module without CUDA.
BUILD = Step("build", 180, [PYTHON, "setup.py", "build_ext", "--inplace"], {"RECA_NATIVE": "ON", "RECA_CUDA": "ON"})
CALLS = [
    [
        BUILD,
        Step("report", 45, [PYTHON, "-c", REPORT]),
        Step(
            "first",
            120,
            _tests("-x", "tests/kernels/test_masked_cross_entropy.py", "-k", "cuda-cuda"),
            {"CUDA_LAUNCH_BLOCKING": "1"},
        ),
        Step("test", 480, _tests(*KERNEL_TESTS, "-k", f"not {LARGE} and not {SANITIZED}", processes=8)),
    ],
    [
        _benchmark("masked_linear_cross_entropy", 300),
        _benchmark("template_concat", 150),
        _benchmark("masked_cross_entropy", 150),
    ],
    [
        _training("show_o", 220),
        # With 42 images per micro-batch ours is predicted to need 115 GiB, and the released form keeps all prompt rows.
        _training("open_uni", 230, "--set", "objective.reca.micro_batch=28"),
        _training("janus", 140),
    ],
    [
        _benchmark("attention", 290),
        _benchmark("flow_matching", 130),
        _benchmark("diffusion_loss", 110),
        _benchmark("philox", 60),
    ],
    [
        Step("test_large", 110, _tests(*KERNEL_TESTS, "-k", LARGE)),
        Step("test_models", 130, _tests(*DRIVER_TESTS, processes=4), SMALL_WORKSPACES),
        Step("sdp_kernels", 90, [PYTHON, "-m", "benchmarks.sdp_kernels"]),
        _benchmark("row_gradients", 50),
    ],
    [
        Step("sanitizers", 400, _tests("tests/kernels", "-k", SANITIZED, processes=6)),
        Step("dispatch", 25, [PYTHON, "-m", "benchmarks.dispatch"]),
        Step("docs", 25, [PYTHON, "-m", "benchmarks.docs"]),
    ],
    [
        # bf16 moments: with fp32 moments the trained half of BAGEL alone needs 105 GB.
        _training("bagel", 260, "--form", "ours", "--set", "optim.moments=bf16"),
        _training("bagel", 320, size="quarter"),
    ],
    [
        Step("data", 150, [PYTHON, "-m", "benchmarks.data", "--device", "cuda"]),
        _training("harmon", 300),
        _training("janusflow", 140),
    ],
]
STEPS = [step for call in CALLS for step in call]


def run(steps: list[Step], out: Path, seconds: float = math.inf) -> list[Done]:
    """Run the steps one after another, each within its time limit. The output of a step goes to out/NAME.log.

    seconds: for all steps together.
    """
    out.mkdir(parents=True, exist_ok=True)
    done, start, ends = [], time.time(), time.monotonic() + seconds
    for step in steps:
        began, log = time.monotonic(), out / f"{step.name}.log"
        left = ends - began
        if left < min(SHORTEST, step.seconds):
            print(f"==== {step.name}: not started, {left:.0f} s are left", flush=True)
            done.append(Done(step.name, 124, 0))
            continue
        step = replace(step, seconds=min(step.seconds, left))
        print(f"==== {step.name}, up to {step.seconds:.0f} s: {' '.join(step.command)}", flush=True)
        try:
            rc = _run(step, log)
        finally:
            _copy_results(out, start)
        done.append(Done(step.name, rc, time.monotonic() - began))
        print("\n".join(log.read_text(errors="replace").splitlines()[-SHOWN:]))
        print(f"==== {step.name}: rc {rc} after {done[-1].seconds:.0f} s, {log}", flush=True)
    return done


def _copy_results(out: Path, since: float) -> None:
    """Copy result files, plots and dispatch tables that are newer than `since` to `out`."""
    found = {path: path.name for path in (*RESULTS.glob("*.*"), TABLE)} | {ORDER_TABLE: "attention_order.json"}
    for kind, folder in (("step", STEP_RESULTS), ("data", DATA_RESULTS)):
        found |= {path: f"{kind}_{path.name}" for path in folder.glob("*.csv")}
    for path, name in found.items():
        if path.stat().st_mtime >= since:
            shutil.copy(path, out / name)


def _run(step: Step, log: Path) -> int:
    path = os.pathsep.join([str(ROOT), str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **step.environment}
    with log.open("w") as output:
        try:
            process = subprocess.Popen(
                step.command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=_own_group,
            )
        except OSError as error:
            output.write(f"{error}\n")
            return 127
        grace = min(GRACE, step.seconds / 2)
        try:
            return process.wait(step.seconds - grace)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # only to the main process, which stops its workers
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace)
            return 124
        finally:
            _kill(process)


def _own_group() -> None:
    """Make the calling process, a step's, the leader of a process group, and let SIGINT end it.

    Not of a session: a remote shell or scheduler that ends a command by its session would leave the step running on the
    GPU. Shells start background jobs with SIGINT ignored.
    """
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _kill(process: subprocess.Popen) -> None:
    """Kill the command's process group: children may outlive the command, and it may outlive this process."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def table(done: list[Done]) -> str:
    return "\n".join(f"{step.name:<36} rc {step.rc:>3} {step.seconds:6.0f} s" for step in done)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.full_gpu_run", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    names = [step.name for step in STEPS]
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"some of {', '.join(names)} (default: all)")
    parser.add_argument(
        "--call", type=int, metavar="N", help=f"run one of {len(CALLS)} groups of steps, in up to ten minutes"
    )
    parser.add_argument("--seconds", type=float, metavar="S", help=f"time limit of --call (default: {CALL_SECONDS})")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(os.environ.get("OUT") or ROOT / "build" / "gpu_run"),
        metavar="FOLDER",
        help="folder for logs, result files, plots and dispatch tables (default: $OUT, else build/gpu_run)",
    )
    options = parser.parse_args(arguments)
    if unknown := set(options.steps) - set(names):
        parser.error(f"unknown steps {', '.join(sorted(unknown))}; expected some of {', '.join(names)}")
    if options.call is not None and (options.steps or not 1 <= options.call <= len(CALLS)):
        parser.error(f"--call must be 1 to {len(CALLS)}, and cannot be combined with names of steps")
    if options.seconds is not None and (options.call is None or options.seconds <= 0):
        parser.error(f"--seconds must be above 0, and is the time limit of --call, got {options.seconds:g}")
    if not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} finds no CUDA device: tests would be skipped; see nvidia-smi")
    chosen = [s for s in STEPS if not options.steps or s.name in options.steps]
    if options.call:
        chosen = CALLS[options.call - 1]
        if BUILD not in chosen and not (native.module and native.module.cuda_archs):
            chosen = [BUILD, *chosen]
    if not importlib.util.find_spec("xdist"):
        print("pytest-xdist is not installed: the tests run in one process and may exceed their time limit")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the step, and copies its results
    done = run(chosen, options.out, (options.seconds or CALL_SECONDS) if options.call else math.inf)
    print(summary())
    print(verdicts.table("cuda"))
    print(table(done))
    return int(any(step.rc for step in done))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
