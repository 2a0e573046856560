"""A process that runs steps of one form: python -m benchmarks.step.worker MODEL SIZE FORM DEVICE FOLDER CHANGES.

It reads one command per line and answers each with a line of JSON:

    count  run the first step and count its operators. If freed memory is kept, run a second step: memory freed by the
           first is too fragmented for it, and only from the third step on no new memory is mapped
    step   run a step and return the seconds of its parts

On CPUs the clock is the CPU time of the process, which other processes on the machine affect less than wall time. On
GPUs parts are timed by events on the stream, and whole steps by wall time between two synchronisations.
"""

import contextlib
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from benchmarks.step import release
from benchmarks.step.counting import Counter
from benchmarks.step.parts import Parts, instrument, timed_trainer
from benchmarks.step.recipes import step_recipe
from reca import objective
from reca.config.recipe import Recipe
from reca.data.batch import Batch, task_rng
from reca.estimate import counts
from reca.estimate.meta_model import build_meta
from reca.hardware.host_memory import FreedMemory
from reca.models import umm_package
from reca.models.base import Adapter
from reca.models.common.on_cpu import as_gpu
from reca.monitoring.speed import peak_memory
from reca.precision import training_kernels
from reca.trainer import Trainer
from reca.training import compiled_blocks, half_weights
from reca.training.recompute import checkpoint_activations

LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")  # prefixes of the names of launch functions


class Worker:
    """A trainer of one form, with its timing."""

    def __init__(self, model: str, size: str, form: str, device: str, folder: Path, changes: dict[str, Any]) -> None:
        self.cuda, self.form, released = device == "cuda", form, form != "ours"
        recipe = step_recipe(model, size, folder / form, changes)
        checkpointed = recipe.train.activation_checkpointing
        if released:
            recipe = step_recipe(model, size, folder / form, changes | release.recipe_changes(model))
        adapter = umm_package(recipe.umm).Adapter.load(recipe.model, torch.device(device))
        if released:
            release.formulate(adapter, checkpointed)
        if self.cuda:
            self.parts = Parts(_event, lambda a, b: a.elapsed_time(b) / 1e3)
        else:
            self.parts = Parts(time.process_time, lambda a, b: b - a)
        instrument(adapter, self.parts)
        with mock.patch.object(FreedMemory, "keep") if form == "release" else contextlib.nullcontext():
            self.trainer = Trainer(recipe, adapter, progress=lambda step: None)
        if released:
            self.trainer.optimizer = release.make_optimizer(self.trainer.optimizer)
        self.streams = {task: loader.steps() for task, loader in self.trainer.loaders.items()}
        self.batches = self._load()
        self.precision = {"fp32": "float32", "bf16": "bfloat16"}[recipe.train.precision]

    def count(self) -> dict[str, Any]:
        """Run a step under a counter of operators.

        FLOPs of ours on a GPU are computed by `reca check` for the same samples, because not all GPU kernels report
        theirs.
        """
        recipe = self.trainer.recipe
        # Dynamo never compiles a function again that it has first met under such a mode, so run eagerly here.
        with torch.compiler.set_stance("force_eager"), Counter() as counter, counter.waits() as waits:
            self._train_step()
        if self.trainer.freed.kept:
            self._train_step()
        launches = counter.launches
        if self.cuda:  # layers may be compiled, while the counter ran them operator by operator
            if compiled_blocks.wanted(recipe.train, self.trainer.device):
                self._train_step()  # warm-up: compilation and autotuning
            launches, waits = _launches_and_waits(self._train_step)
        flops, useful = counter.flops, 0.0
        if self.form == "ours":
            meta, fake = build_meta(recipe)
            with as_gpu() if self.cuda else contextlib.nullcontext():
                useful = checked = _flops(recipe, meta, self.batches["reca"], fake)
                if recipe.train.activation_checkpointing:
                    checkpoint_activations(meta, recipe.train)
                    checked = _flops(recipe, meta, self.batches["reca"], fake)
            if self.cuda:
                flops = checked
            else:  # the count on a CPU omits unused results that a GPU would compute
                useful = flops - (checked - useful)
        return {
            "images": recipe.objective.reca.batch_size,
            "flops": flops,
            "useful_flops": useful,
            "operators": launches,
            "bytes": counter.bytes,
            "host_waits": len(waits),
            "trained": sum(p.numel() for p in self.trainer.adapter.parameters() if p.requires_grad),
            "dtype": self.precision,
        }

    def step(self) -> dict[str, Any]:
        """Run a step on the samples that were counted. A new batch is loaded only to time the loading.

        Return the seconds of the parts and of the step, and the peak memory: of this step on a GPU, so far on a CPU.
        """
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()  # the peak must not include the counted step, which ran uncompiled
        began = time.perf_counter()
        with timed_trainer(self.trainer, self.parts), self.parts.step():
            with self.parts.part("waiting"):
                self._load()
            self._train_step()
        if self.cuda:
            torch.cuda.synchronize()
        wall, parts = time.perf_counter() - began, self.parts.seconds()
        return {
            "seconds": wall if self.cuda else sum(parts.values()),
            "wall": wall,
            "parts": parts,
            "peak": peak_memory(self.trainer.device),
        }

    def _train_step(self) -> None:
        """Run the step. In the released form autocast casts weights in every micro-batch."""
        cast_once = self.form == "ours"
        with (
            contextlib.nullcontext() if cast_once else mock.patch.object(half_weights, "CAST", ()),
            training_kernels(self.trainer.recipe.train.precision, self.trainer.device),
        ):
            self.trainer.train_step(self.batches)

    def _load(self) -> dict[str, list]:
        return self.trainer.next_batches(self.streams)


def _flops(recipe: Recipe, meta: Adapter, batches: list[Batch], fake: FakeTensorMode) -> float:
    """Return the FLOPs of a step of ours, with the masks that the step draws."""
    rng = task_rng(recipe.train.seed, "reca")
    return sum(len(batch) * sum(counts.batch_flops(meta, counts.without_memory(batch, fake), rng)) for batch in batches)


def _event() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _launches_and_waits(train_step: Callable[[], None]) -> tuple[int, list]:
    """Count the kernel launches of one step, and collect the host synchronisations of another."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        train_step()
    launched = sum(event.count for event in record.key_averages() if event.key.startswith(LAUNCHES))
    with _waits() as waits:
        train_step()
    return launched, waits


@contextlib.contextmanager
def _waits() -> Iterator[list]:
    """Collect torch's warnings of host synchronisations in the forward and backward passes of a step."""
    before, inner = torch.cuda.get_sync_debug_mode(), objective.backward

    def backward(*args: Any, **kwargs: Any) -> Any:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            return inner(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode(before)

    found: list = []
    with warnings.catch_warnings(record=True) as said, mock.patch.object(objective, "backward", backward):
        warnings.simplefilter("always")
        yield found
        found += [one for one in said if "synchroniz" in str(one.message)]


def main(arguments: list[str]) -> None:
    model, size, form, device, folder, changes = arguments
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries goes to stderr
    if device == "cpu":
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    worker = None
    for line in sys.stdin:
        try:
            worker = worker or Worker(model, size, form, device, Path(folder), json.loads(changes))
            answer = getattr(worker, line.strip())()
        except Exception as error:  # reported by the parent process
            answer = {"error": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"}
            traceback.print_exc()
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
