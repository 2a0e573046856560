"""Steps 3 and 4: results of an evaluation, comparison with another, and text. `reca.eval` describes the format."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reca.errors import first_line
from reca.eval import figures, scoring, statistics
from reca.eval.errors import EvaluationError
from reca.eval.files import is_of_training
from reca.eval.records import Record
from reca.eval.shape import RESULTS as SHAPE
from reca.eval.statistics import Interval
from reca.eval.suites import Item, Key, Score, Suite
from reca.eval.suites.base import agree
from reca.io.files import parse_json
from reca.io.paths import is_dir, is_file
from reca.io.shape import misfit

RESULTS, FORMAT = "results.json", 1
TOP = {"fraction": 1.0, "percent": 100.0}  # upper bound of values, by unit; points have none in common
AVERAGE = "moving average of the weights"
SETTINGS = ("sampling", "images_per_item", "judge")  # should be equal in two evaluations


def results(
    suite: Suite,
    items: Sequence[Item],
    found: Mapping[Key, str],
    records: Sequence[Record],
    judge: Mapping[str, Any],
    generation: Mapping[str, Any],
    missing: int = 0,
) -> dict[str, Any]:
    """Score records and return the contents of results.json.

    found: path of each image, relative to the folder of images. generation: contents of generation.json, {} if unknown.
    Raises EvaluationError if no image could be judged.
    """
    score = scoring.score(suite, {r.key: r.answer for r in records if r.error is None}, items)
    failed = [(r.key, r.error) for r in records if r.error is not None] + list(score.failed)
    if not score.values:
        reason = f"; item {failed[0][0][0]}: {failed[0][1]}" if failed else ""
        raise EvaluationError(f"{suite.name}: there is nothing to score, {len(failed)} images failed{reason}")
    rows = _rows(score)
    estimate = statistics.estimate(rows, score.weights, TOP.get(suite.unit))
    by_item: dict[str, list[dict[str, Any]]] = {}
    for value in score.values:
        image = {"k": value.k, "path": found.get((value.item, value.k)), "value": value.value, "reason": value.reason}
        by_item.setdefault(value.item, []).append(image)
    known = {item.id: item for item in items}
    counts = [len(images) for images in by_item.values()]
    return {
        "format": FORMAT,
        "suite": suite.name,
        "protocol": suite.protocol,
        "model": generation.get("model"),
        "sampling": {**generation.get("sampling", {}), "seed": generation.get("seed")} if generation else None,
        "images_per_item": max(set(counts), key=counts.count),
        "counts": {"items": len(by_item), "images": len(score.values), "failed": len(failed), "missing": missing},
        "judge": dict(judge),
        "overall": {**_interval(estimate.overall), "unit": suite.unit},
        "weights": score.weights,
        "tags": {
            tag: {**_interval(interval), "items": len({v.item for v in score.values if v.tag == tag}),
                  "images": sum(v.tag == tag for v in score.values)}
            for tag, interval in estimate.tags.items()
        },
        "metrics": score.metrics,
        "items": [
            {**identity(known[name]), "value": math.fsum(i["value"] for i in images) / len(images), "images": images}
            for name, images in by_item.items()
        ],
        "failed": [{"item": key[0], "k": key[1], "error": error} for key, error in failed],
        "power": None,
        "against": None,
    }  # fmt: skip


def identity(item: Item) -> dict[str, Any]:
    """Return the part of an item's results that must be equal in two evaluations that are compared."""
    return {"item": item.id, "tag": item.tag, "prompt": item.prompt, "digest": item.digest}


def check_comparable(after: Mapping[str, Any], before: Mapping[str, Any], folder: Path) -> None:
    """Raise EvaluationError if suites differ, if items differ under the same ids, or if there is no common item.

    after: results, of which only suite, protocol and items are read. folder: that of `before`.
    """
    if (after["suite"], after["protocol"]) != (before["suite"], before["protocol"]):
        raise EvaluationError(
            f"{before['protocol']} ({folder}) and {after['protocol']} are different suites; their scores cannot be "
            "compared"
        )
    common = _common(after, before)
    others = [row["item"] for row, old in common if not _same_item(row, old)]
    if others:
        raise EvaluationError(
            f"{folder} has different prompts, sources or questions from this evaluation under {len(others)} ids, such "
            f"as {others[0]}; their scores cannot be compared: evaluate both with the same options and files of the "
            "suite"
        )
    if not common:
        raise EvaluationError(f"{folder} has no prompts of this evaluation, or no images of them")


