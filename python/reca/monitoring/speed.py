"""Throughput of a run: images per second, time spent waiting for data, and MFU (model FLOPs utilisation).

MFU is the FLOPs of a step divided by step time, number of GPUs and peak FLOP/s. The FLOPs are counted from the forward
and backward passes of the recipe's model as trained: frozen weights have no gradient, and recomputation by activation
checkpointing does not count.
"""

import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from reca import distributed
from reca.config.recipe import Recipe
from reca.data.batch import Batch, task_rng
from reca.estimate.counts import batch_flops, without_memory
from reca.estimate.meta_model import build_meta
from reca.hardware.peaks import known_peak
from reca.io.paths import exists

MEASURED_SIZE, MEASURED_TIMES = 8192, 20  # of the matrix product that measures the peak of an unknown GPU


def peak_flops(device: torch.device, given: float | None) -> tuple[float | None, str]:
    """Return the peak FLOP/s for MFU and its origin. given: log.peak_flops. A CPU has no peak unless it is given."""
    if given is not None:
        return given, "log.peak_flops"
    if device.type != "cuda":
        return None, ""
    name = torch.cuda.get_device_name(device)
    if (known := known_peak(name)) is not None:
        return known, f"peak of {name}, dense bf16"
    return _measured_rate(device), f"measured with bf16 matrices of size {MEASURED_SIZE}: {name} is not in the table"


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


def step_flops(recipe: Recipe, batches: Mapping[str, Sequence[Batch]], tokenizer: Any) -> float:
    """Count the FLOPs of a step over all GPUs, by running the model on fake tensors. Takes seconds on the CPU.

    batches: micro-batches of each task. The first one of a task is counted and scaled to the batch size, so the result
    assumes texts of its lengths. tokenizer: the model's; None for a model without one.
    """
    adapter, fake = build_meta(recipe, tokenizer)
    total = 0.0
    for task, micro_batches in batches.items():
        first, rng = without_memory(micro_batches[0], fake), task_rng(recipe.train.seed, task)
        work = batch_flops(adapter, first, rng)
        total += sum(work) * getattr(recipe.objective, task).batch_size
    return total


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of this process in bytes: allocated on its GPU, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if exists(status) else ():
        if line.startswith("VmHWM"):  # ru_maxrss includes the peak of the parent before exec
            return 1024 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Speed:
    """Accumulates step times between lines of the log. flops: of a step; peak: FLOP/s of a GPU; None if unknown."""

    def __init__(self, images: int, steps: int):
        """images: number per step. steps: of the whole run."""
        self.images, self.steps = images, steps
        self.flops: float | None = None
        self.peak: float | None = None
        self.count, self.seconds, self.waited = 0, 0.0, 0.0
        self.first: tuple[int, float] | None = None  # first step and its end time; excluded, as it may have compiled

    def add(self, step: int, seconds: float, waited: float) -> None:
        """Add a completed step. seconds: its duration; waited: the part spent waiting for batches."""
        self.count, self.seconds, self.waited = self.count + 1, self.seconds + seconds, self.waited + waited
        self.first = self.first or (step, time.monotonic())

    def rate(self) -> float:
        """Return the images per second of all GPUs since the last line."""
        return self.images * self.count / self.seconds

    def remaining(self, step: int) -> float | None:
        """Estimate the seconds to the end of the run from wall time per step; None before the second step."""
        if step >= self.steps:
            return 0.0
        if self.first is None or step <= self.first[0]:
            return None
        return (time.monotonic() - self.first[1]) / (step - self.first[0]) * (self.steps - step)

    def metrics(self, device: torch.device) -> dict[str, float]:
        """Return means since the last line under their names in log.jsonl, and reset them."""
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
