"""Losses of two runs, and the recipe keys that differ."""

import math
from pathlib import Path
from typing import Any

from reca.comparison.sides import Side
from reca.config.recipe_files import by_key
from reca.io import jsonl
from reca.runs.lineage import is_run

POINTS = 400  # maximum per curve, to limit the size of the page
OWN = ("run_dir",)  # keys that always differ


def loss_curves(before: Side, after: Side) -> list[dict[str, Any]]:
    """Read all losses that either run has logged, subsampled evenly to at most POINTS points.

    The curve of an earlier checkpoint ends at its step.
    """
    sides = [_losses(side.run_dir, _last_step(side)) for side in (before, after)]
    names = dict.fromkeys(name for side in sides for name in side)
    return [{"name": name, "before": sides[0].get(name, []), "after": sides[1].get(name, [])} for name in names]


def _last_step(side: Side) -> float:
    return math.inf if side.step is None or is_run(side.source) else side.step


def _losses(run_dir: Path | None, last: float = math.inf) -> dict[str, list[list[float]]]:
    curves: dict[str, list[list[float]]] = {}
    for values in jsonl.read_log(run_dir / "log.jsonl") if run_dir else ():
        for name, value in values.items() if values["step"] <= last else ():
            if name.endswith("/loss") and isinstance(value, int | float):
                curves.setdefault(name, []).append([values["step"], value])
    return {name: _thinned(points) for name, points in curves.items()}


def _thinned(points: list[list[float]]) -> list[list[float]]:
    stride = -(-len(points) // POINTS)
    return points[::-1][::stride][::-1]  # always includes the last point


def setting_differences(before: Side, after: Side) -> list[dict[str, Any]]:
    """List the recipe keys that differ between two runs; [] unless both sides are runs."""
    if before.kind != "run" or after.kind != "run" or before.recipe is None or after.recipe is None:
        return []
    sides = [by_key(recipe) for recipe in (before.recipe, after.recipe)]
    return [
        {"key": key, "before": sides[0].get(key), "after": sides[1].get(key)}
        for key in dict.fromkeys([*sides[0], *sides[1]])
        if key not in OWN and sides[0].get(key) != sides[1].get(key)
    ]
