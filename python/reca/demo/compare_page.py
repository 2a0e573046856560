"""The demo's comparison page: the effect of RECA prompt by prompt, as shown by `reca compare`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from reca.comparison import build, triplets
from reca.data.pixels import encode_png
from reca.demo.variants import Outcome
from reca.eval.evaluation import evaluate
from reca.eval.settings import Settings
from reca.eval.suites import Suite, open_suite
from reca.eval.targets import BASE, opponent, target
from reca.models import umm_package
from reca.options.sampling import defaults
from reca.runs.lineage import recipe_of

NAME = build.PAGE
FOLDER = "demo"  # name of the evaluation folders; `reca eval toy` generates its own images in others


def write(
    suite: str,
    before: Outcome,
    after: Outcome,
    run_dir: Path,
    out: Path,
    unseen: str,
    sampling: Mapping[str, Any],
    every: int = 1,
) -> Path:
    """Write the comparison of a run with the pre-trained model, from the images that were generated to measure both.

    unseen: source of images to reconstruct, in the form of data.images. sampling: sampling options of both
    measurements. every: n if only every n-th prompt of the suite was measured. Returns the path of the page, in `out`.
    """
    opened = open_suite(suite)
    settings = Settings(opened, steps=("judge", "score"), partial=every > 1)
    trained = target(run_dir, (), FOLDER, None)
    for outcome, folder in ((before, opponent(BASE, trained, (), FOLDER).folder), (after, trained.folder)):
        _write_images([image for _, image, _ in outcome.measured.samples], opened, every, folder / "images")
        evaluate(settings, run_dir, out=folder)
    found = build.compare("base", str(run_dir))
    known = defaults(umm_package(recipe_of(run_dir).umm).Adapter.reconstruct)
    own = {name: value for name, value in sampling.items() if name in known}
    found["reconstructions"] = triplets.draw("base", str(run_dir), out, images=unseen, sampling=own)
    return build.write(found, out)


def _write_images(images: Sequence[Tensor], suite: Suite, every: int, folder: Path) -> None:
    """Write images (uint8 [3, H, W]) to the paths that the suite expects."""
    for item, image in zip(suite.items()[::every], images, strict=True):
        path = folder / suite.path(item, 0)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_png(image))
