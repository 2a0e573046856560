"""Averages of WISE's two protocols, which are never mixed: their prompts, marks and weights differ.

Source: PKU-YuanGroup/WISE, WISE_legacy/Calculate.py and calculate_verified.py; the RECA release's Benchmark/wise.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from reca.eval.suites.base import mean
from reca.eval.suites.marks import NOT_FOUND, WISE_MARKS, wise_score


@dataclass(frozen=True)
class Protocol:
    """Prompt ids per category (in order) and the category's weight in the overall value."""

    name: str
    ids: Mapping[str, range]
    weights: Mapping[str, float]

    def category(self, prompt_id: int) -> str | None:
        return next((name for name, ids in self.ids.items() if prompt_id in ids), None)


def _ids(starts: Sequence[int], end: int) -> dict[str, range]:
    names = ("CULTURE", "TIME", "SPACE", "BIOLOGY", "PHYSICS", "CHEMISTRY")
    return {n: range(a, b) for n, a, b in zip(names, starts, [*starts[1:], end + 1], strict=True)}


LEGACY = Protocol(
    "WISE_legacy",
    _ids((1, 401, 568, 701, 801, 901), 1000),
    {"CULTURE": 0.4, "TIME": 0.167, "SPACE": 0.133, "BIOLOGY": 0.1, "PHYSICS": 0.1, "CHEMISTRY": 0.1},
)
VERIFIED = Protocol(
    "WISE_Verified",
    _ids((1, 401, 521, 641, 761, 881), 1000),
    {"CULTURE": 0.4, "TIME": 0.12, "SPACE": 0.12, "BIOLOGY": 0.12, "PHYSICS": 0.12, "CHEMISTRY": 0.12},
)
# What a run over a part of the categories has to hold.
PARTS = {
    "all": tuple(LEGACY.ids),
    "culture": ("CULTURE",),
    "space-time": ("TIME", "SPACE"),
    "science": ("BIOLOGY", "PHYSICS", "CHEMISTRY"),
}


class Averages(NamedTuple):
    """means: per category. counts: marks per category. overall: None unless all categories are there.

    missing: prompt ids without a line; with any, the public scripts stop without a figure.
    """

    means: dict[str, float]
    counts: dict[str, int]
    overall: float | None
    missing: list[int]
    skipped: int


def average(
    rows: Iterable[Any], protocol: Protocol, value_of: Callable[[Mapping[str, Any]], float | None], part: str = "all"
) -> Averages:
    """Average the lines of WISE's result files.

    rows: mappings with prompt_id and marks; anything else, such as a line that was no JSON, is skipped and counted.
    value_of: the value of a line, None where its marks are none.
    """
    present: set[int] = set()
    values: dict[str, list[float]] = {}
    skipped = 0
    for row in rows:
        number = row.get("prompt_id") if isinstance(row, Mapping) else None
        category = protocol.category(number) if isinstance(number, int) else None
        if not isinstance(number, int) or category is None:
            skipped += 1
            continue
        present.add(number)
        value = value_of(row)
        if value is None:
            skipped += 1
        else:
            values.setdefault(category, []).append(value)
    wanted = [number for name in PARTS[part] for number in protocol.ids[name]]
    missing = [number for number in wanted if number not in present]
    means = {name: mean(values[name]) for name in protocol.ids if name in values}
    overall = None
    if not missing and len(means) == len(protocol.ids):
        overall = sum(weight * means[name] for name, weight in protocol.weights.items())
    return Averages(means, {name: len(group) for name, group in values.items()}, overall, missing, skipped)


def legacy_value(row: Mapping[str, Any]) -> float | None:
    """Return the WiScore of a line; None for marks that are no numbers."""
    marks: dict[str, Any] = {name: row.get(name) for name in WISE_MARKS}
    return wise_score(marks) if all(isinstance(mark, int | float) for mark in marks.values()) else None


def verified_value(row: Mapping[str, Any]) -> float | None:
    """Return the binary mark of a line; None for anything but 0 or 1."""
    score = row.get("score")
    return float(score) if isinstance(score, int | float) and score in (0, 1) else None


def release_text(files: Sequence[Sequence[Mapping[str, Any]]], subcategory: Callable[[int], str]) -> str:
    """Write results.txt as the RECA release does, from its three files: culture, space-time, science.

    Its overall is the plain mean of the six. Raises TypeError, as it does, where culture or space-time has a line too
    few or a mark of 9.9. subcategory: of a prompt id; "Horizontal time" and "Longitudinal time" are time.
    """
    culture, space_time, science = files
    for rows, count in ((culture, 400), (space_time, 300)):
        if len(rows) < count or any(row[name] == NOT_FOUND for row in rows for name in WISE_MARKS):
            raise TypeError("the release's script has no result: a line is missing, or a mark was not found (9.9)")
    groups: dict[str, list[float]] = {
        name: [] for name in ("Cultural", "Time", "Space", "Biology", "Physics", "Chemistry")
    }
    groups["Cultural"] = [wise_score(dict(row)) for row in culture]
    for row in space_time:
        time = subcategory(row["prompt_id"]) in ("Horizontal time", "Longitudinal time")
        groups["Time" if time else "Space"].append(wise_score(dict(row)))
    for row in science:
        category = LEGACY.category(row["prompt_id"])
        if category is not None and category.title() in groups:
            groups[category.title()].append(wise_score(dict(row)))
    means = {name: mean(values) for name, values in groups.items()}
    means["Overall"] = mean(list(means.values()))
    return " ".join(means) + " \n" + " ".join(f"{value:.2f}" for value in means.values()) + " \n"
