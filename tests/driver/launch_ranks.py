"""Train recipes on several numbers of gloo ranks: launch_ranks.py FOLDER JOBS, where JOBS is JSON.

JOBS: a list of [name, ranks, recipe, [key=value ...]], done in this order; toy.yaml is a recipe of the toy adapter.
FOLDER/name becomes the run's folder, and rank 0 writes its final weights to final.pt. Ranks are forks of this process,
so that everything is imported once; a job on one rank has no process group. This process itself computes no gradient,
after which torch for CUDA lets no fork compute one.
"""

import json
import sys
from itertools import groupby
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from reca import distributed
from reca.config.recipe_files import load_recipe
from reca.models import umm_package
from reca.trainer import Trainer
from tests.driver.forks import exit_codes, fork_ranks
from tests.driver.toy import ToyAdapter


def train(folder: Path, recipe: str, overrides: list[str]) -> None:
    adapter = ToyAdapter() if Path(recipe).name == "toy.yaml" else None
    recipe = load_recipe(recipe, [*overrides, f"run_dir={folder}", "train.threads=1", "parallel.timeout_minutes=3"])
    trainer = Trainer(recipe, adapter, progress=lambda step: None)
    trainer.run()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(trainer.adapter, options=options)
    if distributed.rank() == 0:
        torch.save(state, folder / "final.pt")


def work(folder: Path, jobs: list) -> None:
    """All jobs of as many ranks, one after another in one process group."""
    for name, _, recipe, overrides in jobs:
        train(folder / name, recipe, overrides)
    distributed.barrier()
    distributed.shut_down()


def main() -> int:
    folder, jobs = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    for name in {load_recipe(recipe).umm for _, _, recipe, _ in jobs}:
        umm_package(name)
    codes = []
    for ranks, group in groupby(jobs, key=lambda job: job[1]):
        own = list(group)
        codes += exit_codes(fork_ranks(ranks, lambda _, own=own: work(folder, own)))
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
