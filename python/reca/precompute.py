"""`reca cache`: the features of all images, made ahead of training and packed in shards."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from reca import distributed, preflight, units
from reca.config import Recipe
from reca.data.batch import Batch
from reca.data.errors import BadSample, LeftOut
from reca.data.feature_shards import fill
from reca.data.loader import Loader, Row, open_loader
from reca.data.read_ahead import read_ahead
from reca.models import umm_package
from reca.models.base import Adapter
from reca.models.common.deferred_weights import DeferredWeights, deferring
from reca.options import RecipeError
from reca.precision import autocast, cast, training_kernels
from reca.recipe_files import as_dict


def features_identity(recipe: Recipe) -> list[Any]:
    """Return what, beside images and views, the features of a recipe's frozen encoders depend on."""
    return [recipe.umm, recipe.train.precision, as_dict(recipe)["model"]]


def load_encoders(recipe: Recipe, device: torch.device) -> Adapter:
    """Load a recipe's model with the weights that `encode` reads alone, where the model says which; others are meta.

    Every rank must call it.
    """
    kind = umm_package(recipe.umm).Adapter
    if kind.encoder_roles is None:
        return kind.load(recipe.model, device)
    with deferring():
        adapter = kind.load(recipe.model, torch.device("cpu"))
    wanted = {name for name, role in adapter.roles().items() if role in kind.encoder_roles}
    DeferredWeights(adapter).fill_only(adapter, device, wanted)
    return adapter


def cache_features(recipe: Recipe) -> list[str]:
    """Make the features of every image of every active task, this rank its share. Returns lines that say what was done.

    What is in the cache is left as it is, so the same command goes on where one was stopped, on any number of ranks.
    Raises RecipeError without data.cache, and DataError and OSError of data and disk.
    """
    if recipe.data.cache is None:
        raise RecipeError("data.cache is null: give the folder of the features, as in data.cache=/fast/disk/features")
    device = distributed.initialize(recipe.parallel.timeout_minutes)
    with distributed.fail_together(), preflight.memory_errors():
        adapter = cast(load_encoders(recipe, device).train(), recipe.train.precision)
    context = autocast(recipe.train.precision, device)
    lines = []
    for task in recipe.active_tasks():
        config = getattr(recipe.objective, task)
        with distributed.fail_together():
            loader = open_loader(
                recipe.data, task, adapter.views(task), seed=recipe.train.seed, micro_batch=config.micro_batch,
                bad_samples=Path(recipe.data.cache) / f"bad_{task}.jsonl", identity=features_identity(recipe),
            )  # fmt: skip

        def encode(rows: list[Row], loader: Loader = loader) -> dict[str, Any]:
            batch: Batch = loader.batch_of(rows).to(device)
            with context, training_kernels(recipe.train.precision, device):
                return adapter.encode(batch)

        assert loader.cache is not None
        started, reader, folder = time.perf_counter(), _Reader(loader), loader.cache.folder
        with distributed.fail_together():
            done = fill(iter(reader), config.micro_batch, encode, folder)
        loader.close()
        took = time.perf_counter() - started
        lines.append(
            f"{task}: {done.images} images encoded ({units.size(done.bytes)}, {done.images / took:.1f} images/s), "
            f"{reader.cached} were there, {loader.bad} bad; in {folder}"
        )
    return lines


class _Reader:
    """The rows of this rank whose features are missing, read ahead by threads. cached: counts the others."""

    def __init__(self, loader: Loader):
        self.loader, self.cached = loader, 0

    def __iter__(self) -> Iterator[tuple[str, Row]]:
        rank, world, size = distributed.rank(), distributed.world_size(), len(self.loader.source)
        indices = range(rank, size, world)
        with tqdm(total=len(indices), unit="image", disable=None if rank == 0 else True) as bar:
            for row in read_ahead(self._read, indices, self.loader.config.workers):
                yield from self._take(row, bar)

    def _take(self, row: Row | None, bar: Any) -> Iterator[tuple[str, Row]]:
        bar.update()
        if row is None:
            return
        if row.features is not None:
            self.cached += 1
        else:
            yield row.address, row

    def _read(self, index: int) -> Row | None:
        try:
            return self.loader.row_of(index)
        except LeftOut:
            return None
        except BadSample as error:
            self.loader.bad_samples.add(index, str(error))
            return None
