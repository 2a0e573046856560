"""What is evaluated: a run, the model it started from, a recipe's published model, or a folder made before."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reca import checkpoint
from reca.config import Recipe
from reca.eval import report
from reca.eval.errors import EvaluationError
from reca.eval.files import write
from reca.eval.generate import weights_hash
from reca.eval.suites import Item
from reca.eval.suites.base import agree
from reca.models.base import Adapter
from reca.models.common.inference import warn_of_random_weights
from reca.recipe_files import as_dict
from reca.runs import is_run, load_start, load_trained, published_fingerprints, recipe_of

BASE = "base"
GENERATION = "generation.json"


@dataclass(frozen=True)
class Target:
    """One side of an evaluation.

    source   as the user named it; of what a run was trained from, "base of" the run
    recipe   of the model; None for a folder of an evaluation that was made before
    trained  whether a run's checkpoint is laid over the published weights
    folder   of the evaluation
    """

    source: str
    recipe: Recipe | None
    trained: bool
    folder: Path
    ema: bool = False

    def load(self, device: torch.device | str) -> Adapter:
        assert self.recipe is not None
        if self.trained:
            return load_trained(Path(self.source), self.recipe, device, self.ema)
        warn_of_random_weights(self.source, self.recipe.model)
        return load_start(self.recipe, device)

    def step(self) -> int | None:
        newest = checkpoint.latest(Path(self.source)) if self.trained else None
        return None if newest is None else int(newest.name)

    def fingerprint(self) -> dict[str, Any]:
        """Tell two states of a model apart without reading its weights."""
        assert self.recipe is not None
        newest = checkpoint.latest(Path(self.source)) if self.trained else None
        found: dict[str, Any] = {"model": as_dict(self.recipe)["model"], "files": published_fingerprints(self.recipe)}
        found |= {"ema": self.ema, "init_from": self.recipe.train.init_from}
        found["checkpoint"] = newest and (newest / checkpoint.MARKER).read_text()
        return json.loads(json.dumps(found, default=str))


def target(
    source: str | Path, overrides: Sequence[str] | Mapping[str, Any], suite: str, out: Path | None, ema: bool = False
) -> Target:
    """Find what a name stands for: the folder of a run, or a recipe."""
    recipe = recipe_of(source, overrides)
    if is_run(source):
        return Target(str(source), recipe, True, out or Path(source) / "eval" / suite, ema)
    return Target(str(source), recipe, False, out or Path(recipe.run_dir) / "eval" / BASE / suite)


def opponent(name: str | Path, mine: Target, overrides: Sequence[str] | Mapping[str, Any], suite: str) -> Target:
    """Find what to compare with: "base", the folder of an evaluation, a run or a recipe."""
    if str(name) == BASE:
        if not mine.trained:
            raise EvaluationError(f"--against base needs a run; {mine.source} is the base model itself")
        return Target(f"base of {mine.source}", mine.recipe, False, Path(mine.source) / "eval" / BASE / suite)
    folder = Path(name)
    if any((folder / file).is_file() for file in (GENERATION, "records.jsonl", "results.json")):
        return Target(str(name), None, False, folder)
    return target(name, overrides, suite, None)


def describe(model: Adapter, side: Target) -> dict[str, Any]:
    """Describe a loaded model for the results."""
    assert side.recipe is not None
    step = model.state["step"] if side.trained else None  # and not side.step(): the run may go on
    return {"source": side.source, "umm": side.recipe.umm, "trained": side.trained, "step": step,
            "dtype": _dtype(model), "weights_sha256": weights_hash(model)}  # fmt: skip


def _dtype(model: Adapter) -> str:
    """Name the type that most of the weights have."""
    counts: dict[str, int] = {}
    for parameter in model.parameters():
        name = str(parameter.dtype).removeprefix("torch.")
        counts[name] = counts.get(name, 0) + parameter.numel()
    return max(counts, key=lambda name: counts[name])


def read_generation(folder: Path) -> dict[str, Any]:
    """Read what made the images of an evaluation; {} if nothing is known."""
    path = folder / GENERATION
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise EvaluationError(f"{path} is damaged: it holds no JSON object; delete {folder} or give another --out")
    return found


def check_prompts(folder: Path, items: Sequence[Item]) -> None:
    """Raise EvaluationError where a folder holds images, or answers, of other prompts or sources under these ids.

    Folders that name no digests, of earlier releases, are held against the prompts in their results.
    """
    before, results = read_generation(folder), folder / "results.json"
    if "items" in before:
        others = [item.id for item in items if not agree(before["items"].get(item.id), item.given)]
    elif before and results.is_file():
        prompts = {row["item"]: row["prompt"] for row in report.read(results)["items"]}
        others = [item.id for item in items if prompts.get(item.id, item.prompt) != item.prompt]
    else:
        others = []
    if others:
        raise _made_otherwise(folder, f"the prompts or sources of {len(others)} items, such as {others[0]}, differ")


def write_generation(folder: Path, made: Mapping[str, Any], items: Sequence[Item]) -> None:
    """Write what makes the images of an evaluation, with digests of all items so far.

    Raises EvaluationError where the folder holds images of other weights or other settings.
    """
    before = read_generation(folder)
    compared = ("suite", "protocol", "sampling", "seed", "fingerprint")
    changed = [key for key in compared if before and before.get(key) != made[key]]
    if before and not changed and before["model"]["weights_sha256"] != made["model"]["weights_sha256"]:
        changed = ["weights"]
    if changed:
        raise _made_otherwise(folder, f"{', '.join(changed)} differ")
    digests = before.get("items", {}) | {item.id: item.given for item in items}
    write(folder / GENERATION, json.dumps({**made, "items": digests}, indent=1))


def _made_otherwise(folder: Path, reason: str) -> EvaluationError:
    return EvaluationError(
        f"{folder} holds images that were made otherwise ({reason}); give another --out, or delete that folder"
    )
