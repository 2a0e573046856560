"""The demo: pre-train a tiny model, post-train copies of it in different ways, and measure all of them alike.

The experiment is the same for every UMM; `starts` has what is not.
"""

import json
import os
import shutil
import time
import warnings
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

from reca.config import load_recipe
from reca.models.base import Adapter
from reca.toy_world import report
from reca.toy_world.measure import Measured, measure
from reca.toy_world.pretrain import Start, scaled, start
from reca.trainer import Trainer

BEFORE = "before"
SPARSEST = 10  # every tenth prompt still asks for something of every category


@dataclass(frozen=True)
class Arm:
    """One way to post-train. All arms make the same number of train_steps from the same start."""

    name: str
    says: str
    overrides: tuple[str, ...]


def _sft(caption_detail: str) -> tuple[str, ...]:
    return (
        "objective.reca.weight=0",
        "objective.t2i.weight=1",
        f"data.captions=reca.toy_world:unlabeled?seed={{seed}}&caption_detail={caption_detail}",
    )


def arms(begin: Start) -> list[Arm]:
    """The rows of a UMM's table."""
    generation = [Arm(*begin.generation)] if begin.generation else []
    return [
        Arm("RECA", "unlabeled images only", ()),
        Arm("SFT", "the same images with the captioner's sparse captions", _sft("sparse")),
        *generation,
        Arm("RECA-other", "control: the h_v of another image", ("objective.condition=other",)),
        Arm("SFT-half", "captions that tell any colour half the time", _sft("half")),
        Arm("SFT-full", "captions that tell everything", _sft("full")),
    ]


@dataclass
class Outcome:
    """What one model of one seed came to."""

    measured: Measured
    curve: list[tuple[int, float]]
    seconds: float


def demo(umm: str, seeds: int, out: Path, scale: float = 1.0) -> dict[int, dict[str, Outcome]]:
    """Run the experiment for seeds 0 ... seeds - 1, print the table and write out/report.html.

    scale: share of training steps and prompts; less than 1 shows that everything runs, and nothing else.
    """
    results = run(umm, range(seeds), out, scale)
    print(report.table(results))
    path = report.write(results, umm, out, scale)
    print(f"\nreport: {path.resolve()}")
    return results


def run(umm: str, seeds: range, out: Path, scale: float = 1.0) -> dict[int, dict[str, Outcome]]:
    """{seed: {BEFORE or arm: outcome}}. Jobs are processes of one thread each, as many at once as there are cores."""
    begin = start(umm)
    rows = arms(begin)
    results: dict[int, dict[str, Outcome]] = {seed: {} for seed in seeds}
    steps, train_steps = scaled(begin.steps, scale), scaled(load_recipe(begin.recipe).train.steps, scale)
    jobs: dict[Future, tuple[int, str]] = {}
    workers = min(os.cpu_count() or 1, len(seeds) * len(rows))
    for seed in seeds:
        shutil.rmtree(out / f"seed{seed}", ignore_errors=True)  # a run is continued, and this is a new one
        (out / f"seed{seed}").mkdir(parents=True)
    with (
        ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_quiet) as pool,
        tqdm(total=len(seeds) * (steps + train_steps * len(rows)), unit="update", desc="demo", smoothing=0.05) as bar,
    ):
        jobs = {pool.submit(_start, umm, seed, out, scale): (seed, BEFORE) for seed in seeds}
        while jobs:
            done = [job for job in jobs if job.done()]
            for job in done:
                seed, name = jobs.pop(job)
                results[seed][name] = outcome = job.result()
                tqdm.write(f"seed {seed}: {name:<14} {_line(outcome.measured)}  ({outcome.seconds:.0f} s)")
                if name == BEFORE:
                    jobs |= {pool.submit(_post_train, umm, seed, out, arm, scale): (seed, arm.name) for arm in rows}
            bar.update(_steps_done(out, seeds) - bar.n)
            time.sleep(0.5)
    return {
        seed: {name: by_name[name] for name in (BEFORE, *(a.name for a in rows))} for seed, by_name in results.items()
    }


def _quiet() -> None:
    """What libraries say about their future versions is nothing to a viewer of the demo."""
    for category in (FutureWarning, DeprecationWarning):
        warnings.simplefilter("ignore", category)


def _start(umm: str, seed: int, out: Path, scale: float) -> Outcome:
    """Pre-train, save and measure."""
    began, begin = time.perf_counter(), start(umm)
    torch.set_num_threads(1)
    curve: list[tuple[int, float]] = []

    def progress(step: int, loss: float) -> None:
        if step % 10 == 0:
            curve.append((step, loss))
            _progress(out, seed, BEFORE).write_text(str(step))

    model = begin.pretrain(load_recipe(begin.recipe), seed, _folder(out, seed, BEFORE), scale, progress)
    return Outcome(_measure(model, begin, seed, scale), curve, time.perf_counter() - began)


def _post_train(umm: str, seed: int, out: Path, arm: Arm, scale: float) -> Outcome:
    """Post-train by the driver, as `reca train` would, and measure."""
    began, begin, run_dir = time.perf_counter(), start(umm), _folder(out, seed, arm.name)
    own = [text.format(seed=seed) for text in arm.overrides]
    train_steps = scaled(load_recipe(begin.recipe).train.steps, scale)
    recipe = load_recipe(
        begin.recipe,
        [
            begin.begins_at.format(folder=_folder(out, seed, BEFORE)),
            f"run_dir={run_dir}",
            f"train.seed={seed}",
            f"train.steps={train_steps}",
            "train.threads=1",
            f"data.images=reca.toy_world:unlabeled?seed={seed}",
            f"data.conversations=reca.toy_world:understood?seed={seed}",
            "data.workers=0",
            *own,
        ],
    )
    trainer = Trainer(recipe, progress=lambda update: _progress(out, seed, arm.name).write_text(str(update)))
    trainer.run()
    lines = map(json.loads, (run_dir / "log.jsonl").read_text().splitlines())
    curve = [(line["update"], line["loss"]) for line in lines if "loss" in line]
    return Outcome(_measure(trainer.adapter, begin, seed, scale), curve, time.perf_counter() - began)


def _measure(model: Adapter, begin: Start, seed: int, scale: float) -> Measured:
    return measure(model, seed, begin.sampling, every=min(max(1, round(1 / scale)), SPARSEST))


def _line(measured: Measured) -> str:
    rates = measured.rates
    parts = [f"{name} {100 * rates[name].share:5.1f} %" for name in ("seen", "held-out")]
    return "  ".join(
        [
            *parts,
            f"overall {100 * measured.overall:5.1f} %",
            f"understanding {100 * rates['understanding'].share:5.1f} %",
        ]
    )


def _folder(out: Path, seed: int, name: str) -> Path:
    return out / f"seed{seed}" / name


def _progress(out: Path, seed: int, name: str) -> Path:
    return out / f"seed{seed}" / f".{name}.progress"


def _steps_done(out: Path, seeds: range) -> int:
    return sum(int(path.read_text() or 0) for seed in seeds for path in (out / f"seed{seed}").glob(".*.progress"))
