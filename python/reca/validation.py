"""Held-out images: which they are, and their reconstruction loss with fixed noise, masks and templates.

The loss is a function of the weights alone: images, their order, their split into micro-batches and all random
numbers follow from `eval`, so the same weights give the same bits at any step, and on other numbers of ranks the same
value up to the order of sums.
"""

import contextlib
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch

from reca import distributed, objective
from reca.config import Recipe
from reca.data.batch import Batch
from reca.data.config import DataConfig
from reca.data.held_out import hold_out, take
from reca.data.loader import Loader, Stream
from reca.data.sample import Source
from reca.data.sources import open_source, open_sources
from reca.micro_batches import split_batch
from reca.models.base import Adapter
from reca.options import RecipeError
from reca.rng import CounterRNG

HELD_OUT = "held-out"  # stands for the held-out images beside the tasks among the sources of a run
PURPOSE = 0x5EED  # keeps random numbers of held-out images apart from those of training


def open_run_sources(recipe: Recipe, tasks: Iterable[str]) -> dict[str, Source]:
    """Open what a run trains on, by task, and under HELD_OUT its held-out images, if there are any.

    Raises DataError, and RecipeError for eval.holdout_from without a number of images.
    """
    config, data = recipe.eval, recipe.data
    if config.holdout_from is not None and not config.holdout:
        raise RecipeError("eval.holdout_from needs eval.holdout, the number of images; it is 0")
    split = config.holdout and config.holdout_from is None
    wanted = dict.fromkeys([*tasks, *(["reca"] if split else [])])
    sources = open_sources(data, wanted, recipe.train.seed)
    if split:
        sources, aside = hold_out(sources, config.holdout, config.seed)
        sources[HELD_OUT] = aside
    elif config.holdout_from is not None:
        given = open_source(config.holdout_from, "reca", data.image_root, data.columns)
        sources[HELD_OUT] = take(given, config.holdout, config.seed)
    return sources


class Gap(NamedTuple):
    """Means over held-out images.

    loss  with their own h_v
    gap   how much larger the loss is with another image's h_v
    """

    loss: float
    gap: float


class HeldOut:
    """The held-out images of a run, read once and kept in host memory. Every rank makes and asks it alike.

    source: of the images.
    """

    def __init__(
        self,
        recipe: Recipe,
        adapter: Adapter,
        source: Source,
        device: torch.device,
        autocast: contextlib.AbstractContextManager,
    ):
        self.adapter, self.device, self.autocast, self.seed = adapter, device, autocast, seed(recipe)
        # Split as one rank would, whatever their number, so that each image meets the same others in a pass.
        shares = split_batch(len(source), recipe.objective.reca.micro_batch, 1)[0]
        mine = shares[distributed.rank() :: distributed.world_size()]
        missing = -(-len(shares) // distributed.world_size()) - len(mine)
        mine += [shares[0]._replace(counted=False)] * missing  # FSDP2 communicates in every pass
        stream = Stream(mine, len(source), neighbours=True)
        with distributed.fail_together():
            loader = Loader(
                data_of(recipe), source, "reca", adapter.views("reca"), self.seed, stream, prepare=adapter.prepare
            )
            batches = iter(loader)
            self.batches: list[Batch] = [next(batches) for _ in mine]
            loader.close()

    def measure(self) -> Gap:
        """Compute the loss of the model as it is now."""
        own, other = (
            objective.evaluate(self.adapter, self._batches(), self.seed, self.autocast, condition)
            for condition in ("own", "other")
        )
        return Gap(own, other - own)

    def _batches(self) -> Iterable[Batch]:
        return (batch.to(self.device) for batch in self.batches)


def data_of(recipe: Recipe) -> DataConfig:
    """Return the recipe's data as held-out images are read: as they are stored, with pixels and not from a cache."""
    return replace(recipe.data, cache=None, shuffle=False, prefetch=0)


def seed(recipe: Recipe) -> int:
    """Return the seed of all that is drawn for held-out images."""
    return CounterRNG(recipe.eval.seed, PURPOSE).seed
