"""The HTML page: self-contained, with images, curves and tables, without external URLs."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from reca.data.errors import BadSample
from reca.data.pixels import open_rgb
from reca.eval import figures, report
from reca.eval.errors import EvaluationError
from reca.io import html

PAIRS = 60  # default number of image pairs per suite
SIDE = 512  # maximum of an image's longer side, in pixels
SMALL = 128  # images up to this size are shown without smoothing
WIDTH, HEIGHT = 320, 120  # of a chart


def render(found: dict[str, Any], folder: Path, pairs: int = PAIRS) -> str:
    """Render the page of a comparison. folder: that of comparison.json, which the paths of images are relative to."""
    return html.render(
        Path(__file__).with_name("page.html"),
        before=found["before"],
        after=found["after"],
        suites=[_suite(suite, pairs) for suite in found["suites"]],
        curves=[_chart(curve) for curve in found["curves"]],
        settings=[{k: _value(v) for k, v in row.items()} for row in found["settings"]],
        understanding=found["understanding"],
        reconstructions=_reconstructions(found["reconstructions"], folder),
        notes=found["notes"],
    )


def _suite(suite: dict[str, Any], pairs: int) -> dict[str, Any]:
    against, unit = suite["against"], suite["overall"]["unit"]
    flips = against["flips"]
    gains = [row for row in flips if row["after"] > row["before"]]
    losses = [row for row in reversed(flips) if row["after"] < row["before"]]
    half = max(pairs // 2, pairs - len(losses))
    shown = gains[:half], losses[: pairs - min(len(gains), half)]
    images = [_images(suite), _images_before(Path(against["folder"]))]
    return {
        "name": suite["protocol"],
        "of": suite["of"],
        "unit": " %" if figures.percentages(unit) else "",
        "headline": _row("overall", suite["overall"], against["overall"], unit),
        "verdict": _verdict(against["overall"]["difference_interval"]),
        "tags": [
            _row(tag, row, against["tags"][tag], unit) for tag, row in suite["tags"].items() if tag in against["tags"]
        ],
        "gains": [_flip(row, images, unit) for row in shown[0]],
        "losses": [_flip(row, images, unit) for row in shown[1]],
        "counts": (len(gains), len(losses)),
        "settings": _settings(suite),
        "differs": {name: [_value(v) for v in values] for name, values in against["differs"].items()},
    }


class Shown(NamedTuple):
    """An image of an item: its score, its file, and the judge's reason."""

    value: float
    path: Path | None
    reason: str


def _images_before(folder: Path) -> dict[str, dict[int, Shown]]:
    """Return the images of the other evaluation; {} if its folder has no results, as after it was moved."""
    try:
        return _images(report.read(folder / report.RESULTS))
    except EvaluationError:
        return {}


def _images(side: dict[str, Any]) -> dict[str, dict[int, Shown]]:
    """Return the images of every item by number: {item: {k: Shown}}. side: results."""
    folder = side.get("images")
    return {
        row["item"]: {
            i["k"]: Shown(i["value"], Path(folder) / i["path"] if folder and i["path"] else None, i["reason"] or "")
            for i in row["images"]
        }
        for row in side["items"]
    }


def _flip(row: dict[str, Any], images: Sequence[dict[str, dict[int, Shown]]], unit: str) -> dict[str, Any]:
    """Describe a prompt whose score changed, with the pair of images from equal noise that differs most."""
    after, before = (side.get(row["item"], {}) for side in images)
    pairs = [(before[k], after[k]) for k in after if k in before]
    sign = 1 if row["after"] > row["before"] else -1
    none = Shown(0.0, None, "")
    old, new = max(pairs, key=lambda pair: sign * (pair[1].value - pair[0].value), default=(none, none))
    return {
        "item": row["item"],
        "tag": row["tag"],
        "prompt": row["prompt"],
        "before": figures.score(row["before"], unit),
        "after": figures.score(row["after"], unit),
        "images": [_image(old.path), _image(new.path)],
        "reasons": [old.reason, new.reason],
    }


def _reconstructions(found: dict[str, Any] | None, folder: Path) -> dict[str, Any] | None:
    """Return the reconstructions with their images embedded."""
    if found is None:
        return None
    names = ("input", "before", "after")
    rows = [{"name": row["name"], "images": [_image(folder / row[name]) for name in names]} for row in found["rows"]]
    return {"pictures": found["pictures"], "source": found["source"], "names": names, "rows": rows}


def _image(path: Path | None) -> dict[str, Any] | None:
    """Return an image as a data URL; None if it cannot be read."""
    if path is None:
        return None
    try:
        image = open_rgb(path.read_bytes())
    except (OSError, BadSample):
        return None
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    small = max(image.size) <= SMALL
    image.save(buffer, "PNG" if small else "JPEG", quality=88)
    kind = "png" if small else "jpeg"
    return {"source": html.data_url(buffer.getvalue(), kind), "small": small}


def _row(name: str, after: dict[str, Any], before: dict[str, Any], unit: str) -> dict[str, str]:
    return {
        "name": name,
        "before": figures.number(before["value"], unit),
        "after": figures.number(after["value"], unit),
        "change": figures.number(before["difference"], unit, sign=True),
        "interval": figures.bounds(before["difference_interval"], unit, sign=True),
        "verdict": _verdict(before["difference_interval"]),
    }


def _verdict(interval: Sequence[float | None]) -> str:
    """Classify a difference by its confidence interval: better, worse, or open if it contains zero."""
    low, high = interval
    if low is not None and low > 0:
        return "better"
    return "worse" if high is not None and high < 0 else "open"


def _settings(suite: dict[str, Any]) -> dict[str, str]:
    judge, model = suite["judge"], suite["model"] or {}
    shown = {
        "judge": f"{judge.get('name')} {judge.get('version') or ''}".strip()
        + (f", {judge['dtype']}" if judge.get("dtype") else "")
        + ("" if judge.get("exact", True) else " (approximate)"),
        "images per item": str(suite["images_per_item"]),
        "sampling": _value(suite["sampling"]),
        "weights after": (model.get("weights_sha256") or "unknown")[:16],
        "weights before": ((suite["against"]["model"] or {}).get("weights_sha256") or "unknown")[:16],
    }
    counts = suite["counts"]
    if counts["failed"] or counts["missing"]:
        shown["left out"] = f"{counts['failed']} failed images, {counts['missing']} missing images"
    return shown


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_value(one)}" for name, one in value.items())
    return "not set" if value is None else str(value)


def _chart(curve: dict[str, Any]) -> dict[str, Any]:
    """Return a loss of both runs as SVG polylines in one chart. Step 0 is at the left, the largest value at the top."""
    points = [*curve["before"], *curve["after"]]
    steps, values = [p[0] for p in points], [p[1] for p in points]
    last, low, top = max(*steps, 1), min(values), max(values)
    span = (top - low) or 1.0

    def line(side: list[list[float]]) -> str:
        return " ".join(f"{x / last * WIDTH:.1f},{HEIGHT - (y - low) / span * HEIGHT:.1f}" for x, y in side)

    ends = {name: f"{curve[name][-1][1]:.4g}" for name in ("before", "after") if curve[name]}
    return {"name": curve["name"], "before": line(curve["before"]), "after": line(curve["after"]), "ends": ends,
            "low": f"{low:.4g}", "top": f"{top:.4g}", "last": int(last), "width": WIDTH, "height": HEIGHT}  # fmt: skip
