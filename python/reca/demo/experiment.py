"""The demo: pre-train a tiny model, post-train copies of it in several ways, and measure all in the same way.

The experiment is the same for every model; model-specific code is in reca.demo.pretrain.
"""

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from reca.config.recipe_files import load_recipe
from reca.demo import before_after, compare_page, report
from reca.demo.measure import Measured, measure, spacing
from reca.demo.pretrain import DemoSetup, demo_setup, run_overrides, scaled
from reca.demo.variants import BEFORE, Outcome, Pretrained, Results, Variant, pretrained_models, rows, variants
from reca.io import jsonl
from reca.io.folders import ensure_writable
from reca.models.base import Adapter
from reca.processes import side_by_side
from reca.processes.side_by_side import Failure, Job
from reca.runs.folder import lock_alone
from reca.runs.lineage import load_start
from reca.toy_datasets.dataset import ToyDataset, load_dataset
from reca.trainer import Trainer

COMPARISON, PRETRAINED = "comparison", "/pretrained"  # name and suffix of jobs


@dataclass(frozen=True)
class Case:
    """One seed of a demo. dataset: name of the toy dataset."""

    umm: str
    dataset: str
    seed: int
    out: Path
    scale: float = 1.0

    @property
    def setup(self) -> DemoSetup:
        return demo_setup(self.umm, load_dataset(self.dataset))

    def folder(self, name: str = "") -> Path:
        """Return the folder of the seed, or that of a model."""
        return self.out / f"seed{self.seed}" / name

    def progress(self, name: str) -> Path:
        return self.folder(f".{name}.progress")


def demo(umm: str, dataset: ToyDataset, seeds: int, out: Path, scale: float = 1.0) -> Results:
    """Run the experiment for seeds 0 ... seeds - 1, print the table and write report, images and comparison.

    out/report.html reports all variants, out/before_after.png shows generated images. The last line printed is the path
    of out/comparison.html, which shows the effect of RECA prompt by prompt for the first seed.

    scale: fraction of training steps and prompts; below 1 only for a quick test.

    The report lists jobs that failed; the first of their errors is raised at the end.
    Raises RunInUse while another demo uses the folder.
    """
    ensure_writable(out, "--out")
    lock = lock_alone(out, "choose another --out")  # a demo first deletes the previous results there
    try:
        return _demo(umm, dataset, seeds, out, scale)
    finally:
        os.close(lock)


def _demo(umm: str, dataset: ToyDataset, seeds: int, out: Path, scale: float) -> Results:
    for page in (report.PAGE, before_after.NAME, compare_page.NAME):  # of an earlier call, whose runs are deleted, too
        (out / page).unlink(missing_ok=True)
    results, failures = run(umm, dataset, range(seeds), out, scale)
    if results:
        print(report.table(results))
        path = report.write(results, umm, dataset, out, scale, failures)
        print(f"\nreport of all variants: {path.resolve()}")
        print(f"images before and after: {path.with_name(before_after.NAME).resolve()}")
        print(report.summary(results))
    for name, failure in failures.items():
        print(f"{name} FAILED, {failure}")
    for failure in failures.values():
        if failure.error is not None:
            raise failure.error
    print(path.with_name(compare_page.NAME).resolve())
    return results


def run(
    umm: str, dataset: ToyDataset, seeds: range, out: Path, scale: float = 1.0
) -> tuple[Results, dict[str, Failure]]:
    """Run all variants for all seeds, one process per core with one thread each.

    The first seed's RECA is also compared with the pre-trained model. If a job fails, only jobs that depend on it are
    skipped.
    Returns the results of all seeds that have any, and the failures by job name.
    """
    setup = demo_setup(umm, dataset)
    origins, trained = pretrained_models(setup), variants(dataset, setup)
    results: Results = {seed: {} for seed in seeds}
    steps, train_steps = scaled(setup.steps, scale), scaled(load_recipe(setup.recipe).train.steps, scale)
    jobs: list[Job] = []
    curves: dict[tuple[int, str], Curve] = {}
    for seed in seeds:
        case = Case(umm, dataset.name, seed, out, scale)
        shutil.rmtree(case.folder(), ignore_errors=True)  # the driver would resume the runs there
        case.folder().mkdir(parents=True)
        for pretrained in origins:
            ready = f"{seed}/{pretrained.name}{PRETRAINED}"
            jobs.append(Job(ready, pretrain, (case, pretrained)))
            own = [variant for variant in trained if variant.pretrained == pretrained.name]
            jobs += [
                Job(f"{seed}/{variant.name}", post_train, (case, variant, pretrained), (ready,)) for variant in own
            ]
            jobs.append(Job(f"{seed}/{pretrained.name}", measure_pretrained, (case, pretrained), (ready,)))
    first = Case(umm, dataset.name, seeds[0], out, scale)
    jobs.append(Job(COMPARISON, compare, (first,), uses=(f"{seeds[0]}/{BEFORE}", f"{seeds[0]}/RECA")))
    total = len(seeds) * (steps * len(origins) + train_steps * len(trained))
    with tqdm(total=total, unit="step", desc="demo", smoothing=0.05, disable=None) as bar:

        def ended(job: Job, found: Outcome | Curve | Path | Failure) -> None:
            seed, _, name = job.name.removesuffix(PRETRAINED).partition("/")
            if isinstance(found, Curve):
                curves[int(seed), name] = found
            elif isinstance(found, Outcome):
                results[int(seed)][name] = found
                tqdm.write(f"seed {seed}: {name:<14} {_line(found.measured)}  ({found.seconds:.0f} s)")
            elif isinstance(found, Failure) and found.error is not None:
                tqdm.write(f"{job.name} FAILED, {found}; all other jobs continue")

        found = side_by_side.run(jobs, side_by_side.cores(), ended, lambda: bar.update(_steps_done(out, seeds) - bar.n))
    for (seed, name), curve in curves.items():
        if (measured := results[seed].get(name)) is not None:
            measured.curve, measured.seconds = curve.points, curve.seconds + measured.seconds
    order = [row.name for row in rows(dataset, setup)]
    ordered = {seed: {name: made[name] for name in order if name in made} for seed, made in results.items()}
    failures = {name: failure for name, failure in found.items() if isinstance(failure, Failure)}
    return {seed: made for seed, made in ordered.items() if made}, failures


