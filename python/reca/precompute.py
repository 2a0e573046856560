"""`reca cache`: the features of all images, computed ahead of training and packed into shards."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from reca import distributed, units
from reca.config.recipe import LoraConfig, Recipe
from reca.data.batch import Batch
from reca.data.errors import BadSample, LeftOut
from reca.data.feature_shards import fill
from reca.data.loader import Loader, Row, open_loader
from reca.data.read_ahead import read_ahead
from reca.estimate import out_of_memory
from reca.io.folders import ensure_writable
from reca.models import umm_package
from reca.models.base import Adapter
from reca.models.common.deferred_weights import DeferredWeights, deferring
from reca.options.fields import RecipeError
from reca.precision import autocast, cast, training_kernels
from reca.runs.lineage import check_parent, load_parent
from reca.runs.published import published_model
from reca.training.lora import published_name


def features_identity(recipe: Recipe, adapter: Adapter, parent: str | None) -> list[Any]:
    """Return what the features of a recipe's frozen encoders depend on, other than images and views.

    parent: digest of the checkpoint that the run started from. It is included if `encode` reads one of its parameters.
    """
    found = [recipe.train.precision, published_model(recipe)]
    return [*found, parent] if adapter.inherited and _encoders(adapter) & adapter.inherited else found


def _encoders(adapter: Adapter) -> set[str]:
    """Return the published names of the parameters that `encode` reads."""
    roles, read = adapter.roles(), adapter.encoder_roles
    return {published_name(name) for name, role in roles.items() if read is None or role in read}


def load_encoders(recipe: Recipe, device: torch.device) -> tuple[Adapter, str | None]:
    """Load the model that a run of this recipe starts from, with only the weights that `encode` reads.

    Other parameters are on the meta device. If the model does not declare `encoder_roles`, all weights are loaded.
    Returns the model and the digest that `load_parent` returns.
    All ranks must call it. Raises as `check_parent` for train.init_from.
    """
    kind, plain, weights = umm_package(recipe.umm).Adapter, replace(recipe, lora=LoraConfig()), None
    with distributed.fail_together(), out_of_memory.memory_errors():  # a node may lack a file
        if kind.encoder_roles is None:
            adapter = kind.load(recipe.model, device)
        else:
            with deferring():
                adapter = kind.load(recipe.model, torch.device("cpu"))
            weights = DeferredWeights(adapter)
            weights.read_only(adapter, device, _encoders(adapter))
        check_parent(plain, adapter)
    if weights is not None:
        weights.receive(adapter)
    return adapter, load_parent(adapter, plain)


def cache_features(recipe: Recipe) -> list[str]:
    """Compute this rank's share of the features of all images of all active tasks. Return a summary line per task.

    Cached features are kept, so an interrupted command can be repeated, on any number of ranks. The summary counts all
    ranks.
    Raises RecipeError if data.cache is not set, DataError for the data and OSError for the disk.
    """
    if recipe.data.cache is None:
        raise RecipeError("data.cache is null: set the folder of the features, as in data.cache=/fast/disk/features")
    device = distributed.initialize(60 * distributed.HOURS)  # shares differ in size if some features are cached
    adapter, parent = load_encoders(recipe, device)
    with distributed.fail_together(), out_of_memory.memory_errors():
        cast(adapter.train(), recipe.train.precision)
        identity = features_identity(recipe, adapter, parent)
    context = autocast(recipe.train.precision, device)
    lines = []
    for task in recipe.active_tasks():
        config = getattr(recipe.objective, task)
        with distributed.fail_together():
            loader = open_loader(
                recipe.data, task, adapter.views(task), seed=recipe.train.seed, micro_batch=config.micro_batch,
                bad_samples=Path(recipe.data.cache) / f"bad_{task}.jsonl", identity=identity,
            )  # fmt: skip
            assert loader.cache is not None
            folder = ensure_writable(loader.cache.folder, "data.cache")

        def encode(rows: list[Row], loader: Loader = loader) -> dict[str, Any]:
            batch: Batch = loader.batch_of(rows).to(device)
            with context, training_kernels(recipe.train.precision, device):
                return adapter.encode(batch)

        started, reader = time.perf_counter(), _Reader(loader)
        with distributed.fail_together():
            done = fill(reader, config.micro_batch, encode, folder)
            loader.close()
        took = time.perf_counter() - started
        counts = distributed.all_gather((done.images, done.bytes, reader.cached))
        images, size, cached = map(sum, zip(*counts, strict=True))
        lines.append(
            f"{task}: {images} images encoded ({units.size(size)}, {images / took:.1f} images/s), "
            f"{cached} already cached, {loader.bad} bad; in {folder}"
        )
    return lines


class _Reader:
    """Iterates over this rank's rows without cached features, read ahead by threads. cached: count of the others.

    A rank's rows are contiguous, so that ranks read different row groups.
    """

    def __init__(self, loader: Loader):
        self.loader, self.cached = loader, 0

    def __iter__(self) -> Iterator[tuple[str, Row]]:
        rank, ranks, size = distributed.rank(), distributed.world_size(), len(self.loader.source)
        indices = range(size * rank // ranks, size * (rank + 1) // ranks)
        with tqdm(total=len(indices), unit="image", disable=None if rank == 0 else True) as bar:
            for row in read_ahead(self._read, indices, self.loader.config.workers, self.loader.closed):
                bar.update()
                if row is not None and row.features is None:
                    yield row.address, row
                elif row is not None:
                    self.cached += 1

    def _read(self, index: int) -> Row | None:
        try:
            return self.loader.row_of(index)
        except LeftOut:
            return None
        except BadSample as error:
            self.loader.bad_samples.add(index, str(error))
            return None
