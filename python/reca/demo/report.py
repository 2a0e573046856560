"""Report of the demo: a table for the terminal, and one HTML file with images, curves and settings."""

import platform
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from reca import units
from reca.config.recipe_files import load_recipe
from reca.demo.before_after import NAME, before_after
from reca.demo.measure import Rate
from reca.demo.pretrain import demo_setup, run_overrides
from reca.demo.variants import BEFORE, Outcome, Results, rows
from reca.io import html
from reca.io.image_grid import enlarged, to_pil
from reca.processes.side_by_side import Failure
from reca.toy_datasets.dataset import ToyDataset

PAGE = "report.html"
COLUMNS = ("seen", "held-out")


def table(results: Results) -> str:
    """Tabulate success rates in percent, one row per model, with 95 % intervals or, for several seeds, mean ± std."""
    rows: list[tuple[str, ...]] = [("", *COLUMNS, "overall", "understanding")]
    for name in _names(results):
        overall = _spread([100 * made[name].measured.overall for made in results.values() if name in made])
        cells = [_rates(results, name, rate) for rate in (*COLUMNS, "understanding")]
        rows.append((name, *cells[:-1], overall, cells[-1]))
    seeds = ", ".join(map(str, results))
    return "\n".join(
        [f"images that show what was asked, % (seeds {seeds})", *units.table(rows), "", *verdicts(results)]
    )


def verdicts(results: Results) -> list[str]:
    """Compare RECA with SFT and with the pre-trained model, one sentence for each seed that has all three."""
    sentences = []
    for seed, outcomes in results.items():
        if not outcomes.keys() >= {"RECA", "SFT", BEFORE}:
            continue
        reca, sft, before = (outcomes[name].measured for name in ("RECA", "SFT", BEFORE))
        gap = 100 * (reca.rates["held-out"].share - sft.rates["held-out"].share)
        lows, highs = zip(*(side.rates["held-out"].wilson() for side in (reca, sft)), strict=True)
        apart = max(lows) > min(highs)
        change = 100 * (reca.overall - before.overall)
        kept = 100 * (reca.rates["understanding"].share - before.rates["understanding"].share)
        seen = 100 * (reca.rates["seen"].share - before.rates["seen"].share)
        sentences.append(
            f"seed {seed}: held-out RECA - SFT {gap:+.1f} points, intervals {'apart' if apart else 'OVERLAPPING'}; "
            f"RECA changes overall {change:+.1f}, seen {seen:+.1f}, understanding {kept:+.1f} points"
        )
    return sentences


def summary(results: Results) -> str:
    """Return a line with the held-out rates before and after RECA and SFT."""
    cells = {name: [_rates(results, variant, "held-out") for variant in (BEFORE, name)] for name in ("RECA", "SFT")}
    ways = ", ".join(f"{name} {before} -> {after}" for name, (before, after) in cells.items())
    return f"correct images for pairs that no caption shows, %: {ways}"


def write(
    results: Results,
    umm: str,
    dataset: ToyDataset,
    out: Path,
    scale: float = 1.0,
    failures: Mapping[str, Failure] | None = None,
) -> Path:
    """Write the report as a self-contained HTML file, and before_after.png. Return the report's path.

    failures: failed jobs by name.
    """
    setup, first = demo_setup(umm, dataset), next(iter(results))
    recipe = load_recipe(setup.recipe, [*setup.overrides, *run_overrides(setup.recipe, dataset, first, scale)])
    names = _names(results)
    measured = next(iter(results[first].values())).measured.rates
    details = [
        *(f"{c}, all" for c in dataset.categories),
        *(f"{c} {p}" for c in (*dataset.categories, "understanding") for p in COLUMNS if f"{c} {p}" in measured),
    ]
    page = html.render(
        Path(__file__).with_name("report.html"),
        seeds=list(results),
        failures=failures,
        scale=scale,
        setup=setup,
        dataset=dataset,
        variants={row.name: row.description for row in rows(dataset, setup)},
        names=names,
        table=table(results),
        details={detail: [_rates(results, name, detail) for name in names] for detail in details},
        held_out=sorted(f"{pair.colour} {pair.kind}" for pair in dataset.held_out(first)),
        shown=list(results[first]),
        images={name: _images(outcome) for name, outcome in results[first].items()},
        curves={name: html.loss_curve(o.curve, 300, 90) for name, o in results[first].items() if o.curve},
        steps=recipe.train.steps,
        settings=asdict(recipe),
        seconds={name: f"{outcome.seconds:.0f}" for name, outcome in results[first].items()},
        machine=f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}",
        command=f"reca demo --dataset {dataset.name} --umm {umm} --seeds {len(results)}"
        + (f" --scale {scale:g}" if scale != 1 else ""),
    )
    path = out / PAGE
    path.write_text(page, encoding="utf-8")
    before_after(results[first], dataset, first).save(out / NAME, optimize=True)
    return path


def _names(results: Results) -> list[str]:
    """List the models that any seed has, in the order of the seed that has most."""
    most = sorted(results.values(), key=len, reverse=True)
    return list(dict.fromkeys(name for made in most for name in made))


def _rates(results: Results, name: str, rate: str) -> str:
    """Format a rate of a model over the seeds that have it."""
    return _cell([made[name].measured.rates[rate] for made in results.values() if name in made])


def _cell(rates: list[Rate]) -> str:
    if not rates:
        return "-"
    if len(rates) > 1:
        return _spread([100 * rate.share for rate in rates])
    low, high = rates[0].wilson()
    return f"{100 * rates[0].share:.1f} [{100 * low:.0f}, {100 * high:.0f}]"


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def _images(outcome: Outcome, per_row: int = 12) -> list[dict[str, Any]]:
    """Return the enlarged images of every ninth prompt, with prompt and verdict."""
    chosen = outcome.measured.samples[::9][: 4 * per_row]
    return [{"prompt": text, "hit": hit, "source": _enlarged(image)} for text, image, hit in chosen]


def _enlarged(image: torch.Tensor) -> str:
    shown = to_pil(image)
    return html.png_url(enlarged(shown, max(1, 60 // shown.width)))
