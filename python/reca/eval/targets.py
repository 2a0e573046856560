"""The model that is evaluated: a run, its base model, a recipe's published model, or an existing evaluation."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reca import checkpoint
from reca.config.recipe import Recipe
from reca.eval import report, shape
from reca.eval.errors import EvaluationError, OptionError
from reca.eval.files import DURING_TRAINING, write
from reca.eval.generate import weights_hash
from reca.eval.suites import Item, Suite
from reca.eval.suites.base import agree
from reca.io.files import parse_json
from reca.io.paths import is_file
from reca.io.shape import misfit
from reca.models.base import Adapter
from reca.models.common.inference import warn_of_random_weights
from reca.options.fields import format_value
from reca.options.names import option
from reca.runs.lineage import load_start, load_trained, parent_checkpoint, recipe_of, trained_source
from reca.runs.published import published_model

BASE = "base"
GENERATION = "generation.json"
COMPARED = ("suite", "protocol", "sampling", "seed", "fingerprint")  # keys of generation.json
SHORT = 40  # characters of a value that a message shows


@dataclass(frozen=True)
class Target:
    """One side of an evaluation.

    source      as given by the user; for the base model of a run, "base of" and the run
    recipe      recipe of the model; None for the folder of an existing evaluation
    trained     whether source is a run or one of its checkpoints
    folder      output folder of the evaluation
    ema         whether to evaluate the moving average of the weights
    run         for the base model of a run, that run
    checkpoint  of a run, the newest one when this was made: the run may go on; None if it has none
    """

    source: str
    recipe: Recipe | None
    trained: bool
    folder: Path
    ema: bool = False
    run: Path | None = None
    checkpoint: Path | None = None

    def load(self, device: torch.device | str) -> Adapter:
        assert self.recipe is not None
        if self.trained:
            return load_trained(self.checkpoint or Path(self.source), self.recipe, device, self.ema)
        if self.recipe.train.init_from is None:
            warn_of_random_weights(self.source, self.recipe.model)
        return load_start(self.recipe, device, self.run)

    def fingerprint(self, model: Adapter | None = None) -> dict[str, Any]:
        """Return values that identify the state of the model, wherever its files are, without reading its weights.

        model: result of `load`, if it is loaded. The run of train.init_from may have saved a newer checkpoint since.
        """
        assert self.recipe is not None
        found: dict[str, Any] = {"model": published_model(self.recipe), "ema": self.ema}
        if model is not None:
            digest = model.state and model.state.get("digest")
        else:
            folder = self.checkpoint if self.trained else parent_checkpoint(self.recipe, self.run)
            digest = folder and checkpoint.digest(folder)
        found |= {"init_from": None if self.trained else digest, "checkpoint": digest if self.trained else None}
        return json.loads(json.dumps(found, default=str))


def target(
    source: str | Path, overrides: Sequence[str] | Mapping[str, Any], suite: str, out: Path | None, ema: bool = False
) -> Target:
    """Return the Target of a run, one of its checkpoints or a recipe.

    suite: Suite.folder. out: output folder; None: the default.

    Raises CheckpointError for a run without checkpoints and evaluations, unless `out` is set.
    """
    recipe = recipe_of(source, overrides)
    if trained := trained_source(source):
        run, newest = trained
        if out is None:
            if (place := evaluations_of(run, newest)) is None:
                raise checkpoint.CheckpointError(f"{run} has no complete checkpoint; did the run save one?")
            out = place / (f"{suite}_ema" if ema else suite)
        return Target(str(source), recipe, True, out, ema, checkpoint=newest)
    return Target(str(source), recipe, False, out or Path(recipe.run_dir) / "eval" / BASE / suite)


def evaluations_of(run: Path, folder: Path | None) -> Path | None:
    """Return RUN/eval/STEP, which has the evaluations of a checkpoint. run, folder: result of `trained_source`.

    If the run has no checkpoint (left), its last step with evaluations is returned; None if there is none.
    """
    steps = evaluated_steps(run) if folder is None else [folder.name]
    return run / "eval" / steps[-1] if steps else None


def evaluated_steps(run: Path) -> list[str]:
    """List the steps of a run that have evaluations, as the names of their folders in RUN/eval.

    An evaluation that failed at its start may leave an empty folder.
    """
    steps = {path.parents[1].name for path in (run / "eval").glob("*/*/*")}
    return sorted(filter(str.isdecimal, steps), key=int)


def made_during_training(run: Path, step: int | None) -> tuple[Path, ...]:
    """List the folders with results of the evaluations during training after `step`, one per suite.

    step: None: the last step of each suite.
    """
    folders = [results.parent for results in (run / DURING_TRAINING).glob(f"*/*/{report.RESULTS}")]
    steps = [folder for folder in folders if folder.name.isdecimal() and step in (None, int(folder.name))]
    last = {folder.parent.name: folder for folder in sorted(steps, key=lambda folder: int(folder.name))}
    return tuple(last[suite] for suite in sorted(last))


def opponent(name: str | Path, mine: Target, overrides: Sequence[str] | Mapping[str, Any], suite: str) -> Target:
    """Return the Target to compare with: "base", the folder of an evaluation, a run or a recipe."""
    if str(name) == BASE:
        if not mine.trained:
            raise OptionError(f"{option('against', BASE)} needs a run; {mine.source} is a base model itself")
        trained = trained_source(mine.source)
        assert trained is not None
        run = trained[0]
        return Target(f"base of {mine.source}", mine.recipe, False, run / "eval" / BASE / suite, run=run)
    folder = Path(name)
    if any(is_file(folder / file) for file in (GENERATION, "records.jsonl", report.RESULTS)):
        return Target(str(name), None, False, folder)
    return target(name, overrides, suite, None)


def describe(model: Adapter, side: Target) -> dict[str, Any]:
    """Describe a loaded model for the results."""
    assert side.recipe is not None
    step = model.state["step"] if side.trained else None
    return {"source": side.source, "umm": side.recipe.umm, "trained": side.trained, "step": step, "ema": side.ema,
            "dtype": _dtype(model), "weights_sha256": weights_hash(model)}  # fmt: skip


def _dtype(model: Adapter) -> str:
    """Return the name of the dtype of most parameters."""
    counts: dict[str, int] = {}
    for parameter in model.parameters():
        name = str(parameter.dtype).removeprefix("torch.")
        counts[name] = counts.get(name, 0) + parameter.numel()
    return max(counts, key=lambda name: counts[name])


def read_generation(folder: Path) -> dict[str, Any]:
    """Read generation.json; {} if it does not exist."""
    path = folder / GENERATION
    if not is_file(path):
        return {}
    try:
        found = parse_json(path.read_bytes())
    except ValueError:
        found = None
    if misfit(found, shape.GENERATION) is not None:
        raise EvaluationError(
            f"{path} is damaged: expected a JSON object with the key model, as the step generate writes it; delete "
            f"{folder} or set another {option('out')}"
        )
    return found


def check_suite(folder: Path, suite: Suite) -> None:
    """Raise EvaluationError if a folder has an evaluation of another suite, which results of this one would replace."""
    for path in (folder / GENERATION, folder / report.RESULTS):
        try:
            found = parse_json(path.read_text(encoding="utf-8"))
            there = {"suite": found["suite"], "protocol": found["protocol"]}
        except (OSError, ValueError, TypeError, KeyError):
            continue  # a damaged file is reported by the step that needs it
        if changed := _differing(there, {"suite": suite.name, "protocol": suite.protocol}):
            raise _other_settings(folder, ", ".join(changed))


def check_prompts(folder: Path, items: Sequence[Item]) -> None:
    """Raise EvaluationError if a folder contains images, or answers, of other prompts or sources under these ids.

    Folders of earlier releases, without digests, are compared by the prompts in their results.
    """
    before, results = read_generation(folder), folder / report.RESULTS
    if "items" in before:
        others = [item.id for item in items if not agree(before["items"].get(item.id), item.input_digest)]
    elif before and is_file(results):
        prompts = {row["item"]: row["prompt"] for row in report.read(results)["items"]}
        others = [item.id for item in items if prompts.get(item.id, item.prompt) != item.prompt]
    else:
        others = []
    if others:
        raise _other_settings(folder, f"the prompts or sources of {len(others)} items, such as {others[0]}, differ")


def write_generation(folder: Path, made: Mapping[str, Any], items: Sequence[Item]) -> None:
    """Write generation.json: the settings in `made`, and digests of these and all earlier items.

    Raises EvaluationError if the folder contains images of other weights or settings.
    """
    before = read_generation(folder)
    changed = [] if not before else _differing(_compared(before), _compared(made))
    if before and not changed and before["model"].get("weights_sha256") != made["model"]["weights_sha256"]:
        changed = ["other weights"]
    if changed:
        raise _other_settings(folder, ", ".join(changed))
    digests = before.get("items", {}) | {item.id: item.input_digest for item in items}
    write(folder / GENERATION, json.dumps({**made, "items": digests}, indent=1))


def _compared(made: Mapping[str, Any]) -> dict[str, Any]:
    return {key: made.get(key) for key in COMPARED} | {"step": made["model"].get("step")}


def _differing(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Name the settings that differ, those of nested mappings too, with both values where these are short."""
    found = []
    for key in [k for k in {**before, **now} if before.get(k) != now.get(k)]:
        name, old, new = f"{prefix}{key}", before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += _differing(old, new, f"{name}.")
        elif max(len(format_value(value)) for value in (old, new)) <= SHORT:
            found.append(f"{name} {format_value(old)} -> {format_value(new)}")
        else:
            found.append(name)
    return found


def _other_settings(folder: Path, reason: str) -> EvaluationError:
    return EvaluationError(
        f"{folder} contains an evaluation with other settings ({reason}); set another "
        f"{option('out')}, or delete that folder"
    )
