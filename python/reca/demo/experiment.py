"""The demo: pre-train a tiny model, post-train copies of it in different ways, and measure all of them alike.

The experiment is the same for every model; reca.demo.pretrain holds what is not.
"""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from reca import side_by_side
from reca.demo import before_after, report
from reca.demo.arms import BEFORE, Arm, Outcome, Results, arms
from reca.demo.compare_page import compare_page
from reca.demo.measure import Measured, measure
from reca.demo.pretrain import DemoSetup, demo_setup, scaled
from reca.models import umm_package
from reca.models.base import Adapter
from reca.recipe_files import load_recipe
from reca.runs import load_parent
from reca.side_by_side import Failure, Job
from reca.trainer import Trainer

SPARSEST = 10  # every tenth prompt still covers every category


def demo(umm: str, seeds: int, out: Path, scale: float = 1.0) -> Results:
    """Run the experiment for seeds 0 ... seeds - 1, print the table and write report, images and comparison.

    out/report.html has all arms, out/before_after.png what they draw. The last line is the path of out/comparison.html:
    what RECA changed of the first seed, prompt by prompt.

    scale: share of training steps and prompts; less than 1 shows that everything runs, and nothing else.
    """
    results = run(umm, range(seeds), out, scale)
    print(report.table(results))
    path = report.write(results, arms(demo_setup(umm)), umm, out, scale)
    first = results[0]
    run_dir = _folder(out, 0, "RECA")
    page = compare_page("world?seed=0", first[BEFORE], first["RECA"], run_dir, out, _every(scale))
    print(f"\nreport of all arms: {path.resolve()}")
    print(f"what they draw: {path.with_name(before_after.NAME).resolve()}")
    print(report.summary(results))
    print(page.resolve())
    return results


def run(umm: str, seeds: range, out: Path, scale: float = 1.0) -> Results:
    """Run all arms of all seeds, in processes of one thread each, as many at once as there are cores.

    Raises the error of the first job that fails, when the others are done.
    """
    setup = demo_setup(umm)
    rows = arms(setup)
    results: Results = {seed: {} for seed in seeds}
    steps, train_steps = scaled(setup.steps, scale), scaled(load_recipe(setup.recipe).train.steps, scale)
    jobs: list[Job] = []
    starts: dict[int, Start] = {}
    for seed in seeds:
        shutil.rmtree(out / f"seed{seed}", ignore_errors=True)  # the driver would continue the runs there
        (out / f"seed{seed}").mkdir(parents=True)
        given = umm, seed, out, scale
        jobs.append(Job(f"{seed}/start", pretrain, given))
        jobs += [Job(f"{seed}/{arm.name}", post_train, (*given, arm), (f"{seed}/start",)) for arm in rows]
        jobs.append(Job(f"{seed}/{BEFORE}", measure_start, given, (f"{seed}/start",)))
    with tqdm(total=len(seeds) * (steps + train_steps * len(rows)), unit="step", desc="demo", smoothing=0.05) as bar:

        def ended(job: Job, found: Outcome | Start | Failure) -> None:
            seed, _, name = job.name.partition("/")
            if isinstance(found, Start):
                starts[int(seed)] = found
            elif isinstance(found, Outcome):
                results[int(seed)][name] = found
                tqdm.write(f"seed {seed}: {name:<14} {_line(found.measured)}  ({found.seconds:.0f} s)")

        found = side_by_side.run(jobs, side_by_side.cores(), ended, lambda: bar.update(_steps_done(out, seeds) - bar.n))
    for failure in found.values():
        if isinstance(failure, Failure) and failure.error is not None:
            raise failure.error
    for seed, start in starts.items():
        before = results[seed][BEFORE]
        before.curve, before.seconds = start.curve, start.seconds + before.seconds
    return {
        seed: {name: by_name[name] for name in (BEFORE, *(a.name for a in rows))} for seed, by_name in results.items()
    }


@dataclass
class Start:
    """The pre-trained model that all arms of a seed start from."""

    curve: list[tuple[int, float]]  # (step, loss)
    seconds: float


def pretrain(umm: str, seed: int, out: Path, scale: float) -> Start:
    """Pre-train and save."""
    started, setup = time.perf_counter(), demo_setup(umm)
    curve: list[tuple[int, float]] = []

    def progress(step: int, loss: float) -> None:
        if step % 10 == 0:
            curve.append((step, loss))
            _progress(out, seed, BEFORE).write_text(str(step))

    setup.pretrain(load_recipe(setup.recipe), seed, _folder(out, seed, BEFORE), scale, progress)
    return Start(curve, time.perf_counter() - started)


def measure_start(umm: str, seed: int, out: Path, scale: float) -> Outcome:
    """Measure what was saved."""
    started, setup = time.perf_counter(), demo_setup(umm)
    recipe = load_recipe(setup.recipe, [setup.init_override.format(folder=_folder(out, seed, BEFORE))])
    model = umm_package(umm).Adapter.load(recipe.model)
    load_parent(model, recipe)
    return Outcome(_measure(model, setup, seed, scale), [], time.perf_counter() - started)


def post_train(umm: str, seed: int, out: Path, scale: float, arm: Arm) -> Outcome:
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
    return measure(model, seed, setup.sampling, _every(scale))


def _every(scale: float) -> int:
    """Say which share of the prompts is drawn: every n-th."""
    return min(max(1, round(1 / scale)), SPARSEST)


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
