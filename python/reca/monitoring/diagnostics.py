"""Diagnostics besides the training loss: the condition gap, drift, images of fixed prompts and reconstructions."""

import contextlib
import copy
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from reca import inference, objective
from reca.config.recipe import Recipe
from reca.data.batch import Batch
from reca.data.loader import Loader, open_loader
from reca.models.base import Adapter
from reca.monitoring.log import due
from reca.monitoring.reconstructions import image_batch, reconstruct
from reca.runs.sources import HELD_OUT

FIXED_SAMPLES = 8  # whose loss measures drift


def drift_tasks(recipe: Recipe, model_tasks: Iterable[str]) -> list[str]:
    """List the tasks whose loss on fixed samples measures drift. model_tasks: tasks that the model supports."""
    there = {"i2t": recipe.data.conversations, "t2i": recipe.data.captions}
    return [task for task in there if there[task] and task in model_tasks and recipe.log.drift_every]


class Diagnostics:
    """The diagnostics of `log.gap_every`, `log.drift_every` and `log.sample_every`.

    All ranks must call it at the same steps.
    """

    def __init__(
        self,
        recipe: Recipe,
        adapter: Adapter,
        sources: Mapping[str, Any],
        loaders: Mapping[str, Loader],
        device: torch.device,
        autocast: contextlib.AbstractContextManager,
    ):
        self.recipe, self.adapter, self.loaders = recipe, adapter, loaders
        self.device, self.autocast = device, autocast
        self.fixed = {task: self._fixed_batch(task, sources[task]) for task in drift_tasks(recipe, adapter.tasks)}
        self.source = sources.get(HELD_OUT, sources.get("reca"))

    def measure(self, step: int, batches: Mapping[str, list[Batch]]) -> dict[str, float]:
        """Return the measurements that are due after `step`, named as in log.jsonl.

        batches: the micro-batches of the step, by task.
        """
        every, seed = self.recipe.log, self.recipe.train.seed
        found: dict[str, float] = {}
        if "reca" in batches and due(step, every.gap_every):
            probe = self._with_neighbour(batches["reca"][0])
            own, other = (objective.evaluate(self.adapter, [probe], seed, self.autocast, c) for c in ("own", "other"))
            found["reca/gap"] = other - own
        if due(step, every.drift_every) or (every.drift_every and step == 1):
            for task, batch in self.fixed.items():
                found[f"{task}/drift"] = objective.evaluate(self.adapter, [batch], seed, self.autocast)
        return found

    def images(self) -> list[Tensor]:
        """Generate an image for every prompt of `log.prompts`, with the same seeds each time."""
        prompts = self.recipe.log.prompts
        with self.autocast:
            return inference.generate(self.adapter, prompts, range(len(prompts))) if prompts else []

    def reconstructions(self) -> list[list[Tensor]]:
        """Reconstruct the same `log.reconstructions` images each time. Return pairs [image, reconstruction]."""
        if self.shown is None or self.shown.gen is None:
            return []
        made = reconstruct(self.adapter, self.shown, self.autocast)
        return [list(pair) for pair in zip(self.shown.gen, made, strict=True)]

    @functools.cached_property
    def shown(self) -> Batch | None:
        """Return the images to reconstruct; None if the recipe asks for none or the model cannot reconstruct."""
        wanted = self.recipe.log.reconstructions
        if not wanted or self.source is None or "reconstruct" not in self.adapter.abilities:
            return None
        return image_batch(self.recipe, self.adapter, wanted, self.source)

    def _with_neighbour(self, batch: Batch) -> Batch:
        """Return the batch, with a neighbour if it has a single sample: the gap needs the h_v of another one."""
        if len(batch) > 1 or batch.neighbour is not None:
            return batch
        batch = copy.copy(batch)
        batch.neighbour = self.loaders["reca"].sample(int(batch.sample_ids[0]) + 1).to(self.device)
        return batch

    def _fixed_batch(self, task: str, source: Any) -> Batch:
        loader = open_loader(
            self.recipe.data,
            task,
            self.adapter.views(task),
            seed=self.recipe.train.seed,
            micro_batch=FIXED_SAMPLES,
            source=source,
            prepare=self.adapter.prepare,
        )
        batch = next(iter(loader)).to(self.device)
        loader.close()
        return batch
