"""The demo: pre-train a tiny model, post-train copies of it in different ways, and measure all of them alike.

The experiment is the same for every model; reca.demo.pretrain holds what is not.
"""

import json
import os
import shutil
import time
import warnings
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

from reca.demo import report
from reca.demo.arms import BEFORE, Arm, Outcome, Results, arms
from reca.demo.measure import Measured, measure
from reca.demo.pretrain import DemoSetup, demo_setup, scaled
from reca.models.base import Adapter
from reca.recipe_files import load_recipe
from reca.trainer import Trainer

SPARSEST = 10  # every tenth prompt still covers every category


def demo(umm: str, seeds: int, out: Path, scale: float = 1.0) -> Results:
    """Run the experiment for seeds 0 ... seeds - 1, print the table and write out/report.html.

    scale: share of training steps and prompts; less than 1 shows that everything runs, and nothing else.
    """
    results = run(umm, range(seeds), out, scale)
    print(report.table(results))
    path = report.write(results, arms(demo_setup(umm)), umm, out, scale)
    print(f"\nreport: {path.resolve()}")
    return results


def run(umm: str, seeds: range, out: Path, scale: float = 1.0) -> Results:
    """Run all arms of all seeds, in processes of one thread each, as many at once as there are cores."""
    setup = demo_setup(umm)
    rows = arms(setup)
    results: Results = {seed: {} for seed in seeds}
    steps, train_steps = scaled(setup.steps, scale), scaled(load_recipe(setup.recipe).train.steps, scale)
    jobs: dict[Future, tuple[int, str]] = {}
    workers = min(os.cpu_count() or 1, len(seeds) * len(rows))
    for seed in seeds:
        shutil.rmtree(out / f"seed{seed}", ignore_errors=True)  # the driver would continue the runs there
        (out / f"seed{seed}").mkdir(parents=True)
    with (
        ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_quiet) as pool,
        tqdm(total=len(seeds) * (steps + train_steps * len(rows)), unit="step", desc="demo", smoothing=0.05) as bar,
    ):
        jobs = {pool.submit(_pretrain, umm, seed, out, scale): (seed, BEFORE) for seed in seeds}
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
    """Silence what libraries warn of for their future versions."""
    for category in (FutureWarning, DeprecationWarning):
        warnings.simplefilter("ignore", category)


def _pretrain(umm: str, seed: int, out: Path, scale: float) -> Outcome:
    """Pre-train, save and measure."""
    started, setup = time.perf_counter(), demo_setup(umm)
    torch.set_num_threads(1)
    curve: list[tuple[int, float]] = []

    def progress(step: int, loss: float) -> None:
        if step % 10 == 0:
            curve.append((step, loss))
            _progress(out, seed, BEFORE).write_text(str(step))

    model = setup.pretrain(load_recipe(setup.recipe), seed, _folder(out, seed, BEFORE), scale, progress)
    return Outcome(_measure(model, setup, seed, scale), curve, time.perf_counter() - started)


def _post_train(umm: str, seed: int, out: Path, arm: Arm, scale: float) -> Outcome:
    """Post-train by the driver, as `reca train` would, and measure."""
    started, setup, run_dir = time.perf_counter(), demo_setup(umm), _folder(out, seed, arm.name)
    overrides = [text.format(seed=seed) for text in arm.overrides]
    train_steps = scaled(load_recipe(setup.recipe).train.steps, scale)
    recipe = load_recipe(
        setup.recipe,
        [
            setup.init_override.format(folder=_folder(out, seed, BEFORE)),
            f"run_dir={run_dir}",
            f"train.seed={seed}",
            f"train.steps={train_steps}",
            "train.threads=1",
            f"data.images=reca.toy_world:unlabeled?seed={seed}",
            f"data.conversations=reca.toy_world:understood?seed={seed}",
            "data.workers=0",
            *overrides,
        ],
    )

    def progress(step: int) -> None:
        _progress(out, seed, arm.name).write_text(str(step))

    trainer = Trainer(recipe, progress=progress)
    trainer.run()
    lines = map(json.loads, (run_dir / "log.jsonl").read_text().splitlines())
    curve = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    return Outcome(_measure(trainer.adapter, setup, seed, scale), curve, time.perf_counter() - started)


def _measure(model: Adapter, setup: DemoSetup, seed: int, scale: float) -> Measured:
    return measure(model, seed, setup.sampling, every=min(max(1, round(1 / scale)), SPARSEST))


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
