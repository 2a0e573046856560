"""Studies at real size: recipes with published weights, measured by `reca eval`."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reca import api
from reca.eval import figures
from reca.eval.checks import check as check_evaluation
from reca.eval.errors import EvaluationError
from reca.eval.settings import open_settings
from reca.eval.targets import target
from reca.studies.study import BEFORE
from reca.studies.task import Evaluations, Task, digest


def check(recipe: str, evaluations: Evaluations) -> None:
    """Validate the evaluations before anything is trained. Raises EvaluationError or RecipeError."""
    for name in evaluations.suites:
        try:
            settings = open_settings(**{"suite": name, "data": None} | evaluations.of(name))
            check_evaluation(settings, [target(recipe, (), settings.suite.folder, None)], None, None)
        except EvaluationError as error:
            if not re.search("--(judge|data) ", str(error)):
                raise
            raise EvaluationError(
                f"{str(error).rstrip('.')}. In a study these options name the suite: --judge {name}=..., "
                f"--data {name}=..."
            ) from error


def measured(task: Task) -> dict[str, Any]:
    """Evaluate a run, or the recipe's published weights, on every suite.

    Returns {suite: measure, "suite/tag": measure}, with fractions converted to percent.
    """
    made: dict[str, Any] = {}
    for suite in task.evaluations.suites:
        source, keys = (task.recipe, task.overrides) if task.kind == BEFORE else (task.folder, ())
        options = task.evaluations.of(suite)
        found = api.evaluate(suite, source, keys, out=_folder(task, suite, options), seed=task.seed, **options)
        if found is None:
            continue
        unit = found["overall"]["unit"]
        made[suite] = _measure(found["overall"], unit)
        made |= {f"{suite}/{tag}": _measure(row, unit) for tag, row in found["tags"].items()}
    return made


def _folder(task: Task, suite: str, options: Mapping[str, Any]) -> Path:
    """Return an evaluation folder unique to its settings: a folder with images of other settings is refused."""
    return task.folder / "eval" / f"{suite.partition('?')[0]}-{digest(suite, options)}"


def _measure(row: dict[str, Any], unit: str) -> dict[str, Any]:
    scale = figures.scale(unit)
    bounds = [None if bound is None else scale * bound for bound in row["interval"]]
    share = {"percent": True} if figures.percentages(unit) else {}
    return {"value": scale * row["value"], "interval": bounds} | share
