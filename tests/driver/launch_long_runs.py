"""Two gloo ranks of which one sleeps: launch_long_runs.py FOLDER. What rank R prints goes to FOLDER/printed_R."""

import logging
import os
import socket
import sys
import time
from pathlib import Path

import torch

from reca import distributed
from reca.cli import _set_up_output
from reca.recipe_files import load_recipe
from reca.trainer import Trainer
from tests.driver.toy import ToyAdapter, write_images, write_recipe


def overslept() -> None:
    time.sleep(4)


def work(folder: Path, rank: int, port: int) -> None:
    os.dup2(os.open(folder / f"printed_{rank}", os.O_WRONLY | os.O_CREAT), 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(2):
        if child := os.fork():
            children.append(child)
            continue
        code = 1
        try:
            work(folder, rank, port)
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    sys.exit(any(os.waitpid(child, 0)[1] for child in children))
