"""Images next to their reconstructions from h_v, the task that RECA trains.

batch = image_batch(recipe, adapter, 8)
before, after = reconstruct(base, batch), reconstruct(trained, batch)
side_by_side(batch.gen, before, after).save("reconstructions.png")
"""

import contextlib
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from reca import inference
from reca.config.recipe import Recipe
from reca.data.batch import Batch
from reca.data.errors import BadSample, DataError
from reca.data.loader import Row, open_loader
from reca.data.pixels import read_image
from reca.data.sample import Source
from reca.io.folders import make_inside
from reca.io.image_grid import make_grid, to_pil
from reca.models.base import Adapter
from reca.monitoring.validation import data_of, seed
from reca.runs.sources import HELD_OUT, open_run_sources

log = logging.getLogger("reca")

GRID = "reconstructions.png"  # in the run folder; a row per image: original, before training, after training
BEFORE = Path("samples") / "before"  # in the run folder: reconstructions from before the first step


def images_to_show(recipe: Recipe) -> Source:
    """Open the images to reconstruct: the held-out images, or the training images if eval.holdout is 0."""
    tasks = [] if recipe.eval.holdout else ["reca"]
    sources = open_run_sources(recipe, tasks)
    return sources[HELD_OUT] if recipe.eval.holdout else sources["reca"]


def image_batch(recipe: Recipe, adapter: Adapter, count: int, source: Source | None = None) -> Batch:
    """Read up to `count` images with a template each; the choice is deterministic.

    source: the images; None: `images_to_show`. Unreadable images are skipped. Raises DataError if none can be read.
    """
    return named_images(recipe, adapter, count, images_to_show(recipe) if source is None else source)[1]


def named_images(recipe: Recipe, adapter: Adapter, count: int, source: Source) -> tuple[list[str], Batch]:
    """Read images as `image_batch` does. Return their keys and the batch."""
    loader = open_loader(
        data_of(recipe), "reca", adapter.views("reca"), seed=seed(recipe), micro_batch=1, source=source
    )
    rows: list[Row] = []
    reason = "there are none"
    for index in map(loader.order.index, range(len(source))):
        if len(rows) == count:
            break
        try:
            rows.append(loader.row_of(index))
        except BadSample as error:
            reason = f"{source.key(index)}: {error}"
            log.warning("no reconstruction of %s", reason)
    loader.close()
    if not rows:
        raise DataError(f"no image to reconstruct can be read; last error: {reason}")
    return [row.sample.key for row in rows], loader.batch_of(rows)


@torch.no_grad()
def reconstruct(
    adapter: Adapter,
    batch: Batch,
    context: contextlib.AbstractContextManager | None = None,
    seeds: Sequence[int] | None = None,
    **sampling: Any,
) -> list[Tensor]:
    """Reconstruct the images of a batch, uint8 [3, H, W] each. Equal seeds draw equal noise.

    context: autocast context; by default the adapter's inference context. seeds: 0, 1, ... by default.
    """
    device = next(adapter.parameters()).device

    def draw(places: Sequence[int], own: Sequence[int]) -> list[Tensor]:
        return adapter.reconstruct(batch.part(places).to(device), list(own), **sampling)

    with context or adapter.inference_autocast():
        columns = range(len(batch)), list(seeds or range(len(batch)))
        return inference.in_batches(adapter, "reconstruct", draw, columns)


def side_by_side(*columns: Sequence[Tensor]) -> Image.Image:
    """Arrange images in a grid, given as columns, such as input, before and after training. One row per image."""
    return make_grid([image for row in zip(*columns, strict=True) for image in row], columns=len(columns))


def save_before(run_dir: Path, made: Sequence[Tensor]) -> None:
    """Save the reconstructions of a model before its first step; earlier ones are removed."""
    shutil.rmtree(run_dir / BEFORE, ignore_errors=True)
    make_inside(run_dir, run_dir / BEFORE)
    for number, image in enumerate(made):
        to_pil(image).save(run_dir / BEFORE / f"{number:03d}.png")


def save_grid(run_dir: Path, shown: Sequence[Tensor], after: Sequence[Tensor]) -> Path | None:
    """Save a grid of images with their reconstructions before and after training, and return its path.

    Return None if `save_before` has not saved a reconstruction of each.
    """
    before = [read_image(path) for path in sorted((run_dir / BEFORE).glob("*.png"))]
    if len(before) != len(shown):
        return None
    side_by_side(shown, before, after).save(run_dir / GRID)
    return run_dir / GRID
