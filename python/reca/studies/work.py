"""Execution of one task. Its result is a file, written once the task is complete."""

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reca.config.recipe_files import load_recipe
from reca.io import jsonl
from reca.io.files import parse_json
from reca.io.folders import write_atomically
from reca.io.paths import is_file
from reca.io.shape import misfit
from reca.runs import folder_lock
from reca.runs.finished import finished_steps
from reca.runs.lineage import load_trained, recipe_of
from reca.studies import published, toy
from reca.studies.study import BEFORE, LOSS, PRETRAINED, StudyError
from reca.studies.task import Task
from reca.trainer import Trainer

PROGRESS = ".steps"  # file with the number of completed steps
RESULT = {
    "measures": {str: {"value": int | float, "interval?": list | None, "hits?": int, "trials?": int}},
    "curve": [(int, int | float)],
    "seconds": int | float,
}  # shape of a task's result
LAST = 0.1  # `loss` is the mean over this last fraction of a run's losses


def work(task: Task) -> dict[str, Any]:
    """Run a task and return its result, or load the result of a finished one. Interrupted training runs resume.

    Studies share variants: if another process is running a task in the same folder, wait for it to end.
    """
    task.folder.parent.mkdir(parents=True, exist_ok=True)
    with folder_lock.alone(task.folder.with_name(f".{task.folder.name}.lock"), task.name):
        return done(task) or _work(task)


def _work(task: Task) -> dict[str, Any]:
    started = time.perf_counter()
    task.folder.mkdir(parents=True, exist_ok=True)
    if task.kind == PRETRAINED:
        curve = toy.pretrain(task, _progress(task))
        measures: dict[str, Any] = {}
    elif task.kind == BEFORE:
        curve, measures = [], _measure_pretrained(task)
    else:
        _train(task)
        curve = _curve(task.folder)
        measures = _measure_run(task) | _loss(curve)
    result = {"measures": measures, "curve": curve, "seconds": time.perf_counter() - started}
    write_atomically(task.result, json.dumps(result))
    return result


def done(task: Task) -> dict[str, Any] | None:
    """Load the result of a task; None if it is not done. Raises StudyError if the file is damaged."""
    if not is_file(task.result):
        return None
    try:
        found = parse_json(task.result.read_bytes())
    except ValueError as error:
        raise StudyError(f"{task.result} is not JSON ({error}): remove it to run {task.name} again") from error
    if (place := misfit(found, RESULT)) is not None:
        missing = f"{place[1:] or 'a JSON object'} is missing, or is of another type"
        raise StudyError(f"{task.result} is not the result of a task ({missing}): remove it to run {task.name} again")
    return found


def steps(task: Task) -> int:
    """Return the number of training steps of a task."""
    if task.kind == PRETRAINED:
        return 0 if task.modification else toy.pretraining_steps(task)
    return load_recipe(task.recipe, task.overrides).train.steps if task.kind == "variant" else 0


def steps_done(task: Task) -> int:
    try:
        return int((task.folder / PROGRESS).read_text())
    except (OSError, ValueError):
        return 0


def _progress(task: Task) -> Callable[[int], None]:
    def progress(step: int) -> None:
        with contextlib.suppress(OSError):  # a full disk does not end a run
            (task.folder / PROGRESS).write_text(str(step))

    return progress


def _train(task: Task) -> None:
    recipe = load_recipe(task.recipe, [*task.overrides, f"run_dir={task.folder}"])
    if finished_steps(recipe) is None:
        Trainer(recipe, progress=_progress(task)).run()


def _measure_pretrained(task: Task) -> dict[str, Any]:
    if task.setting == "published":
        return published.measured(task)
    made = load_recipe(task.recipe, task.overrides)
    folder = made.train.init_from or made.model.weights
    return toy.measured(toy.load_pretrained(task, Path(folder)), task)


def _measure_run(task: Task) -> dict[str, Any]:
    if task.setting == "published":
        return published.measured(task)
    return toy.measured(load_trained(task.folder, recipe_of(task.folder)), task)


def _curve(run_dir: Path) -> list[tuple[int, float]]:
    """Load a run's loss curve: the RECA loss if it is trained, else the total."""
    lines = (line for line in jsonl.read_log(run_dir / "log.jsonl") if "loss" in line)
    losses = [(line["step"], line.get("reca/loss", line["loss"])) for line in lines]
    return [(step, loss) for step, loss in losses if isinstance(loss, int | float)]  # null: a step that was not finite


def _loss(curve: list[tuple[int, float]]) -> dict[str, Any]:
    """Compute the mean loss at the end of training, on training images and without an interval."""
    last = [loss for _, loss in curve[-max(1, round(LAST * len(curve))) :]]
    return {LOSS: {"value": sum(last) / len(last)}} if last else {}
