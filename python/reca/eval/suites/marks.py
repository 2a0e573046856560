"""Parsing of marks in judges' replies, by each benchmark's own public rule. A reply without marks has no result."""

import json
import math
import re
from typing import Any

# ---- WISE ----

WISE_MARKS = ("consistency", "realism", "aesthetic_quality")
_WISE_NAMES = {"consistency": "Consistency", "realism": "Realism", "aesthetic_quality": "Aesthetic Quality"}


def wise_legacy(reply: str) -> dict[str, float]:
    """Parse the three marks, 0 to 2, of WISE's first protocol. Return those found; the last occurrence counts.

    If no mark is named, the first three lines that are only a mark are used in order.
    """
    found: dict[str, float] = {}
    for key, name in _WISE_NAMES.items():
        if marks := re.findall(rf"\*{{0,2}}{name}\*{{0,2}}\s*:?\s*(\d)", reply, re.IGNORECASE):
            found[key] = float(marks[-1])
    lines = [line.strip() for line in reply.splitlines() if line.strip() in ("0", "1", "2")]
    if not found and len(lines) >= 3:
        found = dict(zip(WISE_MARKS, map(float, lines), strict=False))
    return found


def wise_score(marks: dict[str, float]) -> float:
    """Compute the WiScore of an image from its three marks."""
    return (0.7 * marks["consistency"] + 0.2 * marks["realism"] + 0.1 * marks["aesthetic_quality"]) / 2


def wise_verified(reply: str) -> float | None:
    """Parse the binary mark of WISE_Verified. None: not found."""
    if found := re.search(r"\*{0,2}Score\*{0,2}\s*:?\s*([01])\b", reply, re.IGNORECASE):
        return float(found[1])
    lines = [line.strip() for line in reply.splitlines() if line.strip() in ("0", "1")]
    return float(lines[0]) if len(lines) == 1 else None


# ---- ImgEdit ----


def imgedit(reply: str) -> float | None:
    """Parse ImgEdit's marks, lines "name: digits", and return their mean, rounded to two digits. None: no marks.

    Raises ValueError, as the public script does, for digits that int() rejects, such as superscripts.
    """
    marks = []
    for line in reply.splitlines():
        parts = line.strip().split(": ")
        if len(parts) == 2 and parts[1].isdigit():
            marks.append(int(parts[1]))
    return round(sum(marks) / len(marks), 2) if marks else None


# ---- GEdit (VIEScore) ----

_DELIMITER = "||V^=^V||"
RATE_LIMIT = "rate_limit_exceeded"


def viescore(reply: str) -> list[Any] | None:
    """Parse the marks of a VIEScore reply. None: the public parser would fail, or guess."""
    found = viescore_object(reply)
    marks = None if found is None else found.get("score")
    return marks if isinstance(marks, list) else None


def viescore_object(reply: str) -> dict[str, Any] | None:
    """Parse a VIEScore reply to an object, as the first attempt of the public parser does, without guessing."""
    if reply == RATE_LIMIT:
        return None
    if reply.count(_DELIMITER) == 2:
        text = reply.split(_DELIMITER)[1]
    elif "{" in reply and "}" in reply:
        text = reply[reply.find("{") : reply.rfind("}") + 1]
    else:
        return _bare(reply)
    text = text.strip().replace("\n", "")
    try:
        value = json.loads(text)
        marks = value["score"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return _repaired(text)
    return value | {"score": marks if isinstance(marks, list) else [marks]}


def _bare(reply: str) -> dict[str, Any] | None:
    """Parse a reply without braces: a list of two integers, or one integer from 0 to 10."""
    listed = reply[reply.find("[") : reply.rfind("]") + 1]
    if re.match(r"\[\d+, ?\d+\]$", listed):
        return {"score": json.loads(listed)}
    try:
        number = int(reply)
    except ValueError:
        return None
    return {"score": [number]} if 0 <= number <= 10 else None


def _repaired(text: str) -> dict[str, Any] | None:
    """Quote keys and words and put numbers in brackets, the only repair that the public parser makes."""

    def repaired(pair: re.Match) -> str:
        key, value, end = pair[1], pair[2].strip(), pair[3]
        if re.match(r"-?\d+(\.\d+)?$", value):
            return f"{key}: [{value}]{end}"
        literal = value.lower() in ("true", "false", "null")
        return f"{key}: {value}{end}" if literal else f'{key}: "{value}"{end}'

    quoted = re.sub(r"(\w+):", r'"\1":', text)
    try:
        value = json.loads(re.sub(r'(".*?"):(.*?)([,}])', repaired, quoted))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def gedit_item(semantics: list[Any], quality: list[Any]) -> tuple[float, float, float]:
    """Compute (semantics, quality, overall) of an item: the minima of the marks, and the root of their product.

    Raises ValueError if there are no marks, or one is not a finite number of at least 0.
    """
    for name, marks in (("semantics", semantics), ("quality", quality)):
        good = all(
            isinstance(m, int | float) and not isinstance(m, bool) and math.isfinite(m) and m >= 0 for m in marks
        )
        if not marks or not good:
            raise ValueError(f"the judge's marks for {name} are {marks!r}; expected numbers from 0 to 10")
    low = float(min(semantics)), float(min(quality))
    return *low, math.sqrt(low[0] * low[1])


# ---- MME ----


def mme_harness(reply: str) -> str:
    """Parse a reply as yes, no or other, as lmms-eval does."""
    text = reply.lower().strip().replace(".", "")
    if text in ("yes", "no"):
        return text
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text, "other")
    head = text[:4]
    return "yes" if "yes" in head else "no" if "no" in head else "other"


def mme_release_reply(reply: str) -> str:
    """Rewrite an answer as the RECA release does before writing it to the files for MME's script."""
    text = reply.replace("\n", "").replace("不是", "No").replace("是", "Yes").replace("否", "No")
    return text.lower().replace("true", "yes").replace("false", "no")


def mme_release(reply: str) -> str:
    """Parse a reply as yes, no or other, as the MME script of the RECA release does."""
    text = reply.lower()
    if text in ("yes", "no"):
        return text
    head = text[:4]
    return "yes" if "yes" in head else "no" if "no" in head else "other"
