"""The sides of a comparison: a run, the model that a run started from, or an evaluation folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reca.config.recipe import Recipe
from reca.eval import report
from reca.eval.errors import OptionError
from reca.eval.report import RESULTS
from reca.eval.targets import BASE, evaluations_of, made_during_training
from reca.io.paths import is_file
from reca.runs.lineage import inside_run, parent_checkpoint, recipe_of, trained_source


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    kind        run, base or evaluation
    evaluations folders that contain results.json
    during      the same of evaluations during training (eval.suite), of the side's step; a base's are of step 0
    recipe      recipe of the run, or of the run whose base this is
    weights     checkpoint on top of the published weights; for a base that of train.init_from from which the run
                started; None: no checkpoint
    base_of     for a base, its run
    """

    source: str
    kind: str
    evaluations: tuple[Path, ...]
    recipe: Recipe | None = None
    weights: Path | None = None
    base_of: Path | None = None
    during: tuple[Path, ...] = ()

    @property
    def run_dir(self) -> Path | None:
        trained = trained_source(self.source) if self.kind == "run" else None
        return trained and trained[0]

    @property
    def step(self) -> int | None:
        return None if self.weights is None else int(self.weights.name)

    @property
    def lacks_weights(self) -> bool:
        """Tell whether the checkpoint of the side's weights, the run's or that of its train.init_from, is missing."""
        trained = self.kind == "run" or (self.recipe is not None and self.recipe.train.init_from is not None)
        return trained and self.weights is None

    def results(self, during: bool = False) -> dict[Path, dict[str, Any]]:
        """Read the results of all evaluations by folder. Raises EvaluationError for damaged ones.

        during: those during training instead.
        """
        folders = self.during if during else self.evaluations
        return {folder: report.read(folder / RESULTS) for folder in folders}

    def describe(self) -> dict[str, Any]:
        return {"source": self.source, "kind": self.kind, "step": self.step}


def find_sides(before: str, after: str) -> tuple[Side, Side]:
    """Resolve the two names. One of them may be "base": the model that the other, a run, started from.

    Raises EvaluationError for a name that is neither a run nor an evaluation folder.
    """
    if before == BASE and after == BASE:
        raise OptionError("both sides are base: pass a run on one side")
    if before == BASE:
        return _base_of(after), _side(after)
    if after == BASE:
        return _side(before), _base_of(before)
    sides = _side(before), _side(after)
    if _place(sides[0]) == _place(sides[1]):
        raise OptionError(f"both sides are {_place(sides[0])}: pass two models, or base as one side")
    return sides


def _place(side: Side) -> Path:
    """Return the folder of the checkpoint that a run stands for, or that of an evaluation."""
    return (side.weights or Path(side.source)).resolve()


def _side(name: str) -> Side:
    folder = Path(name)
    if trained := trained_source(folder):
        run, weights = trained
        during = made_during_training(run, None if weights is None else int(weights.name))
        evaluations = _evaluations(evaluations_of(run, weights))
        return Side(name, "run", evaluations, recipe_of(run), weights, during=during)
    if is_file(folder / RESULTS):
        return Side(name, "evaluation", (folder,))
    if hint := inside_run(folder):
        raise OptionError(f"{name} {hint}")
    raise OptionError(
        f"{name} is neither a run folder (with recipe.yaml) nor an evaluation folder (with {RESULTS}, which "
        "`reca eval` writes); pass one of those, or base"
    )


def _base_of(name: str) -> Side:
    folder = Path(name)
    if not (trained := trained_source(folder)):
        raise OptionError(
            f"base is the model that a run started from, but {name} {inside_run(folder) or 'is not a run folder'}"
        )
    run = trained[0]
    recipe = recipe_of(run)
    weights = parent_checkpoint(recipe, run)
    during = made_during_training(run, 0)
    return Side(f"base of {name}", "base", _evaluations(run / "eval" / BASE), recipe, weights, run, during)


def _evaluations(folder: Path | None) -> tuple[Path, ...]:
    return tuple(sorted(path.parent for path in folder.glob(f"*/{RESULTS}"))) if folder else ()
