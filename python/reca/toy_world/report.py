"""What the demo says: a table for the terminal, and one HTML file with pictures, curves and settings."""

import base64
import io
import platform
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import Environment, FileSystemLoader, select_autoescape
from PIL import Image

from reca.config import as_dict, load_recipe
from reca.log import grid
from reca.toy_world.measure import CATEGORIES, Rate
from reca.toy_world.pretrain import scaled, start
from reca.toy_world.scenes import held_out_pairs

if TYPE_CHECKING:
    from reca.toy_world.experiment import Outcome

Results = dict[int, dict[str, "Outcome"]]
SHOWN = ("seen", "held-out")


def table(results: Results) -> str:
    """Rows of models, columns of success rates in percent: with 95 % intervals for one seed, mean ± deviation else."""
    rows = [("", *SHOWN, "overall", "understanding")]
    for name in _names(results):
        cells = [_cell([results[s][name].measured.rates[r] for s in results]) for r in SHOWN]
        overall = _spread([100 * results[s][name].measured.overall for s in results])
        kept = _cell([results[s][name].measured.rates["understanding"] for s in results])
        rows.append((name, *cells, overall, kept))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    seeds = ", ".join(map(str, results))
    return "\n".join([f"pictures that show what was asked, % (seeds {seeds})", *lines, "", *verdicts(results)])


def verdicts(results: Results) -> list[str]:
    """What the numbers say, for better or worse."""
    said = []
    for seed, outcomes in results.items():
        reca, sft, before = (outcomes[name].measured for name in ("RECA", "SFT", "before"))
        gap = 100 * (reca.rates["held-out"].share - sft.rates["held-out"].share)
        apart = reca.rates["held-out"].wilson()[0] > sft.rates["held-out"].wilson()[1]
        change = 100 * (reca.overall - before.overall)
        kept = 100 * (reca.rates["understanding"].share - before.rates["understanding"].share)
        seen = 100 * (reca.rates["seen"].share - before.rates["seen"].share)
        said.append(
            f"seed {seed}: held-out RECA - SFT {gap:+.1f} points, intervals {'apart' if apart else 'OVERLAPPING'}; "
            f"RECA changes overall {change:+.1f}, seen {seen:+.1f}, understanding {kept:+.1f} points"
        )
    return said


def write(results: Results, umm: str, out: Path, scale: float = 1.0) -> Path:
    """The report as one self-contained file."""
    from reca.toy_world.experiment import arms

    begin, first = start(umm), next(iter(results))
    recipe = load_recipe(begin.recipe)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = _names(results)
    details = [
        *(f"{c}, all" for c in CATEGORIES),
        *(f"{c} {p}" for c in ("colour", "attribution", "position") for p in SHOWN),
    ]
    page = environment.get_template("report.html").render(
        seeds=list(results),
        scale=scale,
        begin=begin,
        arms={arm.name: arm.says for arm in arms(begin)},
        names=names,
        table=table(results),
        details={
            detail: [_cell([results[s][name].measured.rates[detail] for s in results]) for name in names]
            for detail in details
        },
        held_out=sorted(f"{pair.colour} {pair.shape}" for pair in held_out_pairs(first)),
        pictures={name: _pictures(results[first][name]) for name in names},
        curves={name: _curve(results[first][name].curve) for name in names},
        steps=scaled(recipe.train.steps, scale),
        settings=as_dict(recipe),
        seconds={name: f"{results[first][name].seconds:.0f}" for name in names},
        machine=f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}",
        command=f"reca demo --umm {umm} --seeds {len(results)}" + (f" --scale {scale:g}" if scale != 1 else ""),
    )
    path = out / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _names(results: Results) -> list[str]:
    return list(next(iter(results.values())))


def _cell(rates: list[Rate]) -> str:
    if len(rates) > 1:
        return _spread([100 * rate.share for rate in rates])
    low, high = rates[0].wilson()
    return f"{100 * rates[0].share:.1f} [{100 * low:.0f}, {100 * high:.0f}]"


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def _pictures(outcome: "Outcome", per_row: int = 12) -> list[dict[str, Any]]:
    """Every ninth prompt's picture, enlarged, with its verdict."""
    chosen = outcome.measured.samples[::9][: 4 * per_row]
    return [{"prompt": text, "hit": hit, "png": _png(picture)} for text, picture, hit in chosen]


def _png(picture: torch.Tensor) -> str:
    image = grid([picture])
    buffer = io.BytesIO()
    image.resize((3 * image.width, 3 * image.height), Image.Resampling.NEAREST).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _curve(points: list[tuple[int, float]], width: int = 300, height: int = 90) -> dict[str, Any]:
    """Polyline coordinates of a loss curve, its ends in words."""
    if not points:
        return {"line": "", "first": 0.0, "last": 0.0, "top": 0.0}
    last, top = points[-1][0], max(loss for _, loss in points)
    line = " ".join(f"{x / last * width:.1f},{height - y / max(top, 1e-9) * height:.1f}" for x, y in points)
    return {"line": line, "first": points[0][1], "last": points[-1][1], "top": top}
