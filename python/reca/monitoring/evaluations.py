"""Evaluation during training (eval.every): held-out images, prompts of a suite, and alarms for model collapse."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from reca import distributed, inference
from reca.config.recipe import Recipe
from reca.data.sample import Source
from reca.eval import training
from reca.io import jsonl
from reca.models.base import Adapter
from reca.models.common.inference import eval_mode
from reca.monitoring.alarms import GAP, LOSS, Alarms, spread
from reca.monitoring.log import due
from reca.monitoring.validation import HeldOut
from reca.runs.sources import HELD_OUT


class Evaluation(NamedTuple):
    """One evaluation, the same on all ranks.

    values   named as in log.jsonl
    new      messages of the alarms that it raised and that were not active before
    active   messages of all alarms that are active after it
    failed   what could not be measured, and why
    seconds  duration
    """

    values: dict[str, float]
    new: list[str]
    active: list[str]
    failed: list[str]
    seconds: float


class Evaluations:
    """The evaluations of a run. All ranks must make the same calls. Weights and random states do not change.

    sources: data of the run, with the held-out images.
    """

    def __init__(
        self,
        recipe: Recipe,
        adapter: Adapter,
        sources: Mapping[str, Source],
        device: torch.device,
        autocast: contextlib.AbstractContextManager,
    ):
        self.recipe, self.adapter, self.device, self.autocast = recipe, adapter, device, autocast
        self.every, run_dir = recipe.eval.every, Path(recipe.run_dir)
        self.held_out: HeldOut | None = None
        self.suite: training.TrainingSuite | None = None
        self.alarms = Alarms(recipe.eval)
        self.begun = False
        if not self.every:
            return
        if HELD_OUT in sources:
            self.held_out = HeldOut(recipe, adapter, sources[HELD_OUT], device, autocast)
        if recipe.eval.suite is not None:
            with distributed.fail_together():  # it reads files
                self.suite = training.TrainingSuite(recipe, run_dir)

    def resume(self, run_dir: Path, step: int) -> None:
        """Replay the evaluations up to `step` from log.jsonl, so that later ones are compared with them."""
        lines: list[dict[str, Any]] = []
        with distributed.fail_together():
            if self.every and distributed.rank() == 0:
                lines = [line for line in jsonl.read_log(run_dir / "log.jsonl") if line.get("evaluation")]
        for line in distributed.all_gather(lines)[0]:
            if line["step"] <= step:
                self.begun = True
                self.alarms.check(line["step"], {k: v for k, v in line.items() if isinstance(v, int | float)})

    def due(self, step: int) -> bool:
        """Tell whether to evaluate after `step`: the first time, every eval.every steps, and at the end."""
        return self.every > 0 and (not self.begun or due(step, self.every) or step == self.recipe.train.steps)

    def run(self, step: int) -> Evaluation:
        """Evaluate the model after `step`. A measurement that fails is left out, and training continues.

        Raises inference.RanksWait if memory is exhausted while ranks share the weights.
        """
        started = time.perf_counter()
        devices = [self.device] if self.device.type == "cuda" else []
        values: dict[str, float] = {}
        failed: list[str] = []
        with torch.random.fork_rng(devices), eval_mode(self.adapter):
            for name, measure in self._measures(step):
                found, reason = inference.try_on_all_ranks(self.adapter, measure)
                values |= found or {}
                if reason:
                    failed.append(f"no {name} ({reason}); training continues")
        values, failed = distributed.all_gather((values, failed))[0]
        self.begun = True
        new = self.alarms.check(step, values)
        active = list(self.alarms.active.values())
        return Evaluation(values, new, active, failed, time.perf_counter() - started)

    def _measures(self, step: int) -> Iterator[tuple[str, Callable[[], dict[str, float]]]]:
        """Yield the measurements, each with its name for messages."""
        if self.held_out is not None:
            yield "held-out loss", self._held_out
        if self.suite is not None:
            yield f"score of {self.suite.name}", lambda: self._scored(step)
        elif self.recipe.log.prompts:
            yield "images of log.prompts", self._drawn

    def _held_out(self) -> dict[str, float]:
        assert self.held_out is not None
        found = self.held_out.measure()
        return {LOSS: found.loss, GAP: found.gap}

    def _scored(self, step: int) -> dict[str, float]:
        assert self.suite is not None
        scored = self.suite.run(self.adapter, step, self.device, self.autocast)
        return {} if scored is None else training.values(scored.results) | spread(scored.images)

    def _drawn(self) -> dict[str, float]:
        prompts = self.recipe.log.prompts
        with self.autocast:
            images = inference.generate(self.adapter, prompts, range(len(prompts)))
        return spread(images)
