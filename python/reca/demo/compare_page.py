"""The demo's last page: what RECA changed, prompt by prompt, as `reca compare` shows it of any run."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from reca.comparison import build
from reca.demo.arms import Outcome
from reca.eval.evaluation import Settings, evaluate
from reca.eval.suites import Suite, open_suite

FOLDER = "demo"  # of an evaluation in a run's folder; `reca eval world` draws other images, into a folder of its own


def compare_page(suite: str, before: Outcome, after: Outcome, run_dir: Path, out: Path, every: int = 1) -> Path:
    """Write the comparison of a run with what it started from, of the images that were drawn to measure both.

    every: the images are those of every n-th prompt of the suite. Returns the path of the page, in `out`.
    """
    opened = open_suite(suite)
    settings = Settings(opened, steps=("judge", "score"), partial=every > 1)
    for outcome, folder in ((before, run_dir / "eval" / "base" / FOLDER), (after, run_dir / "eval" / FOLDER)):
        _write_images([image for _, image, _ in outcome.measured.samples], opened, every, folder / "images")
        evaluate(settings, run_dir, out=folder)
    return build.write(build.compare("base", str(run_dir)), out)


def _write_images(images: Sequence[Tensor], suite: Suite, every: int, folder: Path) -> None:
    """Write images (uint8 [3, H, W]) where the suite expects those of its items."""
    for item, image in zip(suite.items()[::every], images, strict=True):
        path = folder / suite.path(item, 0)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
