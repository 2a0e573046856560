"""How fast a run is: images a second, waiting for data, and MFU (model FLOPs utilization).

MFU is the share of a GPU's peak that the model's own arithmetic uses: FLOPs of a step, counted from the recipe's model
with forward and backward passes as they are trained (a frozen part has no gradient of its weights), over seconds, GPUs
and peak. What activation checkpointing computes again does not count.
"""

import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from reca import check, distributed
from reca.config import Recipe
from reca.data.batch import Batch, task_rng
from reca.meta_model import build_meta
from reca.peaks import known_peak

MEASURED_SIZE, MEASURED_TIMES = 8192, 20  # of the matrix product that stands for the peak of an unknown GPU


def peak_flops(device: torch.device, given: float | None) -> tuple[float | None, str]:
    """Return the FLOP/s that MFU is a share of, and where the number is from. A CPU has none unless it is given."""
    if given is not None:
        return given, "log.peak_flops"
    if device.type != "cuda":
        return None, ""
    name = torch.cuda.get_device_name(device)
    if (known := known_peak(name)) is not None:
        return known, f"peak of {name}, dense bf16"
    return _measured_rate(device), f"measured product of bf16 matrices of {MEASURED_SIZE}: {name} has no entry"


def _measured_rate(device: torch.device) -> float:
    a = torch.randn(MEASURED_SIZE, MEASURED_SIZE, device=device, dtype=torch.bfloat16)
    for _ in range(3):
        a @ a
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(MEASURED_TIMES):
        a @ a
    torch.cuda.synchronize(device)
    return 2 * MEASURED_SIZE**3 * MEASURED_TIMES / (time.perf_counter() - started)


def step_flops(recipe: Recipe, batches: Mapping[str, Sequence[Batch]]) -> float:
    """Count the FLOPs of a step of this recipe, on all GPUs, as a GPU computes it.

    It runs a model without memory: seconds, on the CPU.

    batches: micro-batches of each task, whose first one stands for all: its texts are as long as they are.
    """
    adapter, fake = build_meta(recipe)
    total = 0.0
    for task, micro_batches in batches.items():
        first, rng = check.without_memory(micro_batches[0], fake), task_rng(recipe.train.seed, task)
        work = check.batch_flops(adapter, first, rng)
        total += sum(work) * getattr(recipe.objective, task).batch_size
    return total


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has had: allocated on its GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM"):  # getrusage begins with the peak of the process that started this one
            return 1024 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Speed:
    """Adds up the steps since the last line of the log. flops, peak: of a step and of a GPU; None where unknown."""

    def __init__(self, images: int, steps: int):
        """images: of a step. steps: of the whole run."""
        self.images, self.steps = images, steps
        self.flops: float | None = None
        self.peak: float | None = None
        self.count, self.seconds, self.waited = 0, 0.0, 0.0
        self.first: tuple[int, float] | None = None  # the first step that was made, and when: it may have compiled

    def add(self, step: int, seconds: float, waited: float) -> None:
        """Add a step that has been made. waited: seconds of it for batches."""
        self.count, self.seconds, self.waited = self.count + 1, self.seconds + seconds, self.waited + waited
        self.first = self.first or (step, time.monotonic())

    def rate(self) -> float:
        """Return the images a second of all GPUs since the last line."""
        return self.images * self.count / self.seconds

    def remaining(self, step: int) -> float | None:
        """Return the seconds to the end, with everything between the steps; None before the second step."""
        if step >= self.steps:
            return 0.0
        if self.first is None or step <= self.first[0]:
            return None
        return (time.monotonic() - self.first[1]) / (step - self.first[0]) * (self.steps - step)

    def metrics(self, device: torch.device) -> dict[str, float]:
        """Return means since the last line, by the names of log.jsonl, and begin the next."""
        ranks, each = distributed.world_size(), self.seconds / self.count
        found = {
            "images_per_s": self.rate(),
            "images_per_s_per_gpu": self.rate() / ranks,
            "step_s": each,
            "data_wait_s": self.waited / self.count,
            "data_wait": self.waited / self.seconds,
            "memory_gib": peak_memory(device) / 2**30,
        }
        if self.flops and self.peak:
            found["mfu"] = self.flops / (each * ranks * self.peak)
        self.count, self.seconds, self.waited = 0, 0.0, 0.0
        return found
