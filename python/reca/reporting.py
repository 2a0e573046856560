"""What a run tells while it goes on: metrics and warnings of every step, through the log."""

import logging
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from reca import determinism, distributed, micro_batches, monitors
from reca.config import Recipe
from reca.data.loader import Loader
from reca.log import RunLog, due
from reca.models.base import Adapter

log = logging.getLogger("reca")


class RunReport:
    """Adds speed to the metrics of a step, watches them, and passes them to the log. A context manager."""

    def __init__(
        self,
        recipe: Recipe,
        adapter: Adapter,
        roles: Sequence[str],
        loaders: Mapping[str, Loader],
        record: RunLog,
        progress: Callable[[int], None] | None,
    ):
        self.recipe, self.loaders, self.record, self.progress = recipe, loaders, record, progress
        self.tasks = recipe.active_tasks()
        self.images = sum(getattr(recipe.objective, task).batch_size for task in self.tasks)  # of a step
        self.monitor = monitors.Monitor()
        self.first_warnings = monitors.config_warnings(recipe, adapter, roles)
        if warning := micro_batches.size_warning(recipe.objective, self.tasks, distributed.world_size()):
            self.first_warnings.append(warning)

    def __enter__(self) -> "RunReport":
        return self

    def __exit__(self, *_: object) -> None:
        self.record.close()

    def begin(self, step: int) -> None:
        """Tell what is set, and what is known before the first step to go wrong. step: those made before."""
        if self.recipe.train.deterministic and distributed.rank() == 0:
            log.info(determinism.describe())
        for text in self.first_warnings:
            self.record.warn(step, text)

    def step(self, step: int, metrics: dict[str, float], seconds: float, data_wait: float) -> None:
        """Report a step. seconds: all of it; data_wait: those in which it waited for batches."""
        metrics |= {"images_per_s": self.images / seconds, "data_wait_s": data_wait}
        for warning in self.monitor.check(step, metrics, self.tasks):
            self.record.warn(step, warning)
        self.record.progress(metrics["loss"], metrics["images_per_s"])
        if self.progress:
            self.progress(step)
        if due(step, self.recipe.log.every) or step == self.recipe.train.steps:
            metrics |= {f"{task}/loader_images_per_s": loader.images_per_s() for task, loader in self.loaders.items()}
            self.record.record(step, metrics)

    def sample_images(self, step: int, images: list[Tensor]) -> None:
        self.record.sample_images(step, images)
