"""Optional experiment trackers that receive a run's log: TensorBoard and Weights & Biases."""

import logging
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from reca.errors import first_line
from reca.io.folders import write_atomically
from reca.io.paths import exists

log = logging.getLogger("reca")

WANDB_ID = "wandb_id.txt"  # in the run folder: a resumed run continues the same W&B run
FINISH = 120  # seconds for the upload at the end of a run, for which the other ranks wait, too
LONGEST_TAG = 80  # characters of a prompt


class Tracker(Protocol):
    """Interface of a tracker. Its errors never reach the run."""

    name: str

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def images(self, step: int, group: str, images: Sequence[Image.Image], captions: Sequence[str]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in run_dir/tensorboard. Images are tagged with their prompts, which TensorBoard shows above them."""

    name = "TensorBoard"

    def __init__(self, run_dir: Path, done: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=done + 1 if done else 0)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def images(self, step: int, group: str, images: Sequence[Image.Image], captions: Sequence[str]) -> None:
        for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
            self.writer.add_image(f"{group}/{i} {caption[:LONGEST_TAG]}", np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A run of Weights & Biases, whose id is stored in the run folder. WANDB_MODE=offline writes files only.

    What cannot be uploaded within FINISH seconds at the end stays in run_dir/wandb, for `wandb sync`.

    A run that the caller has begun, such as one of a sweep, is used instead and left open: W&B has one at a time.
    """

    name = "Weights & Biases"

    def __init__(self, run_dir: Path, project: str, recipe: Mapping[str, Any]):
        import wandb

        self.wandb, self.own = wandb, wandb.run is None
        self.run: Any = wandb.run
        if not self.own:
            self.sent = -1
            return
        path = run_dir / WANDB_ID
        if not exists(path) or not path.read_text().strip():  # empty: the disk was full
            write_atomically(path, secrets.token_hex(4) + "\n")
        self.run = wandb.init(
            project=project,
            id=path.read_text().strip(),
            resume="allow",
            name=run_dir.name,
            dir=str(run_dir),
            config=dict(recipe),
            settings=wandb.Settings(console="off", **_bounded(wandb.Settings)),
        )
        # A resumed run repeats the steps since its checkpoint, and W&B's history cannot be truncated: steps that were
        # sent before are not sent again. Offline, the summary of the previous run is not available.
        self.sent = self.run.summary.get("step", -1)
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._log(step, values)

    def images(self, step: int, group: str, images: Sequence[Image.Image], captions: Sequence[str]) -> None:
        pairs = zip(images, captions, strict=True)
        self._log(step, {group: [self.wandb.Image(image, caption=caption) for image, caption in pairs]})

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        if step > self.sent:
            self.run.log({"step": step, **values})

    def close(self) -> None:
        if self.own:
            self.run.finish()


def _bounded(settings: Any) -> dict[str, Any]:
    """Return the setting that ends W&B's upload, unless the user has set it. Versions without it wait for a network."""
    if "WANDB_FINISH_TIMEOUT" in os.environ or "finish_timeout" not in getattr(settings, "model_fields", ()):
        return {}
    return {"finish_timeout": FINISH}


class Trackers:
    """The trackers that a recipe requests. One that fails is disabled with one line in the log."""

    def __init__(self, run_dir: Path, done: int, tensorboard: bool, project: str | None, recipe: Mapping[str, Any]):
        self.open: list[Tracker] = []
        if tensorboard:
            self._add(TensorBoard, "tensorboard", run_dir, done)
        if project is not None:
            self._add(WandB, "wandb", run_dir, project, recipe)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._each("scalars", step, values)

    def images(self, step: int, group: str, images: Sequence[Image.Image], captions: Sequence[str]) -> None:
        self._each("images", step, group, images, captions)

    def close(self) -> None:
        self._each("close")
        self.open = []

    def _add(self, kind: Any, package: str, *arguments: Any) -> None:
        try:
            self.open.append(kind(*arguments))
        except ImportError as error:
            said = f"{package} is not installed (pip install 'reca[log]')"
            if error.name not in (package, None):
                said = f"{kind.name} cannot be used ({error})"
            log.info("%s: logging to log.jsonl without it", said)
        except Exception as error:  # full disk, no network, no login
            log.warning("%s cannot be used (%s): logging to log.jsonl without it", kind.name, first_line(error))

    def _each(self, method: str, *arguments: Any) -> None:
        for tracker in list(self.open):
            try:
                getattr(tracker, method)(*arguments)
            except Exception as error:
                log.warning("%s cannot be written (%s): it is disabled", tracker.name, first_line(error))
                self.open.remove(tracker)