@dataclass
class Curve:
    """Loss curve and duration of pre-training."""

    points: list[tuple[int, float]]  # (step, loss)
    seconds: float


def pretrain(case: Case, pretrained: Pretrained) -> Curve:
    """Pre-train a model and save it."""
    started = time.perf_counter()
    points: list[tuple[int, float]] = []

    def progress(step: int, loss: float) -> None:
        if step % 10 == 0:
            points.append((step, loss))
            case.progress(pretrained.name).write_text(str(step))

    recipe = load_recipe(case.setup.recipe, pretrained.overrides)
    case.setup.pretrain(recipe, case.seed, case.folder(pretrained.name), case.scale, progress)
    return Curve(points, time.perf_counter() - started)


def measure_pretrained(case: Case, pretrained: Pretrained) -> Outcome:
    """Measure a saved pre-trained model."""
    started = time.perf_counter()
    recipe = load_recipe(case.setup.recipe, [*pretrained.overrides, _init_override(case, pretrained)])
    return Outcome(_measure(load_start(recipe), case), [], time.perf_counter() - started)


def post_train(case: Case, variant: Variant, pretrained: Pretrained) -> Outcome:
    """Post-train with the driver, as `reca train` does, and measure the result."""
    started, setup, run_dir = time.perf_counter(), case.setup, case.folder(variant.name)
    cache = [f"data.cache={case.folder('features')}"] if setup.cached else []
    recipe = load_recipe(
        setup.recipe,
        [
            *pretrained.overrides,
            _init_override(case, pretrained),
            f"run_dir={run_dir}",
            *run_overrides(setup.recipe, load_dataset(case.dataset), case.seed, case.scale),
            *cache,
            *(text.format(seed=case.seed) for text in variant.overrides),
        ],
    )

    def progress(step: int) -> None:
        case.progress(variant.name).write_text(str(step))

    trainer = Trainer(recipe, progress=progress)
    trainer.run()
    return Outcome(_measure(trainer.adapter, case), _curve(run_dir), time.perf_counter() - started)


def compare(case: Case, before: Outcome, after: Outcome) -> Path:
    """Write the comparison of RECA with the pre-trained model. Returns the path of the page."""
    dataset = load_dataset(case.dataset)
    return compare_page.write(
        f"toy?dataset={dataset.name}&seed={case.seed}", before, after, case.folder("RECA"), case.out,
        unseen=dataset.spec("unseen", case.seed), sampling=case.setup.sampling, every=spacing(case.scale),
    )  # fmt: skip


def _curve(run_dir: Path) -> list[tuple[int, float]]:
    """Load the loss curve of a run."""
    lines = jsonl.read_log(run_dir / "log.jsonl")
    return [(line["step"], line["loss"]) for line in lines if isinstance(line.get("loss"), int | float)]


def _init_override(case: Case, pretrained: Pretrained) -> str:
    return case.setup.init_override.format(folder=case.folder(pretrained.name))


def _measure(model: Adapter, case: Case) -> Measured:
    return measure(model, load_dataset(case.dataset), case.seed, case.setup.sampling, spacing(case.scale))


def _line(measured: Measured) -> str:
    seen, held_out, understanding = (measured.rates[name].share for name in ("seen", "held-out", "understanding"))
    shares = {"seen": seen, "held-out": held_out, "overall": measured.overall, "understanding": understanding}
    return "  ".join(f"{name} {100 * share:5.1f} %" for name, share in shares.items())


def _steps_done(out: Path, seeds: range) -> int:
    return sum(int(path.read_text() or 0) for seed in seeds for path in (out / f"seed{seed}").glob(".*.progress"))