def _common(after: Mapping[str, Any], before: Mapping[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Pair the results of the items that both evaluations have."""
    known = {row["item"]: row for row in before["items"]}
    return [(row, known[row["item"]]) for row in after["items"] if row["item"] in known]


def _same_item(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    same = all(row[name] == other[name] for name in ("tag", "prompt"))
    return same and agree(row.get("digest"), other.get("digest"))


def compare(after: dict[str, Any], before: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return results with the comparison, `against` and `power`, added. folder: that of `before`.

    Raises EvaluationError if they cannot be compared; see `check_comparable`.
    """
    check_comparable(after, before, folder)
    sides, unit = [_rows_of_results(side) for side in (after, before)], after["overall"]["unit"]
    differs = {name: [before[name], after[name]] for name in SETTINGS if before[name] != after[name]}
    top = TOP.get(unit) if differs or not _same_model(after, before) else None
    change = statistics.difference(sides[0], sides[1], after["weights"], top)
    common = _common(after, before)
    shared = {row["item"] for row, _ in common}
    old = statistics.estimate([row for row in sides[1] if row[1] in shared], after["weights"], TOP.get(unit))
    scale = TOP.get(unit) or abs(after["overall"]["value"]) or 1.0
    table = statistics.power(sides[0], sides[1], after["weights"], [step * scale for step in (0.01, 0.02, 0.05)])
    flips = [
        {"item": row["item"], "tag": row["tag"], "prompt": row["prompt"], "before": old_row["value"],
         "after": row["value"]}
        for row, old_row in common
        if old_row["value"] != row["value"]
    ]  # fmt: skip
    flips.sort(key=lambda row: row["before"] - row["after"])
    return after | {
        "power": [entry._asdict() for entry in table] or None,
        "against": {
            "folder": str(folder),
            "model": before["model"],
            "items": len(shared),
            "overall": _interval(old.overall) | _change(change.overall),
            "tags": {tag: _interval(old.tags[tag]) | _change(change.tags[tag]) for tag in change.tags},
            "identical_settings": not differs,
            "differs": differs,
            "flips": flips,
        },
    }


def read(path: Path) -> dict[str, Any]:
    """Read results.json. Raises EvaluationError if it is missing or invalid, including NaN or infinite numbers."""
    if not is_file(path):
        raise EvaluationError(f"{path} does not exist; add the step score")
    try:
        found = _parse(path.read_bytes())
    except ValueError as error:
        way = f"delete {path.parent} to leave this evaluation out"
        if not is_of_training(path.parent):
            way = f"repeat its `reca eval`, which uses its images and records again, or {way}"
        raise EvaluationError(
            f"{path} cannot be read: expected results of format {FORMAT} ({first_line(error)}); {way}"
        ) from error
    beside = path.parent / "images"
    if found.get("images") and not is_dir(Path(found["images"])) and is_dir(beside):
        found["images"] = str(beside)  # the folder was moved, or the working directory is another one
    return found


def _parse(content: bytes) -> dict[str, Any]:
    """Parse results.json. Raises ValueError with the reason if it is not one of FORMAT."""
    found = parse_json(content, parse_constant=_no_number)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError("it has another format")
    if (place := misfit(found, SHAPE)) is not None:
        raise ValueError(f"{place[1:]} is missing, or is of another type")
    return found


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not a finite number")


def _same_model(after: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    hashes = [(side["model"] or {}).get("weights_sha256") for side in (after, before)]
    return hashes[0] is not None and hashes[0] == hashes[1]


def _rows(score: Score) -> list[tuple[str, str, float]]:
    return [(value.tag, value.item, value.value) for value in score.values]


def _rows_of_results(side: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    return [(row["tag"], row["item"], image["value"]) for row in side["items"] for image in row["images"]]


def _interval(interval: Interval) -> dict[str, Any]:
    bounds = [bound if math.isfinite(bound) else None for bound in (interval.low, interval.high)]
    return {"value": interval.value, "interval": bounds}


def _change(interval: Interval) -> dict[str, Any]:
    found = _interval(interval)
    return {"difference": found["value"], "difference_interval": found["interval"]}


# ---- text ----


def text(found: Mapping[str, Any]) -> str:
    """Format results for a terminal."""
    counts, unit, against = found["counts"], found["overall"]["unit"], found["against"]
    lines = [
        f"{found['protocol']}: {counts['images']} images of {counts['items']} items, {_judge(found['judge'])}",
        f"model: {_model(found['model'])}",
    ]
    if against:
        lines.append(f"against: {_model(against['model'])} ({against['folder']})")
    widths = max(map(len, [*found["tags"], "overall"]))
    for name, row in [*found["tags"].items(), ("overall", found["overall"])]:
        line = f"  {name:<{widths}}  {figures.score(row['value'], unit):>8}  {figures.bounds(row['interval'], unit)}"
        if against and (before := against["overall"] if name == "overall" else against["tags"].get(name)):
            change = figures.difference(before["difference"], unit)
            line += f"   before {figures.score(before['value'], unit):>8}   change {change:>12}  "
            line += figures.bounds(before["difference_interval"], unit, sign=True)
        lines.append(line)
    if against:
        gains = sum(row["after"] > row["before"] for row in against["flips"])
        lines.append(f"prompts: {gains} gained, {len(against['flips']) - gains} lost of {against['items']} in both")
        lines += _caution(found["model"], against)
        lines += _power_lines(found["power"] or [], unit)
    if counts["failed"] or counts["missing"]:
        lines.append(f"{counts['failed']} images failed and {counts['missing']} are missing; the scores exclude them")
    lines.append("intervals: 95 %, over prompts within tags")
    return "\n".join(lines)


def _caution(model: Mapping[str, Any] | None, against: Mapping[str, Any]) -> list[str]:
    """Say in a line what besides training may have caused the change, if anything did."""
    kinds = [side["umm"] for side in (against["model"], model) if side and "umm" in side]
    names = ", ".join(against["differs"])
    if len(set(kinds)) == 2:
        also = f" and also differ in {names}" if names else ""
        return [f"the two are different models ({' and '.join(kinds)}){also}: the change is not one of training"]
    return [f"the two also differ in {names}: the change may not be due to training alone"] if names else []


def _power_lines(table: Sequence[Mapping[str, Any]], unit: str) -> list[str]:
    """Format the power table, one line per number of images per item."""
    if not table:
        return []
    differences = list(dict.fromkeys(row["difference"] for row in table))
    lines = [f"power to detect a change of {', '.join(figures.number(d, unit) for d in differences)} points"]
    for count in dict.fromkeys(row["images_per_item"] for row in table):
        cells = [f"{row['power']:5.0%}" for row in table if row["images_per_item"] == count]
        lines.append(f"  with {count:>2} images per item: {' '.join(cells)}")
    return lines


def _judge(judge: Mapping[str, Any]) -> str:
    name = f"judged by {judge.get('name')}"
    if judge.get("exact") is False:
        name += " (approximate: not the judge of the published numbers)"
    return name


def _model(model: Mapping[str, Any] | None) -> str:
    if model is None:
        return "unknown: the images were not generated here"
    umm = [model["umm"]] if model.get("umm") else []
    digest = [f"weights {model['weights_sha256'][:12]}"] if model.get("weights_sha256") else []
    inside = ", ".join([*umm, *weights(model), *digest])
    return f"{model['source']} ({inside})" if inside else model["source"]


def weights(model: Mapping[str, Any]) -> list[str]:
    """Say which weights of its source a model has: the step, and whether they are its moving average."""
    step = [f"step {model['step']}"] if model.get("step") is not None else []
    return [*step, AVERAGE] if model.get("ema") else step
