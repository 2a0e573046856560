"""Reconstruction loss of the held-out images with fixed noise, masks and templates.

The loss depends on the weights only: images, their order, their split into micro-batches and all random numbers are
fixed by the `eval` keys. The same weights give bit-identical losses at any step, and on any number of ranks the same
loss up to the order of summation.
"""

import contextlib
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch

from reca import distributed, objective
from reca.config.recipe import Recipe
from reca.data.batch import Batch
from reca.data.config import DataConfig
from reca.data.loader import Loader, Stream
from reca.data.micro_batches import split_batch
from reca.data.sample import Source
from reca.models.base import Adapter
from reca.rng import CounterRNG

PURPOSE = 0x5EED  # separates random numbers of held-out images from those of training


class Gap(NamedTuple):
    """Means over held-out images.

    loss  reconstruction loss with the image's own h_v
    gap   loss with another image's h_v, minus `loss`
    """

    loss: float
    gap: float


class HeldOut:
    """The held-out images of a run, read once and kept in host memory. All ranks must construct and call it alike."""

    def __init__(
        self,
        recipe: Recipe,
        adapter: Adapter,
        source: Source,
        device: torch.device,
        autocast: contextlib.AbstractContextManager,
    ):
        self.adapter, self.device, self.autocast, self.seed = adapter, device, autocast, seed(recipe)
        # Split as on one rank, so that micro-batches do not depend on the number of ranks.
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
        """Compute the loss and the gap of the current weights."""
        own, other = (
            objective.evaluate(self.adapter, self._batches(), self.seed, self.autocast, condition)
            for condition in ("own", "other")
        )
        return Gap(own, other - own)

    def _batches(self) -> Iterable[Batch]:
        return (batch.to(self.device) for batch in self.batches)


def data_of(recipe: Recipe) -> DataConfig:
    """Return the recipe's data config for held-out images: without shuffling, feature cache and prefetching."""
    return replace(recipe.data, cache=None, shuffle=False, prefetch=0)


def seed(recipe: Recipe) -> int:
    """Return the seed of all random numbers for held-out images."""
    return CounterRNG(recipe.eval.seed, PURPOSE).seed
