"""The comparison as JSON, and both of its files."""

import json
from pathlib import Path
from typing import Any

from reca.comparison import page
from reca.comparison.curves import loss_curves, setting_differences
from reca.comparison.sides import RESULTS, Side, find_sides
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
    """Compare the suites that both sides have results of; say which only one has."""
    found = []
    for side in (before, after):
        results = {folder: report.read(folder / RESULTS) for folder in side.evaluations}
        found.append({result["suite"]: (result, folder) for folder, result in results.items()})
    suites = [report.compare(result, *found[0][name]) for name, (result, _) in found[1].items() if name in found[0]]
    notes = [
        f"{name} was evaluated for {side.source} alone; reca eval {name} for the other model adds it here"
        for mine, other, side in ((found[0], found[1], before), (found[1], found[0], after))
        for name in mine
        if name not in other
    ]
    if not suites and not notes:
        notes.append("neither model was evaluated; reca eval SUITE RUN --against base adds scores and images here")
    return suites, notes


def write(found: dict[str, Any], out: Path, pairs: int = page.PAIRS) -> Path:
    """Write comparison.html and comparison.json into a folder, and return the path of the page.

    pairs: of images in the page, of every suite, at most; gains and losses share them.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "comparison.json", json.dumps(found, indent=1, ensure_ascii=False).encode("utf-8", HALVES))
    path = out / PAGE
    write_atomically(path, page.render(found, out, pairs).encode("utf-8", HALVES))
    return path
