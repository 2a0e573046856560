"""Images with their reconstructions by both models, from h_v, with equal templates and equal noise."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reca.comparison.sides import Side, find_sides
from reca.config.recipe import Recipe
from reca.data.errors import DataError
from reca.data.pixels import encode_png
from reca.data.sample import Source
from reca.data.sources.factory import open_source
from reca.estimate.meta_model import build_meta
from reca.eval.errors import EvaluationError
from reca.eval.files import write
from reca.eval.targets import Target
from reca.hardware.devices import usable_device
from reca.io.files import parse_json
from reca.io.folders import ensure_writable
from reca.io.paths import is_file
from reca.io.shape import misfit
from reca.models import umm_package
from reca.monitoring.reconstructions import images_to_show, named_images, reconstruct
from reca.options.fields import RecipeError
from reca.options.sampling import check_sampling_options

COUNT = 8  # default number of images
QUICK = 50_000_000  # number of parameters below which a CPU generates images in seconds
FOLDER = "reconstructions"
MADE = "made.json"  # in that folder: what the images were generated from, and their names
SHAPE = {"of": list, "made": [{"name": str, "input": str, "before": str, "after": str}]}  # of that file


def usual_count(before: str, after: str) -> int:
    """Return the default number of images.

    It is 0 if a side has no weights or its model cannot reconstruct, and for large models without a GPU.
    """
    sides = find_sides(before, after)
    if any(side.recipe is None or side.lacks_weights or not _reconstructs(side.recipe) for side in sides):
        return 0
    if torch.cuda.is_available():
        return COUNT
    sizes = [sum(p.numel() for p in build_meta(side.recipe)[0].parameters()) for side in sides if side.recipe]
    return COUNT if max(sizes) < QUICK else 0


def _reconstructs(recipe: Recipe) -> bool:
    return "reconstruct" in umm_package(recipe.umm).Adapter.abilities


def draw(
    before: str,
    after: str,
    out: Path,
    count: int = COUNT,
    images: str | None = None,
    sampling: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Reconstruct images by both models into a subfolder of `out`. Return `reconstructions` of comparison.json.

    before, after: as in `compare`; both must have weights. images: in any form of data.images; by default the run's
    held-out or training images. sampling: options of the models' `reconstruct`.

    Existing reconstructions from the same weights, images and options are reused.
    Raises EvaluationError for a side without weights and for a full disk; DataError if images cannot be read;
    RecipeError for a model that cannot reconstruct; ValueError for options that `reconstruct` does not have.
    """
    sides, device = find_sides(before, after), usable_device(None)
    for side in sides:
        if side.recipe is None or (side.kind == "run" and side.weights is None):
            raise EvaluationError(f"{side.source} has no weights: reconstructions need two models")
        if not _reconstructs(side.recipe):
            raise RecipeError(f"{side.recipe.umm} cannot reconstruct images: set --reconstructions 0")
        check_sampling_options(umm_package(side.recipe.umm).Adapter.reconstruct, sampling or {})
    run = sides[1] if sides[1].kind == "run" else sides[0]
    assert run.recipe is not None
    place = out / FOLDER
    targets = [
        Target(side.source, side.recipe, True, place, checkpoint=side.weights)
        if side.kind == "run"
        else Target(side.source, side.recipe, False, place, run=side.base_of)
        for side in sides
    ]
    source = _open(run, images)
    shown = [run.recipe.eval.seed, len(source), source.identity()]  # wherever the images are

    def made_from(models: list[dict[str, Any]]) -> Any:
        return json.loads(json.dumps([models, shown, count, dict(sampling or {})], default=str))

    made = _made(place, made_from([target.fingerprint() for target in targets]))
    if made is None:
        ensure_writable(place, "folder")
        (place / MADE).unlink(missing_ok=True)  # it describes images that are about to be overwritten
        made, models = _draw(targets, run.recipe, source, count, place, device, sampling or {})
        write(place / MADE, json.dumps({"of": made_from(models), "made": made}, indent=1))
    kind = "given" if images else "held-out" if run.recipe.eval.holdout else "training"
    return {"pictures": kind, "source": images, "rows": made}


def _made(place: Path, wanted: Any) -> list[dict[str, Any]] | None:
    """Return the rows of existing reconstructions; None if they are of other inputs or an image is missing."""
    try:
        found = parse_json((place / MADE).read_bytes())
    except (OSError, ValueError):
        return None
    if misfit(found, SHAPE) is not None or found["of"] != wanted:
        return None
    paths = (place.parent / row[name] for row in found["made"] for name in ("input", "before", "after"))
    return found["made"] if all(is_file(path) for path in paths) else None


def _draw(
    targets: list[Target],
    recipe: Recipe,
    source: Source,
    count: int,
    place: Path,
    device: torch.device,
    sampling: Mapping[str, Any],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Draw the images. Return their rows of comparison.json, and the fingerprint of each loaded model."""
    columns: dict[str, list[Tensor]] = {}
    models = []
    for name, target in zip(("before", "after"), targets, strict=True):
        model = target.load(device)
        models.append(target.fingerprint(model))
        names, batch = named_images(recipe, model, count, source)
        columns.setdefault("input", batch.gen or [])
        columns[name] = reconstruct(model, batch, **sampling)
        del model  # keep one model in memory at a time
    rows = []
    for number, key in enumerate(names):
        row = {name: f"{FOLDER}/{number:03d}_{name}.png" for name in columns}
        for name, column in columns.items():
            write(place.parent / row[name], encode_png(column[number]))
        rows.append({"name": "/".join(key.split("/")[-2:]), **row})
    return rows, models


def _open(run: Side, images: str | None) -> Source:
    recipe = run.recipe
    assert recipe is not None
    if images is not None:
        return open_source(images, "reca", recipe.data.image_root, recipe.data.columns)
    try:
        return images_to_show(recipe)
    except (DataError, ValueError) as error:
        raise DataError(
            f"the images of {run.source} cannot be opened ({error}); pass others as --images, or disable "
            "reconstructions with --reconstructions 0"
        ) from error
