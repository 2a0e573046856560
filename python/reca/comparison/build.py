"""The comparison as JSON, and writing of both files."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from reca.comparison import page
from reca.comparison.curves import loss_curves, setting_differences
from reca.comparison.sides import Side, find_sides
from reca.comparison.weights import understanding
from reca.eval import report
from reca.eval.errors import EvaluationError
from reca.eval.files import encoded, is_of_training
from reca.eval.targets import evaluated_steps, made_during_training
from reca.io.folders import write_atomically
from reca.runs.lineage import is_run

PAGE = "comparison.html"
Suites = Mapping[tuple[str, str], Path]  # folder of the results of each suite


def compare(before: str, after: str) -> dict[str, Any]:
    """Compare two models. Return the contents of comparison.json, described in reca.comparison.

    before, after: a run folder or an evaluation folder; one of them may be "base".
    Raises EvaluationError if a name is neither, if results are damaged, or if two evaluations cannot be compared;
    CheckpointError if weights cannot be read.
    """
    sides = find_sides(before, after)
    suites, notes = _suites(*sides)
    if not suites and all(side.kind == "evaluation" for side in sides):
        raise EvaluationError(f"{before} and {after} have no results to compare: {'; '.join(notes)}")
    return {
        "before": sides[0].describe(),
        "after": sides[1].describe(),
        "suites": suites,
        "curves": loss_curves(*sides),
        "settings": setting_differences(*sides),
        "understanding": understanding(*sides),
        "reconstructions": None,
        "notes": notes,
    }


def _suites(before: Side, after: Side) -> tuple[list[dict[str, Any]], list[str]]:
    """Compare the suites that both sides have results of. Return these, and notes on the other results.

    Results of evaluations during training are compared where those of `reca eval` are not.
    """
    results = [side.results() for side in (before, after)]
    chosen = [one_of_each(side) for side in results]
    compared = compare_each(results[1], results[0])
    done = {suite_of(one.result) for one in compared if one.result["against"]}
    during = [
        {f: r for f, r in side.results(during=True).items() if suite_of(r) not in done} for side in (before, after)
    ]
    compared += compare_each(during[1], during[0])
    suites = [one.result | {"of": _names(one)} for one in compared if one.result["against"]]
    notes = [f"{one.folder} is not compared, because {one.reason}" for one in compared if one.reason]
    notes += _of_one_side((before, after), chosen, [one_of_each(side) for side in during])
    notes += [
        f"{side.source} stands for step {side.step}, which was not evaluated, but other steps were: to compare one of "
        f"them, pass its checkpoint, or the folder of its evaluation in {side.run_dir}/eval ({', '.join(steps)})"
        for side in (before, after)
        if side.run_dir and is_run(side.source) and side.step is not None and not side.evaluations and not side.during
        if (steps := _other_steps(side.run_dir))
    ]
    if not suites and not notes:
        notes.append("neither model was evaluated; run reca eval SUITE RUN --against base to add scores and images")
    notes += [
        f"the weights of {side.source} are not compared: train.init_from={side.recipe.train.init_from} has "
        "no checkpoint that the run started from"
        for side in (before, after)
        if side.kind == "base" and side.lacks_weights and side.recipe
    ]
    notes += [
        f"{folder} is ignored, because {mine[suite_of(result)]} is also of {result['suite']}; pass this folder instead "
        "of its run to compare it"
        for found, mine in zip(results, chosen, strict=True)
        for folder, result in found.items()
        if folder != mine[suite_of(result)]
    ]
    return suites, notes


def _of_one_side(sides: Sequence[Side], by_eval: Sequence[Suites], during: Sequence[Suites]) -> list[str]:
    """Write notes on the suites that were evaluated for one side only, or for one of them only during training."""
    notes = []
    for key in dict.fromkeys(key for found in (*by_eval, *during) for key in found):
        here = [key in by_eval[i] or key in during[i] for i in (0, 1)]
        if not all(here):
            notes.append(
                f"{key[0]} was evaluated for {sides[here.index(True)].source} only; run reca eval {key[0]} for the "
                "other model to compare it"
            )
        elif (key in by_eval[0]) != (key in by_eval[1]) and not (key in during[0] and key in during[1]):
            trained = sides[key in by_eval[0]]
            notes.append(
                f"{key[0]} was evaluated for {trained.source} only during training; run reca eval {key[0]} for it to "
                "compare it with that of the other model"
            )
    return notes


def _other_steps(run: Path) -> list[str]:
    """List the evaluations of a run's steps by their folders in RUN/eval, with the last one during training."""
    return evaluated_steps(run) + [str(folder.relative_to(run / "eval")) for folder in made_during_training(run, None)]


def _names(one: "Compared") -> dict[str, str]:
    """Name the weights that each side's scores are of."""
    against = one.result["against"]
    return {
        "before": _name(against["model"], Path(against["folder"])),
        "after": _name(one.result["model"], one.folder),
    }


def _name(model: Mapping[str, Any] | None, folder: Path) -> str:
    parts = [str(folder)] if model is None else [model["source"], *report.weights(model)]
    parts += ["evaluated during training"] if is_of_training(folder) else []
    return ", ".join(parts)


class Compared(NamedTuple):
    """A suite's result and its folder.

    result  `against` is filled in if the other side has a result that it can be compared with, otherwise it is None
    reason  why the result that the other side has cannot be compared; "" if there is no obstacle, or no such result
    """

    folder: Path
    result: dict[str, Any]
    reason: str


def compare_each(after: Mapping[Path, dict[str, Any]], before: Mapping[Path, dict[str, Any]]) -> list[Compared]:
    """Compare one result of each suite in `after` with that in `before`."""
    others, compared = one_of_each(before), []
    for key, folder in one_of_each(after).items():
        result, reason = after[folder] | {"against": None}, ""
        if (other := others.get(key)) is not None:
            try:
                result = report.compare(result, before[other], other)
            except EvaluationError as error:
                reason = str(error)
        compared.append(Compared(folder, result, reason))
    return compared


def suite_of(result: Mapping[str, Any]) -> tuple[str, str]:
    """Return what two results must have in common to be compared: the suite and its protocol."""
    return result["suite"], result["protocol"]


def one_of_each(results: Mapping[Path, Mapping[str, Any]]) -> dict[tuple[str, str], Path]:
    """Choose one folder per suite: the one named after it, otherwise the first."""
    found: dict[tuple[str, str], Path] = {}
    for folder in sorted(results, key=lambda folder: folder.name != results[folder]["suite"]):
        found.setdefault(suite_of(results[folder]), folder)
    return found


def write(found: dict[str, Any], out: Path, pairs: int = page.PAIRS) -> Path:
    """Write comparison.html and comparison.json into a folder and return the path of the page.

    pairs: maximum number of image pairs per suite on the page, split between gains and losses.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "comparison.json", encoded(json.dumps(found, indent=1, ensure_ascii=False)))
    path = out / PAGE
    write_atomically(path, encoded(page.render(found, out, pairs)))
    return path
