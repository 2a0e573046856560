"""A study's results as JSON, an HTML page, and text."""

import contextlib
import json
import math
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from reca import units
from reca.io import html
from reca.io.files import parse_json
from reca.io.folders import write_atomically
from reca.io.image_grid import enlarged
from reca.io.paths import is_file
from reca.io.shape import misfit
from reca.studies import judge
from reca.studies.study import BEFORE, PRETRAINED, Study, StudyError
from reca.studies.task import Asked, Task, short

WIDTH, HEIGHT = 220, 70  # of a loss curve
ENLARGED = 3  # factor on images of toy datasets


def folder(study: Study, asked: Asked) -> Path:
    return asked.out / f"{study.name}-{short(asked.recipe) if asked.recipe else f'{asked.umm}-{asked.dataset}'}"


def summarize(
    study: Study, asked: Asked, command: str, tasks: Sequence[Task], results: dict[str, Any], omitted: dict[str, str]
) -> dict[str, Any]:
    """Combine results, intervals and verdicts into the content of study.json (see reca.studies)."""
    have, _ = study.of(asked)
    about = {BEFORE: "the model that the others start from, without post-training"}
    about |= {name: variant.about for name, (variant, _) in have.items()}
    keys = {name: [*overrides, *asked.of_variant.get(name, ())] for name, (_, overrides) in have.items()}
    by_variant: dict[str, dict[int, Any]] = {name: {} for name in about}
    for task in tasks:
        if task.kind != PRETRAINED:
            by_variant[task.variant][task.seed] = results[task.name] | {"folder": str(task.folder)}
    pretrained = {task.name: results[task.name] for task in tasks if task.kind == PRETRAINED}
    variants = []
    for name, found in by_variant.items():
        names = dict.fromkeys(m for r in found.values() for m in r.get("measures", ()))
        means = {m: judge.mean([r["measures"][m] for r in found.values() if m in r.get("measures", ())]) for m in names}
        variants.append(
            {"name": name, "about": about[name], "overrides": keys.get(name, []), "results": found,
             "means": {m: interval.as_dict() for m, interval in means.items()}}
        )  # fmt: skip
    claims = [_claim(claim, asked.setting, by_variant) for claim in study.claims]
    return {
        "study": study.name,
        "question": study.question,
        "paper": [{"says": said.says, "source": said.source} for said in study.paper],
        "open": list(study.open),
        "setting": asked.setting,
        "dataset": asked.dataset if asked.setting == "toy" else None,
        "toy": study.toy if asked.setting == "toy" else None,
        "umm": asked.umm,
        "recipe": tasks[0].recipe,
        "seeds": list(asked.seeds),
        "scale": asked.scale,
        "command": command,
        "machine": f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}",
        "variants": variants,
        "omitted": omitted,
        "failed": [f"{name}: {result['failed']}" for name, result in pretrained.items() if "failed" in result],
        "claims": claims,
        "verdict": judge.overall([claim["verdict"] for claim in claims]),
    }


def _claim(claim, setting: str, by_variant: dict[str, dict[int, Any]]) -> dict[str, Any]:
    measure, sides = claim.measured(setting), []
    for name in (claim.variant, claim.than):
        found = by_variant.get(name, {})
        sides.append({s: r["measures"][measure] for s, r in found.items() if measure in r.get("measures", ())})
    interval = judge.difference(*sides)
    return {
        "says": claim.says,
        "measure": measure,
        "variant": claim.variant,
        "than": claim.than,
        "expect": claim.expect,
        "margin": claim.margin,
        "difference": interval and interval.value,
        "interval": interval and [interval.low, interval.high],
        "verdict": judge.verdict(claim, interval),
    }


def write(found: dict[str, Any], out: Path) -> None:
    """Write study.json and study.html."""
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "study.json", json.dumps(found, indent=1, ensure_ascii=False))
    page = html.render(
        Path(__file__).with_name("page.html"),
        found=found,
        measures=_measures(found),
        cell=cell,
        change=change,
        images=_images(found),
        curves={variant["name"]: _chart(variant) for variant in found["variants"]},
        width=WIDTH,
        height=HEIGHT,
    )
    write_atomically(out / "study.html", page)


def _measures(found: dict[str, Any]) -> list[str]:
    """List the measures of the main table, without those of single tags."""
    return list(dict.fromkeys(m for variant in found["variants"] for m in variant["means"] if "/" not in m))


def cell(interval: dict[str, Any] | None) -> str:
    """Format a mean with its interval."""
    return "" if interval is None else _written(interval["value"], interval["interval"], "", "")


def change(claim: dict[str, Any]) -> str:
    """Format a difference with its interval."""
    if claim["difference"] is None:
        return ""
    return _written(claim["difference"], claim["interval"], "+", " (no interval)")


def _written(value: float, interval: Sequence[float | None], sign: str, without: str) -> str:
    """Format with one decimal, or with three significant digits if value and bounds are below 1, as for a loss.

    without: suffix if there is no interval.
    """
    low, high = interval
    largest = max(abs(number) for number in (value, low, high) if number is not None)
    digits = 2 - math.floor(math.log10(largest)) if value and largest < 1 else 1
    if low is None or high is None:
        return f"{value:{sign}.{digits}f}{without}"
    return f"{value:{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def text(found: dict[str, Any]) -> str:
    """Format the report for a terminal."""
    measures = _measures(found)
    rows = [["", *measures]]
    rows += [[variant["name"], *(cell(variant["means"].get(m)) for m in measures)] for variant in found["variants"]]
    lines = units.table(rows)
    lines += [f"not with {found['umm']}: {name} ({why})" for name, why in found["omitted"].items()]
    lines += found["failed"]
    for variant in found["variants"]:
        lines += [f"{variant['name']}, seed {s}: {r['failed']}" for s, r in variant["results"].items() if "failed" in r]
    lines += ["", *(f"the paper: {said['says']} ({said['source']})" for said in found["paper"])]
    for claim in found["claims"]:
        measured = f", {claim['measure']} {change(claim)}" if claim["difference"] is not None else ""
        lines.append(f"{claim['verdict']}: {claim['says']}: {claim['variant']} - {claim['than']}{measured}")
    return "\n".join(lines)


def _images(found: dict[str, Any]) -> dict[str, Any]:
    """Load the images that every variant generated for the same prompts, for the first seed."""
    shown: dict[str, Any] = {}
    for variant in found["variants"]:
        result: dict[str, Any] = next(iter(variant["results"].values()), {})
        path = Path(result.get("folder", "")) / "images.png"
        if "failed" in result or not is_file(path):
            continue
        with Image.open(path) as image:
            larger = enlarged(image, ENLARGED)
        shown[variant["name"]] = {"source": html.png_url(larger), "width": larger.width}
        if "" not in shown:
            shown[""] = _prompts(path.with_suffix(".json"))
    return shown


def _prompts(path: Path) -> list[dict[str, Any]]:
    """Read the prompts of a variant's images. Raises StudyError if the file is damaged."""
    found: Any = None
    with contextlib.suppress(ValueError):
        found = parse_json(path.read_bytes())
    if misfit(found, [{"prompt": str}]) is not None:
        raise StudyError(f"{path} has no list of prompts: remove {path.with_suffix('.png')} to leave the images out")
    return found


def _chart(variant: dict[str, Any]) -> dict[str, Any] | None:
    """Plot the loss of the first seed that has one."""
    points = next((r["curve"] for r in variant["results"].values() if r.get("curve")), None)
    return html.loss_curve(points, WIDTH, HEIGHT) if points else None
