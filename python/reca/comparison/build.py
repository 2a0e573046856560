"""The comparison as JSON, and both of its files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reca.comparison import page
from reca.comparison.curves import loss_curves, setting_differences
from reca.comparison.sides import Side, find_sides
from reca.comparison.weights import understanding
from reca.eval import report
from reca.eval.errors import EvaluationError
from reca.eval.files import HALVES
from reca.folders import write_atomically

PAGE = "comparison.html"


def compare(before: str, after: str) -> dict[str, Any]:
    """Compare two models; reca.comparison has the form of the result.

    before, after: the folder of a run or of an evaluation; one of them may be "base".
    Raises EvaluationError where a name is neither, where results are damaged, or where two evaluations are of different
    suites; CheckpointError for weights that cannot be read.
    """
    sides = find_sides(before, after)
    suites, notes = _suites(*sides)
    if not suites and all(side.kind == "evaluation" for side in sides):
        raise EvaluationError(f"{before} and {after} are evaluations of different suites: there is nothing to compare")
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
    """Compare the suites that both sides have results of; say which only one has, and which folders are left out."""
    results = [side.results() for side in (before, after)]
    chosen = [one_of_each(side) for side in results]
    suites = [
        report.compare(results[1][folder], results[0][chosen[0][key]], chosen[0][key])
        for key, folder in chosen[1].items()
        if key in chosen[0]
    ]
    notes = [
        f"{key[0]} was evaluated for {side.source} alone; reca eval {key[0]} for the other model adds it here"
        for mine, other, side in ((chosen[0], chosen[1], before), (chosen[1], chosen[0], after))
        for key in mine
        if key not in other
    ]
    if not suites and not notes:
        notes.append("neither model was evaluated; reca eval SUITE RUN --against base adds scores and images here")
    notes += [
        f"{folder} is left out, for {mine[suite_of(result)]} holds {result['suite']}, too; name it in place of its run "
        "to compare it"
        for found, mine in zip(results, chosen, strict=True)
        for folder, result in found.items()
        if folder != mine[suite_of(result)]
    ]
    return suites, notes


def suite_of(result: Mapping[str, Any]) -> tuple[str, str]:
    """Return what two results must share to be compared: the suite, and its protocol."""
    return result["suite"], result["protocol"]


def one_of_each(results: Mapping[Path, Mapping[str, Any]]) -> dict[tuple[str, str], Path]:
    """Choose one folder for every suite: the one that is named after it, and else the first."""
    found: dict[tuple[str, str], Path] = {}
    for folder in sorted(results, key=lambda folder: folder.name != results[folder]["suite"]):
        found.setdefault(suite_of(results[folder]), folder)
    return found


def write(found: dict[str, Any], out: Path, pairs: int = page.PAIRS) -> Path:
    """Write comparison.html and comparison.json into a folder, and return the path of the page.

    pairs: of images in the page, of every suite, at most; gains and losses share them.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "comparison.json", json.dumps(found, indent=1, ensure_ascii=False).encode("utf-8", HALVES))
    path = out / PAGE
    write_atomically(path, page.render(found, out, pairs).encode("utf-8", HALVES))
    return path
