"""Run commands on a disk that fills up, and print what came of them: full_disk.py DISK ELSEWHERE, JSON on stdout.

DISK is a small file system of its own, which this process may fill.
"""

import contextlib
import io
import json
import logging
import os
import shutil
import signal
import sys
from pathlib import Path

from reca import checkpoint
from reca.cli import main
from reca.runs.status import Status
from reca.trainer import Trainer

DISK, ELSEWHERE = Path(sys.argv[1]), Path(sys.argv[2])
FILLER = DISK / "filler"
TINY = ["objective.reca.batch_size=2", "objective.i2t.weight=0", "data.workers=0", "train.threads=1"]
MESSAGES = io.StringIO()


def fill(leave: int = 0) -> None:
    """Take all space but `leave` bytes."""
    with contextlib.suppress(OSError), FILLER.open("ab", buffering=0) as file:
        while (free := shutil.disk_usage(DISK).free - leave) > 0:
            file.write(bytes(min(free, 1 << 20)))


def free() -> None:
    FILLER.unlink(missing_ok=True)


def command(*arguments: str) -> int:
    """One command; its exit code. What it says is kept."""
    with contextlib.redirect_stderr(MESSAGES), contextlib.redirect_stdout(MESSAGES):
        return main(list(arguments))


def train(run_dir: Path, at: dict, *overrides: str) -> int:
    """A run of 4 steps with a checkpoint after each; `at` holds what is done before a step, when none is written."""
    step = Trainer.train_step

    def watched(trainer: Trainer, batches: dict) -> dict:
        if trainer.writer.thread is not None:
            trainer.writer.thread.join()
        at.get(trainer.step, lambda: None)()
        return step(trainer, batches)

    Trainer.train_step = watched
    try:
        steps = ["train.steps=4", "checkpoint.every=1", f"run_dir={run_dir}"]
        return command("train", "show_o_tiny", *TINY, *steps, *overrides)
    finally:
        Trainer.train_step = step


def begin(name: str) -> Path:
    free()
    for path in DISK.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    MESSAGES.seek(0)
    MESSAGES.truncate()
    return DISK / name


def outcome(run_dir: Path, code: int) -> dict:
    status = Status.read(run_dir)
    return {
        "code": code,
        "state": status.state,
        "step": status.step,
        "checkpoints": [path.name for path in checkpoint.list_complete(run_dir)],
        "partial": [path.name for path in run_dir.rglob("*.part*")],
        "said": MESSAGES.getvalue(),
    }


def at_the_start() -> dict:
    run_dir = begin("run")
    fill(leave=100_000)
    return outcome(run_dir, train(run_dir, {}))


def from_nothing() -> dict:
    """Not a byte is free, not even for the status."""
    run_dir = begin("run")
    fill()
    code = train(run_dir, {})
    return {"code": code, "said": MESSAGES.getvalue()}


def in_the_middle() -> dict:
    run_dir = begin("run")
    return outcome(run_dir, train(run_dir, {1: fill, 2: free}))


def at_the_last_save() -> dict:
    run_dir = begin("run")
    first = outcome(run_dir, train(run_dir, {3: fill}))
    free()
    again = outcome(run_dir, train(run_dir, {}))
    return first | {"again": again["code"], "then": again["checkpoints"]}


def at_a_signal() -> dict:
    def terminate() -> None:
        fill()
        os.kill(os.getpid(), signal.SIGTERM)

    run_dir = begin("run")
    return outcome(run_dir, train(run_dir, {2: terminate}))


def in_the_cache() -> dict:
    cache = begin("cache")
    shutil.rmtree(ELSEWHERE / "run", ignore_errors=True)
    code = train(ELSEWHERE / "run", {1: fill}, f"data.cache={cache}")
    return outcome(ELSEWHERE / "run", code) | {
        "partial": [p.name for p in cache.rglob("*") if p.suffix != ".safetensors" and p.is_file()]
    }


def in_the_export() -> dict:
    out = begin("out")
    fill(leave=500_000)
    code = command("export", str(ELSEWHERE / "run"), "--out", str(out))
    return {"code": code, "said": MESSAGES.getvalue(), "left": [path.name for path in out.rglob("*")]}


def in_the_images() -> dict:
    out = begin("out")
    out.mkdir()
    fill()
    code = command("generate", str(ELSEWHERE / "run"), "--prompt", "a red circle", "--out", str(out))
    return {"code": code, "said": MESSAGES.getvalue(), "left": [path.name for path in out.rglob("*")]}


def in_the_demo() -> dict:
    out = begin("demo")
    fill(leave=3_000_000)
    code = command("demo", "--scale", "0.002", "--out", str(out))
    return {"code": code, "said": MESSAGES.getvalue()}


CASES = (
    at_the_start, from_nothing, in_the_middle, at_the_last_save, at_a_signal, in_the_cache, in_the_export,
    in_the_images, in_the_demo,
)  # fmt: skip

if __name__ == "__main__":
    logging.basicConfig(stream=MESSAGES, format="%(levelname)s %(message)s")
    print(json.dumps({case.__name__: case() for case in CASES}))
