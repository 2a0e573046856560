"""Execution of a study: its tasks in parallel, then its report."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

from reca.options.names import hint
from reca.processes import side_by_side
from reca.processes.side_by_side import Failure, Job
from reca.studies import report
from reca.studies.check import check
from reca.studies.plan import plan
from reca.studies.study import Study, StudyError
from reca.studies.task import Asked, Task
from reca.studies.work import done, steps, steps_done, work

Results = dict[str, dict[str, Any]]  # name of a task -> what work() returned, or {"failed": why}
COUNT_SECONDS = 1.0  # between progress updates


def run(
    study: Study, asked: Asked, slots: Sequence[str | None], command: str, say: Callable[[str], None] = tqdm.write
) -> dict[str, Any]:
    """Run the unfinished tasks, write study.html and study.json, and return the content of the latter.

    If a task fails, the report names it, and all tasks that do not depend on it still run.
    Raises the errors of `check` for invalid recipes, before anything runs.
    """
    tasks, omitted = plan(study, asked)
    results: Results = {task.name: found for task in tasks if (found := done(task)) is not None}
    left = [task for task in tasks if task.name not in results]
    check(left, here=True)
    if len(left) < len(tasks):
        say(f"{len(tasks) - len(left)} of {len(tasks)} tasks were already done")
    jobs = [Job(task.name, work, (task,), tuple(name for name in task.after if name not in results)) for task in left]
    budget = {task.name: steps(task) for task in left}
    looked = 0.0
    hidden = None if left else True  # None: hidden unless the output is a terminal
    with tqdm(total=sum(budget.values()), unit="step", desc=study.name, smoothing=0.05, disable=hidden) as bar:

        def ended(job: Job, found: Any) -> None:
            results[job.name] = {"failed": str(found)} if isinstance(found, Failure) else found
            say(f"{job.name}: {line(results[job.name])}")

        def wait() -> None:
            nonlocal looked
            if time.monotonic() - looked > COUNT_SECONDS:
                looked = time.monotonic()
                bar.update(sum(min(steps_done(task), budget[task.name]) for task in left) - bar.n)

        if left:
            side_by_side.run(jobs, slots, ended, wait, lambda job: say(f"{job.name}: begins"))
    return write(study, asked, command, tasks, results, omitted)


def write(
    study: Study, asked: Asked, command: str, tasks: list[Task], results: Results, omitted: dict[str, str]
) -> dict[str, Any]:
    """Write the report of the given results."""
    found = report.summarize(study, asked, command, tasks, results, omitted)
    report.write(found, report.folder(study, asked))
    return found


def report_of(study: Study, asked: Asked, command: str) -> dict[str, Any]:
    """Write the report of existing results without running any task."""
    tasks, omitted = plan(study, asked)
    results = {task.name: done(task) or {"failed": "not run yet"} for task in tasks}
    return write(study, asked, command, tasks, results, omitted)


def run_one(study: Study, asked: Asked, name: str) -> dict[str, Any]:
    """Run one task in this process. Raises StudyError if a task that it depends on is not done."""
    tasks, _ = plan(study, asked)
    by_name = {task.name: task for task in tasks}
    if name not in by_name:
        seeds = f"seed{'s' * (len(asked.seeds) > 1)} {', '.join(map(str, asked.seeds))}"
        variants = dict.fromkeys(task.variant for task in tasks)
        raise StudyError(
            f"the study has no task {name}; --task is SEED/VARIANT of {seeds} and {', '.join(variants)}"
            f"{hint(name, by_name)}"
        )
    task = by_name[name]
    if missing := [before for before in task.after if done(by_name[before]) is None]:
        raise StudyError(f"{name} depends on {missing[0]}, which is not done: run --task {missing[0]} first")
    return work(task)


def line(result: dict[str, Any]) -> str:
    """Format the result of a task in one line."""
    if "failed" in result:
        return f"FAILED, {result['failed']}"
    measures = ", ".join(f"{name} {m['value']:.3g}" for name, m in result["measures"].items() if "/" not in name)
    return f"{measures or 'ready'} ({result['seconds']:.0f} s)"
