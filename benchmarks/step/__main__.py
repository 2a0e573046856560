"""python -m benchmarks.step [--model M ...] [--size S] [--device D] [--form F ...]: time whole training steps.

Forms alternate, each in its own process: `ours`; `release`, the same step as formulated by the released trainers
(benchmarks/step/release); and `release_kept`, which also keeps freed memory, as ours does on CPUs. Rows are written to
benchmarks/results/step/DEVICE.csv as soon as they are measured; the plot and docs/step.md are generated from them. On a
CPU seconds are CPU time. Two of these commands may run at the same time for different models.
"""

import argparse
import contextlib
import fcntl
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import docs
from benchmarks.devices import Ceilings, CpuTime, Device, ceilings, opened
from benchmarks.rows import rounded
from benchmarks.runner import facts, percentiles
from benchmarks.step import release, report
from benchmarks.step.recipes import MODEL_OF, MODELS, SIZES
from benchmarks.step.rows import FOLDER, FORMS, PARTS, StepRow, merged, read, write
from reca.hardware.full_memory import KINDS, is_memory_full

ROOT = Path(__file__).parents[2]
# Repetitions per rate measurement, about ten seconds of one thread. This is about as long as a step, since the speed of
# a virtual machine varies by a fifth within seconds.
PRODUCTS = 40
DTYPES = dict(tiny=torch.float32, narrow=torch.float32, quarter=torch.bfloat16, real=torch.bfloat16)


