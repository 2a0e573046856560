"""Marks in replies and averages of WISE's two protocols. These are not comparable: prompts, marks and weights differ.

Source: PKU-YuanGroup/WISE, WISE_legacy/Calculate.py and calculate_verified.py.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from reca.eval.suites.base import mean

MARKS = ("consistency", "realism", "aesthetic_quality")


@dataclass(frozen=True)
class Protocol:
    """A protocol: prompt ids of each category, and the category's weight in the overall value."""

    name: str
    ids: Mapping[str, range]
    weights: Mapping[str, float]

    def category(self, prompt_id: int) -> str | None:
        return next((name for name, ids in self.ids.items() if prompt_id in ids), None)


def _ids(*starts: int) -> dict[str, range]:
    names = ("CULTURE", "TIME", "SPACE", "BIOLOGY", "PHYSICS", "CHEMISTRY")
    return {n: range(a, b) for n, a, b in zip(names, starts, [*starts[1:], 1001], strict=True)}


LEGACY = Protocol(
    "WISE_legacy",
    _ids(1, 401, 568, 701, 801, 901),
    {"CULTURE": 0.4, "TIME": 0.167, "SPACE": 0.133, "BIOLOGY": 0.1, "PHYSICS": 0.1, "CHEMISTRY": 0.1},
)
VERIFIED = Protocol(
    "WISE_Verified",
    _ids(1, 401, 521, 641, 761, 881),
    {"CULTURE": 0.4, "TIME": 0.12, "SPACE": 0.12, "BIOLOGY": 0.12, "PHYSICS": 0.12, "CHEMISTRY": 0.12},
)


def legacy_marks(reply: str) -> dict[str, float]:
    """Parse the three marks, 0 to 2, of WISE's first protocol. Return those found; the last occurrence counts.

    If no mark is named, the first three lines that are only a mark are used in order.
    """
    found: dict[str, float] = {}
    for name in MARKS:
        if marks := re.findall(rf"\*{{0,2}}{name.replace('_', ' ')}\*{{0,2}}\s*:?\s*(\d)", reply, re.IGNORECASE):
            found[name] = float(marks[-1])
    lines = [line.strip() for line in reply.splitlines() if line.strip() in ("0", "1", "2")]
    if not found and len(lines) >= 3:
        found = dict(zip(MARKS, map(float, lines), strict=False))
    return found


def verified_mark(reply: str) -> float | None:
    """Parse the binary mark of WISE_Verified. None: not found."""
    if found := re.search(r"\*{0,2}Score\*{0,2}\s*:?\s*([01])\b", reply, re.IGNORECASE):
        return float(found[1])
    lines = [line.strip() for line in reply.splitlines() if line.strip() in ("0", "1")]
    return float(lines[0]) if len(lines) == 1 else None


def average(
    rows: Iterable[Mapping[str, Any]], protocol: Protocol, value_of: Callable[[Mapping[str, Any]], float | None]
) -> tuple[dict[str, float], float | None]:
    """Average the rows of WISE's result files. Return the mean of each category and the overall value.

    rows: each with prompt_id and marks; rows of unknown prompts are ignored.
    value_of: returns the value of a row, None if its marks are invalid.
    The overall value is None unless every prompt has a row and every category a value.
    """
    present: set[int] = set()
    values: dict[str, list[float]] = {}
    for row in rows:
        if (category := protocol.category(row["prompt_id"])) is None:
            continue
        present.add(row["prompt_id"])
        if (value := value_of(row)) is not None:
            values.setdefault(category, []).append(value)
    means = {name: mean(values[name]) for name in protocol.ids if name in values}
    complete = len(present) == sum(map(len, protocol.ids.values())) and len(means) == len(protocol.ids)
    overall = sum(weight * means[name] for name, weight in protocol.weights.items()) if complete else None
    return means, overall


def legacy_value(row: Mapping[str, Any]) -> float | None:
    """Return the WiScore of a row, from its three marks; None if a mark is not a number."""
    marks: list[Any] = [row.get(name) for name in MARKS]
    if not all(isinstance(mark, int | float) for mark in marks):
        return None
    consistency, realism, aesthetic = marks
    return (0.7 * consistency + 0.2 * realism + 0.1 * aesthetic) / 2


def verified_value(row: Mapping[str, Any]) -> float | None:
    """Return the binary mark of a row; None if it is not 0 or 1."""
    score = row.get("score")
    return float(score) if isinstance(score, int | float) and score in (0, 1) else None
