"""Two gloo ranks of which one sleeps: launch_long_runs.py FOLDER. What rank R prints goes to FOLDER/printed_R."""

import logging
import os
import sys
import time
from pathlib import Path

import torch

from reca import distributed
from reca.cli import _set_up_output
from reca.config.recipe_files import load_recipe
from reca.trainer import Trainer
from tests.driver.forks import exit_codes, fork_ranks
from tests.driver.toy import ToyAdapter, write_images, write_recipe


def overslept() -> None:
    time.sleep(4)


def work(folder: Path, rank: int) -> None:
    os.dup2(os.open(folder / f"printed_{rank}", os.O_WRONLY | os.O_CREAT), 2)
    _set_up_output()
    keys = ["train.steps=4", "log.every=2", "log.hang_seconds=1", "parallel.timeout_minutes=2"]
    trainer = Trainer(load_recipe(folder / "toy.yaml", keys), ToyAdapter())
    step = trainer.train_step

    def slow(batches):
        if rank == 1 and trainer.step == 2:
            logging.getLogger("reca").warning("rank 1 alone has something to say")
            logging.getLogger("reca").info("and this is of no use")
            overslept()
        return step(batches)

    trainer.train_step = slow
    trainer.run()
    distributed.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    write_recipe(folder, write_images(folder / "images"))
    sys.exit(any(exit_codes(fork_ranks(2, lambda rank: work(folder, rank)))))
