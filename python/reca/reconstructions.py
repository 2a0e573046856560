"""Images beside what a model makes of them from its own h_v: what RECA trains, to look at.

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
from reca.config import Recipe
from reca.data.batch import Batch
from reca.data.errors import BadSample, DataError
from reca.data.loader import Row, open_loader
from reca.data.pixels import read_image
from reca.data.sample import Source
from reca.image_grid import make_grid
from reca.models.base import Adapter
from reca.models.common.inference import eval_mode
from reca.validation import HELD_OUT, data_of, open_run_sources, seed

log = logging.getLogger("reca")

GRID = "reconstructions.png"  # in the folder of a run, a row for each image: it, before training, after it
BEFORE = Path("samples") / "before"  # in that folder: what the model made before the first step


def images_to_show(recipe: Recipe) -> Source:
    """Open the images to show: those that the recipe holds out; where it holds out none, those that it trains on."""
    tasks = [] if recipe.eval.holdout else ["reca"]
    sources = open_run_sources(recipe, tasks)
    return sources[HELD_OUT] if recipe.eval.holdout else sources["reca"]


def image_batch(recipe: Recipe, adapter: Adapter, count: int, source: Source | None = None) -> Batch:
    """Read `count` images, fewer where there are no more, with a template each: always the same ones.

    source: the images, where they have been opened already. One that cannot be read is left out. Raises DataError
    where none can.
    """
    return named_images(recipe, adapter, count, images_to_show(recipe) if source is None else source)[1]


def named_images(recipe: Recipe, adapter: Adapter, count: int, source: Source) -> tuple[list[str], Batch]:
    """Read images as `image_batch` does, and return the key of each beside them."""
    loader = open_loader(
        data_of(recipe), "reca", adapter.views("reca"), seed=seed(recipe), micro_batch=1, source=source
    )
    rows: list[Row] = []
    reason = "there is none"
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
        raise DataError(f"no image to reconstruct can be read; the last: {reason}")
    return [row.sample.key for row in rows], loader.batch_of(rows)


@torch.no_grad()
def reconstruct(
    adapter: Adapter,
    batch: Batch,
    context: contextlib.AbstractContextManager | None = None,
    seeds: Sequence[int] | None = None,
    **sampling: Any,
) -> list[Tensor]:
    """Reconstruct the images of a batch, uint8 [3, H, W] each. The same seeds make the same noise.

    context: what the model computes in; by default as outside of training. seeds: 0, 1, ... by default.
    """
    device = next(adapter.parameters()).device

    def draw(places: Sequence[int], own: Sequence[int]) -> list[Tensor]:
        return adapter.reconstruct(batch.part(places).to(device), list(own), **sampling)

    with eval_mode(adapter), context or adapter.inference_autocast():
        columns = range(len(batch)), list(seeds or range(len(batch)))
        return inference.in_batches(adapter, "reconstruct", draw, columns)


def side_by_side(*columns: Sequence[Tensor]) -> Image.Image:
    """Lay images out in columns, a row for each image; such as the input, before and after training."""
    return make_grid([image for row in zip(*columns, strict=True) for image in row], columns=len(columns))


def save_before(run_dir: Path, made: Sequence[Tensor]) -> None:
    """Keep what a model makes of the images before its first step."""
    shutil.rmtree(run_dir / BEFORE, ignore_errors=True)
    (run_dir / BEFORE).mkdir(parents=True)
    for number, image in enumerate(made):
        make_grid([image]).save(run_dir / BEFORE / f"{number:03d}.png")


def save_grid(run_dir: Path, shown: Sequence[Tensor], after: Sequence[Tensor]) -> Path | None:
    """Lay the images out beside what the model made of them before and makes now; None where nothing was kept."""
    before = [read_image(path) for path in sorted((run_dir / BEFORE).glob("*.png"))]
    if len(before) != len(shown):
        return None
    side_by_side(shown, before, after).save(run_dir / GRID)
    return run_dir / GRID
