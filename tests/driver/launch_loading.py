"""Load models into shards on two gloo ranks: launch_loading.py FOLDER. Each writes what it saw to FOLDER/RANK.json.

Each case is a model of random weights, or the same from the files that it exports. For each: the names of parameters
and buffers that differ from what one process loads, and the bytes that this rank had allocated at most, which are those
of torch's CPU allocator: pages of a mapped file are none of them.
"""

import gc
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from reca import distributed
from reca.config.recipe import Recipe
from reca.config.recipe_files import load_recipe
from reca.models import UMMS, umm_package
from reca.models.base import Adapter
from reca.training.parallelize import load, parallelize
from tests.driver.forks import exit_codes, fork_ranks

RANKS, MINUTES = 2, 7
BF16 = ["model.dtype=mixed"]


def cases(folder: Path) -> dict[str, tuple[Recipe, Adapter]]:
    """Recipes, and what one process loads of them."""
    found = {}
    recipes = {umm: load_recipe(f"{umm}_tiny", BF16 if umm == "bagel" else []) for umm in UMMS}
    for name, recipe in recipes.items():
        made = umm_package(recipe.umm).Adapter.load(recipe.model)
        found[f"{name} random"] = recipe, made
        written = made.export(folder / name)
        model = replace(recipe.model, weights=str(folder / name), seed=7)
        if any("tokenizer" in file for file in written):
            model.words = []
        published = replace(recipe, model=model)
        found[f"{name} file"] = published, umm_package(recipe.umm).Adapter.load(model)
    return found


def peak(function, mapped: set[int]) -> tuple[int, object]:
    """The most bytes that a call had allocated on the CPU, and its result. mapped: sizes of files, which are none."""
    gc.collect()  # nothing older is freed meanwhile
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function()
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]" and abs(event.nbytes()) not in mapped:
            now += event.nbytes()
            most = max(most, now)
    return most, result


def sharded(recipe: Recipe, device: torch.device) -> Adapter:
    adapter, deferred = load(recipe, device)
    parallelize(adapter, recipe, device, deferred)
    return adapter


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def compare(adapter: Adapter, wanted: Adapter) -> list[str]:
    differing = [] if type(adapter).__name__.endswith(type(wanted).__name__) else ["class"]
    for mine, theirs in (
        (adapter.named_parameters(remove_duplicate=False), wanted.named_parameters(remove_duplicate=False)),
        (adapter.named_buffers(), wanted.named_buffers()),
    ):
        mine, theirs = dict(mine), dict(theirs)
        differing += sorted(mine.keys() ^ theirs.keys())
        for name in mine.keys() & theirs.keys():
            ours = whole(mine[name])
            if ours.dtype != theirs[name].dtype or not torch.equal(ours, theirs[name]):
                differing.append(name)
    return differing


def minutes(adapter: Adapter) -> list[float]:
    """The timeouts of the groups that the ranks gather weights and reduce gradients in."""
    groups = next(p for p in adapter.parameters() if isinstance(p, DTensor)).device_mesh.get_all_groups()
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() / 60 for group in groups]


def work(folder: Path, found: dict[str, tuple[Recipe, Adapter]]) -> dict[str, dict]:
    device, report = distributed.initialize(3), {}
    mapped = {path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    for name, (recipe, wanted) in found.items():
        for strategy in ("fsdp", "ddp") if recipe.umm == "harmon" else ("fsdp",):
            own = replace(recipe, parallel=replace(recipe.parallel, strategy=strategy, timeout_minutes=MINUTES))
            most, adapter = peak(lambda own=own: sharded(own, device), mapped)
            size = sum(p.numel() * p.itemsize for p in wanted.parameters())
            seen = {"differing": compare(adapter, wanted), "peak": most, "whole": size}
            report[f"{name} {strategy}"] = seen | {"minutes": minutes(adapter)}
            del adapter
    distributed.barrier()
    distributed.shut_down()
    return report


def main() -> int:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    found = cases(folder)

    def write(rank: int) -> None:
        (folder / f"{rank}.json").write_text(json.dumps(work(folder, found)))

    return int(any(exit_codes(fork_ranks(RANKS, write))))


if __name__ == "__main__":
    sys.exit(main())
