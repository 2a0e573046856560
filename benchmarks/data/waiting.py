"""python -m benchmarks.data.waiting [--steps N] [--workers N ...]: the share of time that a run waits for images.

Runs the trainer, with its loader and log, from JPEG files of 512 and 1024 px to the two views of show_o_512, with ten
images per step and two per micro-batch. The model is a stand-in that only sleeps. First a step takes as long as that of
show_o_512, by its FLOPs on the GPU that `reca check` assumes, with the number of threads that `reca check` recommends.
Then a step is as short as `reca check` allows for a number of threads, which leaves them a margin of a quarter.

Writes benchmarks/results/waiting/cpu.csv, from which a table of docs/data_speed.md is generated.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import docs
from benchmarks.data import photos
from benchmarks.data.rows import PAGE
from benchmarks.data.waiting_rows import FOLDER, TARGET, Row, write
from benchmarks.devices import Cpu
from benchmarks.rows import rounded
from benchmarks.runner import facts
from reca.config.recipe import Recipe
from reca.config.recipe_files import load_recipe
from reca.data.batch import Batch
from reca.data.transforms import PillowDecoder
from reca.data.views import View, Views
from reca.estimate import check, counts
from reca.estimate.meta_model import build_meta
from reca.io import jsonl
from reca.models.base import Adapter, LossTerm, Prepared
from reca.rng import CounterRNG
from reca.trainer import Trainer

IMAGES, PASS = 10, 2  # images per step and per micro-batch
FIRST = 5  # warm-up steps that are not counted: the first always waits for its images


class Sleeper(Adapter):
    """A model with the views of show_o_512 that only sleeps."""

    name = "sleeper"
    tasks = frozenset({"reca"})
    trainable_roles = frozenset({"gen_head"})
    condition_keys = ("h_v",)

    def __init__(self, seconds: float) -> None:  # per micro-batch
        super().__init__()
        self.seconds, self.layer = seconds, nn.Linear(1, 1)

    def views(self, task: str) -> Views:
        return Views(gen=View(512, fit="squash"), und=View(336, fit="squash"))

    def encode(self, batch: Batch) -> dict[str, Any]:
        return {"h_v": torch.ones(len(batch), 1)}

    def prepare(self, batch: Batch, rng: CounterRNG) -> Prepared:
        return Prepared(batch.task, rng.seed, float(len(batch)))

    def loss(self, prepared: Prepared, features: dict[str, Any], rng: CounterRNG) -> LossTerm:
        time.sleep(self.seconds)
        return LossTerm.of(self.layer(features["h_v"]).square().sum(), prepared)

    def roles(self) -> dict[str, str]:
        return {name: "gen_head" for name, _ in self.named_parameters()}

    def blocks(self) -> list[nn.Module]:
        return []


def recipe(folder: Path, workers: int, steps: int) -> Recipe:
    """Return the recipe of a run on the images of a folder."""
    return load_recipe(
        "show_o_tiny",
        {
            "run_dir": str(folder / f"run_{workers}"),
            "data.images": str(folder / "images"),
            "data.workers": workers,
            "data.decoder": "pillow",
            "objective.reca.batch_size": IMAGES,
            "objective.reca.micro_batch": PASS,
            "objective.i2t.weight": 0,
            "train.roles": None,
            "train.frozen": [],
            "train.steps": FIRST + steps,
            "log.every": 1,
            "log.tensorboard": False,
            "log.sample_every": 0,
            "log.gap_every": 0,
            "checkpoint.every": 0,
        },
    )


def show_o_512() -> check.Decoding:
    """Return what `reca check` predicts for decoding with the recipe show_o_512, for RECA's images only."""
    made = load_recipe("show_o_512", {"objective.i2t.weight": 0})
    adapter, fake = build_meta(made)
    return check.decoding(made, adapter, sum(counts.flops(adapter, fake, PASS)))


def measure(jpeg: int, workers: int, steps: int, step: float | None = None) -> tuple[float, float, float]:
    """Return the decoding time per image and the sleep per step in seconds, and the share of time spent waiting.

    step: sleep per step in seconds; None: as short as `reca check` allows.
    """
    model = Sleeper(0.0)
    files = [photos.jpeg(number, jpeg) for number in range(2 * IMAGES)]
    decode = decoding(model.views("reca"), files)
    step = step or check.SPARE * IMAGES * decode / workers
    model.seconds = step * PASS / IMAGES
    with tempfile.TemporaryDirectory(prefix="reca_waiting_") as name:
        folder = Path(name)
        (folder / "images").mkdir()
        for number, file in enumerate(files):
            (folder / "images" / f"{number:03}.jpg").write_bytes(file)
        made = recipe(folder, workers, steps)
        Trainer(made, model, progress=lambda step: None).run()
        lines = jsonl.read(Path(made.run_dir) / "log.jsonl")
    timed = [line for line in lines if "data_wait_s" in line][FIRST:]
    return decode, step, sum(line["data_wait_s"] for line in timed) / sum(line["step_s"] for line in timed)


def decoding(views: Views, files: list[bytes]) -> float:
    """Return the mean CPU seconds per image on one core."""
    decoder = PillowDecoder(views, CounterRNG(0))
    decoder(files[0], 0)  # warm-up: caches the resize weights
    began = time.thread_time()
    for number, file in enumerate(files):
        decoder(file, number)
    return (time.thread_time() - began) / len(files)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data.waiting", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60, help=f"timed steps, after {FIRST} for warm-up (default: 60)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="decoding threads (default: 1 and 2)")
    parser.add_argument("--out", type=Path, help=f"folder of the result file (default: {FOLDER}; updates the page)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    about = facts(Cpu(), 1, " ".join(["python -m benchmarks.data.waiting", *arguments]))
    own = show_o_512()
    made = []
    for jpeg in (512, 1024):
        for workers, seconds in [(own.threads, own.step), *((number, None) for number in options.workers)]:
            decode, step, waited = measure(jpeg, workers, options.steps, seconds)
            made.append(
                Row(jpeg, workers, rounded(1e3 * decode), rounded(1e3 * step), options.steps, rounded(waited), **about)
            )
            print(
                f"{jpeg:5} px, {workers} threads: {1e3 * decode:.2f} ms per image, steps of {1e3 * step:.0f} ms, "
                f"waiting {100 * waited:.2f} %",
                flush=True,
            )
    write((options.out or FOLDER) / "cpu.csv", made)
    if options.out is None:
        PAGE.write_text(docs.filled(PAGE))
        print(f"wrote {PAGE}")
    return int(any(row.waited > TARGET for row in made))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
