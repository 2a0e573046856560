"""The demo: pre-train a tiny model, post-train copies of it in different ways, and measure all of them alike."""

import json
import os
import shutil
import time
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

from reca.config import RecipeError, load_recipe
from reca.train import Trainer
from reca.world import report
from reca.world.measure import Measured, measure
from reca.world.pretrain import STEPS, pretrain

RECIPE = "show_o_tiny"
BEFORE = "before"


@dataclass(frozen=True)
class Arm:
    """One way to post-train. All arms make the same number of updates from the same start."""

    name: str
    says: str
    overrides: tuple[str, ...]


def _sft(told: str) -> tuple[str, ...]:
    return ("objective.reca.weight=0", "objective.t2i.weight=1", f"data.captions=world:unlabeled?seed={{seed}}&told={told}")


ARMS = (
    Arm("RECA", "unlabeled images only", ()),
    Arm("SFT", "the same images with the captioner's sparse captions", _sft("sparse")),
    Arm("RECA-codebook", "h_v from the generation codebook", ("model.hv_source=vq", "model.hv_down_scale=1")),
    Arm("RECA-other", "control: the h_v of another image", ("objective.condition=other",)),
    Arm("SFT-half", "captions that tell any colour half the time", _sft("half")),
    Arm("SFT-full", "captions that tell everything", _sft("full")),
)


@dataclass
class Outcome:
    """What one model of one seed came to."""

    measured: Measured
    curve: list[tuple[int, float]]
    seconds: float


def demo(family: str, seeds: int, out: Path) -> dict[int, dict[str, Outcome]]:
    """Run the experiment for seeds 0 ... seeds - 1, print the table and write out/report.html."""
    if family != "show_o":
        raise RecipeError(f"the demo has a tiny pre-trained world for show_o only, not for {family!r}")
    results = run(range(seeds), out)
    print(report.table(results))
    path = report.write(results, out)
    print(f"\nreport: {path.resolve()}")
    return results


def run(seeds: range, out: Path) -> dict[int, dict[str, Outcome]]:
    """{seed: {BEFORE or arm: outcome}}. Jobs are processes of one thread each, as many at once as there are cores."""
    results: dict[int, dict[str, Outcome]] = {seed: {} for seed in seeds}
    updates = load_recipe(RECIPE).train.updates
    jobs: dict[Future, tuple[int, str]] = {}
    workers = min(os.cpu_count() or 1, len(seeds) * len(ARMS))
    for seed in seeds:
        shutil.rmtree(out / f"seed{seed}", ignore_errors=True)  # a run is continued, and this is a new one
        (out / f"seed{seed}").mkdir(parents=True)
    with (
        ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool,
        tqdm(total=len(seeds) * (STEPS + updates * len(ARMS)), unit="update", desc="demo", smoothing=0.05) as bar,
    ):
        jobs = {pool.submit(_start, seed, out): (seed, BEFORE) for seed in seeds}
        while jobs:
            done = [job for job in jobs if job.done()]
            for job in done:
                seed, name = jobs.pop(job)
                results[seed][name] = outcome = job.result()
                tqdm.write(f"seed {seed}: {name:<14} {_line(outcome.measured)}  ({outcome.seconds:.0f} s)")
                if name == BEFORE:
                    jobs |= {pool.submit(_post_train, seed, out, arm): (seed, arm.name) for arm in ARMS}
            bar.update(_steps_done(out, results) - bar.n)
            time.sleep(0.5)
    return results


def _start(seed: int, out: Path) -> Outcome:
    """Pre-train, export and measure."""
    began, folder = time.perf_counter(), _folder(out, seed, BEFORE)
    torch.set_num_threads(1)
    recipe = load_recipe(RECIPE)
    curve: list[tuple[int, float]] = []

    def progress(step: int, loss: float) -> None:
        if step % 10 == 0:
            curve.append((step, loss))
            _progress(out, seed, BEFORE).write_text(str(step))

    model = pretrain(recipe, seed, folder / "weights", progress)
    return Outcome(measure(model, seed), curve, time.perf_counter() - began)


def _post_train(seed: int, out: Path, arm: Arm) -> Outcome:
    """Post-train by the driver, as `reca train show_o_tiny ...` would, and measure."""
    began, run_dir = time.perf_counter(), _folder(out, seed, arm.name)
    own = [text.format(seed=seed) for text in arm.overrides]
    recipe = load_recipe(
        RECIPE,
        [
            f"model.weights={_folder(out, seed, BEFORE) / 'weights'}",
            f"run_dir={run_dir}",
            f"train.seed={seed}",
            "train.threads=1",
            f"data.images=world:unlabeled?seed={seed}",
            f"data.conversations=world:understood?seed={seed}",
            "data.workers=0",
            *own,
        ],
    )
    trainer = Trainer(recipe, progress=lambda update: _progress(out, seed, arm.name).write_text(str(update)))
    trainer.run()
    lines = map(json.loads, (run_dir / "log.jsonl").read_text().splitlines())
    curve = [(line["update"], line["loss"]) for line in lines if "loss" in line]
    return Outcome(measure(trainer.adapter, seed), curve, time.perf_counter() - began)


def _line(measured: Measured) -> str:
    rates = measured.rates
    parts = [f"{name} {100 * rates[name].share:5.1f} %" for name in ("seen", "held-out")]
    return "  ".join([*parts, f"overall {100 * measured.overall:5.1f} %", f"understanding {100 * rates['understanding'].share:5.1f} %"])


def _folder(out: Path, seed: int, name: str) -> Path:
    return out / f"seed{seed}" / name


def _progress(out: Path, seed: int, name: str) -> Path:
    return out / f"seed{seed}" / f".{name}.progress"


def _steps_done(out: Path, results: dict[int, dict[str, Outcome]]) -> int:
    total = 0
    for seed in results:
        for name in (BEFORE, *(arm.name for arm in ARMS)):
            path = _progress(out, seed, name)
            text = path.read_text() if path.exists() else ""
            total += int(text or 0)
    return total
