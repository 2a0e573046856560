"""Reporting of a run through its log: header, metrics and warnings of every step, evaluations and samples."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from reca import distributed, inference
from reca.config.recipe import Recipe
from reca.data import micro_batches
from reca.data.batch import Batch
from reca.data.loader import Loader
from reca.models.base import Adapter
from reca.monitoring import monitors, speed
from reca.monitoring.diagnostics import Diagnostics
from reca.monitoring.evaluations import Evaluation
from reca.monitoring.header import header
from reca.monitoring.log import RunLog, due
from reca.monitoring.reconstructions import save_before, save_grid
from reca.training import determinism
from reca_kernels.attention import op as attention

log = logging.getLogger("reca")


class RunReport:
    """Adds throughput to the metrics of a step, monitors them, and passes them to the log. A context manager.

    countable: the model is the recipe's, so that its FLOPs can be counted. progress: called with the number of
    completed steps, instead of console output.
    """

    def __init__(
        self,
        recipe: Recipe,
        adapter: Adapter,
        roles: Sequence[str],
        loaders: Mapping[str, Loader],
        device: torch.device,
        record: RunLog,
        progress: Callable[[int], None] | None,
        countable: bool,
        monitor: monitors.Monitor,
    ):
        self.recipe, self.adapter, self.loaders, self.device = recipe, adapter, loaders, device
        self.record, self.progress, self.countable = record, progress, countable
        self.tasks = recipe.active_tasks()
        images = sum(getattr(recipe.objective, task).batch_size for task in self.tasks)
        self.speed = speed.Speed(images, recipe.train.steps)
        self.monitor = monitor
        self.first_warnings = monitors.config_warnings(recipe, adapter, roles)
        if warning := micro_batches.size_warning(recipe.objective, self.tasks, distributed.world_size()):
            self.first_warnings.append(warning)

    def __enter__(self) -> "RunReport":
        return self

    def __exit__(self, *_: object) -> None:
        self.record.close()

    def begin(self, step: int) -> None:
        """Print the header and the warnings about the configuration. step: number of steps completed before."""
        attention.forget_ran()  # kernels of an earlier run in this process
        if distributed.rank() == 0:
            self.speed.peak, source = speed.peak_flops(self.device, self.recipe.log.peak_flops)
            peak = (self.speed.peak, source)
            self.record.print(header(self.recipe, self.adapter, self.loaders, self.device, step, peak))
            if self.recipe.train.deterministic:
                log.info(determinism.describe())
        for text in self.first_warnings:
            self.record.warn(step, text)

    def count_flops(self, batches: Mapping[str, Sequence[Batch]]) -> None:
        """Count the FLOPs of a step once, on rank 0, if the peak throughput is known."""
        if self.speed.peak is None or self.speed.flops is not None or not self.countable:
            return
        started = time.perf_counter()
        try:
            self.speed.flops = speed.step_flops(self.recipe, batches, self.adapter.tokenizer)
        except Exception as error:  # some models cannot run on fake tensors; training continues
            log.warning("the FLOPs of a step cannot be counted (%s: %s): no MFU is logged", type(error).__name__, error)
            self.countable = False
            return
        took = time.perf_counter() - started
        self.record.print([f"{'FLOPs':<11}{self.speed.flops / 1e12:.4g} TFLOP per step (counted in {took:.1f} s)"])

    def step(self, step: int, metrics: dict[str, float], seconds: float, data_wait: float) -> None:
        """Report a step. seconds: its total duration; data_wait: the part spent waiting for batches."""
        if self.speed.first is None and (ran := attention.ran(self.device.type)):
            self.record.print([f"{'attention':<11}{', '.join(ran)}"])
        self.speed.add(step, seconds, data_wait)
        for warning in self.monitor.check(step, metrics, self.tasks):
            self.record.warn(step, warning)
        self.record.step(metrics["loss"], self.speed.rate())
        if self.progress:
            self.progress(step)
        if due(step, self.recipe.log.every) or step == self.recipe.train.steps:
            metrics |= self.speed.metrics(self.device)
            metrics |= {f"{task}/bad_samples": float(loader.bad) for task, loader in self.loaders.items()}
            metrics |= {f"{task}/loader_images_per_s": loader.images_per_s() for task, loader in self.loaders.items()}
            self.record.record(step, metrics, self.speed.remaining(step))

    def evaluation(self, step: int, found: Evaluation) -> None:
        """Report the evaluation after `step`, with its failures and new alarms as warnings."""
        self.record.record_evaluation(step, found.values, found.active, found.seconds)
        for text in found.failed:
            self.record.warn(step, text)
        for text in found.new:
            self.record.warn(step, f"alarm: {text}")

    def sample(self, step: int, diagnostics: Diagnostics) -> None:
        """Generate and save the samples that are due after `step`. All ranks must call it."""
        if not due(step, self.recipe.log.sample_every):
            return
        if images := self._drawn(step, "images of log.prompts", "log.sample_every", diagnostics.images):
            self.record.sample_images(step, images)
        if pairs := self._drawn(step, "reconstructions", "log.reconstructions", diagnostics.reconstructions):
            self.record.reconstructions(step, pairs)

    def before_training(self, step: int, diagnostics: Diagnostics) -> None:
        """Save reconstructions of the untrained model if the run is new. All ranks must call it.

        step: number of steps completed before.
        """
        if step == 0:
            self._reconstruct(step, diagnostics, lambda shown, made: save_before(self.record.run_dir, made))

    def after_training(self, step: int, diagnostics: Diagnostics) -> None:
        """Save images with their reconstructions before and after training. All ranks must call it."""
        self._reconstruct(step, diagnostics, lambda shown, made: save_grid(self.record.run_dir, shown, made))

    def _reconstruct(
        self, step: int, diagnostics: Diagnostics, save: Callable[[list[Tensor], list[Tensor]], object]
    ) -> None:
        """Reconstruct the run's images and save them on rank 0. Does nothing if `progress` is set."""

        def draw() -> list[list[Tensor]]:
            pairs = diagnostics.reconstructions()
            if pairs and distributed.rank() == 0:
                save([image for image, _ in pairs], [made for _, made in pairs])
            return pairs

        if not self.progress:
            self._drawn(step, "reconstructions", "log.reconstructions", draw)

    def _drawn(self, step: int, what: str, key: str, draw: Callable[[], list]) -> list:
        """Generate images on every rank; return [] after a failure, with a warning in the log.

        A failure ends training only where other ranks would wait for this one. key: recipe key that disables these
        images if 0.
        """
        found, reason = inference.try_on_all_ranks(self.adapter, draw)
        if reason:
            self.record.warn(step, f"no {what} ({reason}); {key}=0 disables them")
        return found or []
