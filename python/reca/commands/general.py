"""The subcommands, except those that use a model (inference.py) and those of packages.

Each takes the parsed arguments and returns the exit code, or None for 0.
"""

import argparse
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

from reca.io.paths import exists, is_file
from reca.launcher import is_main_process

MOST_GPUS = 2**20


def train(options: argparse.Namespace) -> None:
    from reca import api, exits
    from reca.config.recipe_files import explain, load_recipe

    recipe = load_recipe(options.recipe, options.overrides)
    if options.explain:
        if is_main_process():
            print(explain(recipe))
        return
    if options.overfit is not None:
        _overfit(recipe, options.overfit, options.overfit_to)
        return
    run = api.train(recipe)
    if not is_main_process():
        return
    try:
        _tell(recipe, run)
    except OSError:  # the run has succeeded even if its output cannot be printed
        exits.discard_output()


def _tell(recipe: Any, run: Any) -> None:
    from reca import units
    from reca.models import umm_package
    from reca.monitoring.reconstructions import GRID

    source = f"./{recipe.run_dir}" if recipe.run_dir.startswith("-") else recipe.run_dir
    draws = "generate" in umm_package(recipe.umm).Adapter.abilities
    draw = f" Generate with: reca generate {shlex.quote(source)} --prompt 'a yellow broccoli'" if draws else ""
    if run.new_steps:
        print(f"{units.counted(run.steps, 'step')} done.{draw}", flush=True)
        if is_file(grid := run.folder / GRID):
            print(f"Images and their reconstructions before and after training: {grid}", flush=True)
    else:
        print(
            f"{recipe.run_dir} already has {units.counted(run.steps, 'step')}, and train.steps={recipe.train.steps}: "
            f"nothing to do. Give a larger train.steps or another run_dir.{draw}",
            flush=True,
        )


def _overfit(recipe: Any, steps: int, target: float) -> None:
    from reca import distributed
    from reca.commands.overfit import NotLearning, overfit

    found = overfit(recipe, steps, target)
    if is_main_process():
        print(*found.describe(), sep="\n")
    distributed.shut_down()
    if fault := found.fault():
        raise NotLearning(f"the dry run did not learn its batch: {fault}")


def status(options: argparse.Namespace) -> int:
    """Print the current status of a run. Return the exit code that it ended with; 0 while it runs."""
    from reca.runs.status import Status

    status = Status.read(options.folder)
    if options.field:
        value = getattr(status, options.field)
        print("" if value is None else value)
        return 0
    print(status.describe())
    return status.exit_code or 0


def check(options: argparse.Namespace) -> None:
    from reca.config.recipe_files import load_recipe
    from reca.estimate.check import report

    if max(options.gpus, options.gpus_per_node) > MOST_GPUS:
        raise ValueError(
            f"--gpus and --gpus-per-node must be at most {MOST_GPUS}, got {options.gpus} and {options.gpus_per_node}"
        )
    print(
        report(load_recipe(options.recipe, options.overrides), options.gpus, options.gpus_per_node, options.gpu_memory)
    )


def cache(options: argparse.Namespace) -> None:
    from reca.config.recipe_files import load_recipe
    from reca.precompute import cache_features

    lines = cache_features(load_recipe(options.recipe, options.overrides))
    if is_main_process():
        print(*lines, sep="\n")


def data_check(options: argparse.Namespace) -> int:
    from reca.commands import data

    return data.check(*data.open_spec(options.spec, options.task, None, options.overrides))


def data_view(options: argparse.Namespace) -> None:
    from reca.commands import data

    opened = data.open_spec(options.spec, options.task, options.recipe, options.overrides)
    print(*data.view(*opened, options.count, options.out), sep="\n")


def get_weights(options: argparse.Namespace) -> None:
    from reca.hub.downloads import get, weights_of

    get(weights_of(options.name, options.overrides), options.to, options.dry_run)


def get_data(options: argparse.Namespace) -> None:
    from reca.hub.downloads import data_of, get

    get(data_of(options.name), options.to, options.dry_run)


def get_suite(options: argparse.Namespace) -> None:
    from reca.eval import suite_files

    suite_files.get(options.name, options.to, options.dry_run)


def serve(options: argparse.Namespace) -> None:
    from reca import exits
    from reca.commands.serve import serve
    from reca.errors import print_once

    try:
        serve(options.recipe, options.overrides, options.against, options.host, options.port, options.ema)
    except KeyboardInterrupt:
        print_once("reca: stopped")
        exits.end_now(exits.STOPPED)  # a thread may still be working on a request


def demo(options: argparse.Namespace) -> None:
    from reca.processes import workers
    from reca.toy_datasets.dataset import default_dataset, load_dataset

    if not 0 < options.scale <= 1 or options.seeds < 1:
        raise ValueError(
            f"--scale must lie in (0, 1] and --seeds be at least 1, got {options.scale:g} and {options.seeds}"
        )
    dataset = load_dataset(options.dataset) if options.dataset else default_dataset(options.umm)
    workers.prepare("reca.demo.experiment")
    from reca.demo.experiment import demo

    usual = Path("demo_out")
    if (dataset.name, options.umm) != ("emoji", "show_o"):
        usual = usual / dataset.name / options.umm
    demo(options.umm, dataset, options.seeds, options.out or usual, options.scale)


def doctor(options: argparse.Namespace) -> None:
    from reca.commands.doctor import report

    print(report())


def bench(options: argparse.Namespace) -> int:
    root = Path(__file__).parents[3]
    if not exists(root / "benchmarks" / "__main__.py"):
        raise ValueError("the benchmarks are in the source tree, not in the installed package: run `make bench` there")
    sys.path.insert(0, str(root))
    sys.argv = ["benchmarks", *options.arguments]
    runpy.run_module("benchmarks", run_name="__main__")
    return 0