class Process:
    """A worker process of one form, which answers commands."""

    def __init__(self, form: str, options: argparse.Namespace, model: str, folder: Path) -> None:
        self.form, self.failed = form, ""
        arguments = [model, options.size, form, options.device, str(folder), json.dumps(options.changes)]
        path = os.pathsep.join([str(ROOT), str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])])
        threads = {} if options.device == "cuda" else {"OMP_NUM_THREADS": str(options.threads)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.step.worker", *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, **threads},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if options.verbose else subprocess.DEVNULL,
            text=True,
        )

    def ask(self, command: str) -> dict[str, Any] | None:
        """Return the answer. After a failure, store the reason and return None, also for all later commands."""
        if self.failed:
            return None
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(f"{command}\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer = json.loads(line) if line else {"error": f"the process ended with {self.process.wait()}"}
        if "error" in answer:
            self.failed = answer["error"]
            return None
        return answer

    def close(self) -> None:
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--model",
        nargs="+",
        type=lambda name: MODEL_OF.get(name, name),
        default=MODELS,
        choices=MODELS,
        help="models, or names of their recipes (default: all)",
    )
    parser.add_argument("--size", default="narrow", choices=SIZES)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--form", nargs="+", default=FORMS[:2], choices=FORMS, help="default: ours and release")
    parser.add_argument(
        "--rounds",
        type=int,
        default=3,
        help="timed steps per form, after a warm-up step (default: %(default)s)",
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--apart", action="store_true", help="one form after the other, if both do not fit into memory")
    parser.add_argument("--resume", action="store_true", help="skip results of this commit and machine in the file")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of recipe keys")
    parser.add_argument("--out", type=Path, help=f"folder of the result file (default: {FOLDER.relative_to(ROOT)})")
    parser.add_argument("--verbose", action="store_true", help="show the stderr of the worker processes")
    options = parser.parse_args(arguments)
    if options.rounds < 1 or options.threads < 1:
        parser.error(f"--rounds and --threads must be at least 1, got {options.rounds} and {options.threads}")
    if wrong := [text for text in options.set if "=" not in text]:
        parser.error(f"--set must be KEY=VALUE, got {', '.join(wrong)}")
    torch.set_num_threads(options.threads)
    options.changes = dict(text.split("=", 1) for text in options.set)
    device = opened(parser, options.device, CpuTime)
    about = facts(device, options.threads, " ".join(["python -m benchmarks.step", *arguments]))
    path = (options.out or FOLDER) / f"{device.result_file}.csv"
    failed = False
    for model in options.model:
        known = _measured(path, model, options, about) if options.resume else []
        rows = list(known)
        for made in measure(model, options, device, about, known):
            with _alone(path.parent):
                write(path, merged(path, made))
            rows += made
        failed |= any(row.note for row in rows if row.form == "ours")
        print(report.table(rows), flush=True)
    print(f"wrote {path}")
    if options.out is None:
        with _alone(path.parent):
            for out in (*report.plots(), report.PAGE):
                if out == report.PAGE:
                    out.write_text(docs.filled(out))
                print(f"wrote {out}")
    return int(failed)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder of results, which excludes other processes of this benchmark."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _measured(path: Path, model: str, options: argparse.Namespace, about: dict) -> list[StepRow]:
    """Return the rows of a model that --resume does not measure again."""
    where = {name: value for name, value in about.items() if name not in ("date", "command")}
    if about["commit"].endswith("+"):  # the files differ from the commit
        return []
    return [
        row
        for row in read(path)
        if (row.model, row.size) == (model, options.size)
        and row.measured
        and not row.note
        and row.steps >= options.rounds
        and all(getattr(row, name) == value for name, value in where.items())
    ]


def measure(
    model: str, options: argparse.Namespace, device: Device, about: dict, known: Sequence[StepRow] = ()
) -> Iterator[list[StepRow]]:
    """Yield the rows of the forms of a model, one group of alternating forms at a time. known: existing rows."""
    done = {row.form for row in known}
    forms = [f for f in options.form if f not in done and (f == "ours" or model in release.RELEASED)]
    useful = next((row.useful_flops for row in known), "")
    groups: Sequence[Sequence[str]] = [[form] for form in forms] if options.apart else [forms] if forms else []
    for group in groups:
        answers: dict[str, dict[str, list]] = {form: {"count": [], "step": []} for form in group}
        with tempfile.TemporaryDirectory(prefix="reca_step_") as folder:
            processes = [Process(form, options, model, Path(folder)) for form in group]
            try:
                rates = _take_turns(processes, answers, options.rounds, device, DTYPES[options.size])
            finally:
                for process in processes:
                    process.close()
        useful = next((one["useful_flops"] for one in answers.get("ours", {}).get("count", [])), useful)
        failed = {process.form: process.failed for process in processes}
        yield [_row(model, options.size, form, answers[form], useful, failed[form], rates, about) for form in group]


def _take_turns(
    processes: list[Process], answers: dict[str, dict[str, list]], rounds: int, device: Device, dtype: torch.dtype
) -> list[Ceilings | None]:
    """Run the forms alternately, every other round in reverse. Return the machine's rates before and after rounds."""

    def ask(process: Process, command: str) -> None:
        if (answer := process.ask(command)) is not None:
            answers[process.form][command].append(answer)

    rates = []
    for process in processes:
        ask(process, "count")
    for number in range(rounds):
        rates.append(_rates(device, dtype))
        for process in processes if number % 2 == 0 else reversed(processes):
            ask(process, "step")
    return [*rates, _rates(device, dtype)]


def _rates(device: Device, dtype: torch.dtype) -> Ceilings | None:
    """Measure the machine's rates; None if the forms leave too little memory for it."""
    try:
        return ceilings(device, [dtype], rounds=PRODUCTS)
    except KINDS as error:
        if not is_memory_full(error):
            raise
    device.free()  # outside of the except block, where no traceback keeps the tensors alive
    return None


def _row(
    model: str,
    size: str,
    form: str,
    found: dict[str, list],
    useful: float | str,
    reason: str,
    rates: list[Ceilings | None],
    about: dict,
) -> StepRow:
    """Return the row of a process's answers: medians over its steps. Rates without a measurement are NaN."""
    row = StepRow(model, size, form, note=reason, clock="wall" if about["driver"] else "CPU time", **about)
    if not (steps := found["step"]):
        return row
    counted = found["count"][0]
    for name in ("images", "flops", "operators", "bytes", "host_waits", "trained", "dtype"):
        setattr(row, name, counted[name])
    row.useful_flops, row.steps = useful, len(steps)
    seconds = [step["seconds"] for step in steps]
    row.seconds_p20, row.seconds_p50, row.seconds_p80 = map(
        rounded, percentiles(seconds) if len(seconds) > 1 else seconds * 3
    )
    for name in PARTS:
        value = statistics.median(step["parts"][name] for step in steps)
        setattr(row, name.replace(" ", "_"), rounded(value))
    row.peak_gib = round(max(step["peak"] for step in steps) / 2**30, 3)
    known = [one for one in rates if one is not None]
    if len(known) < len(rates):
        row.note = row.note or f"not enough memory for {len(rates) - len(known)} of {len(rates)} measurements of rates"
    row.gemm = rounded(1e12 * statistics.mean([one.gemm[row.dtype] for one in known] or [math.nan]))
    row.copy = rounded(1e9 * statistics.mean([one.copy for one in known] or [math.nan]))
    return row


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
