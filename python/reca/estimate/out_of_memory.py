"""Out-of-memory errors of a run: advice with predicted peaks, and a memory snapshot."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from reca import distributed, units
from reca.config.recipe import Recipe
from reca.errors import first_line
from reca.estimate import fit, memory
from reca.hardware import full_memory
from reca.options.fields import RecipeError
from reca.processes import own_process

log = logging.getLogger("reca")

USUAL = "Lower micro_batch of the objective's tasks, set train.activation_checkpointing=true, or use more GPUs"
ADVISED = 3  # number of recipe changes in the advice
EVENTS = 100_000  # allocations and releases in the history of a snapshot


class Knob(NamedTuple):
    """A change of the recipe, as overrides, and its predicted peak in bytes."""

    text: str
    bytes: int


@contextlib.contextmanager
def memory_errors(advise: Callable[[], str] = lambda: USUAL) -> Iterator[None]:
    """Convert an out-of-memory error into a RecipeError with advice."""
    try:
        yield
    except full_memory.KINDS as error:
        if not full_memory.is_memory_full(error):
            raise
        raise RecipeError(f"out of memory ({first_line(error)}). {advise()}") from error


def explained(recipe_of: Callable[[], Recipe]) -> contextlib.AbstractContextManager[None]:
    """Turn an error of a full memory into a RecipeError with advice, and leave a snapshot in the run folder.

    recipe_of: returns the recipe as it is trained, when the error comes.
    """

    def advise() -> str:
        recipe = recipe_of()
        left = snapshot(Path(recipe.run_dir))
        return f"{advice(recipe)}{left}"

    return memory_errors(advise)


def record_history(recipe: Recipe) -> None:
    """Start recording the allocation history if log.memory_snapshot is set and a GPU is available."""
    if recipe.log.memory_snapshot and torch.cuda.is_available():
        torch.cuda.memory._record_memory_history(max_entries=EVENTS, stacks="python")


def snapshot(folder: Path) -> str:
    """Write a memory snapshot for pytorch.org/memory_viz. Return a sentence that names the file; empty if none."""
    if not torch.cuda.is_available():
        return ""
    file = folder / f"out_of_memory_rank{distributed.rank()}.pickle"
    try:
        torch.cuda.memory._dump_snapshot(str(file))
    except Exception as error:  # must not hide the out-of-memory error
        log.warning("the memory snapshot could not be written: %s", error)
        return ""
    return f". {file} shows what was allocated (pytorch.org/memory_viz)"


def advice(recipe: Recipe) -> str:
    """Return the most helpful recipe changes with their predicted peaks, or general advice if prediction fails."""
    ranks, node = distributed.world_size(), distributed.local_world_size()
    log.warning("out of memory: predicting which changes would help")
    try:
        now, best = own_process.call(knobs, recipe, ranks, node, memory.own_card())
    except Exception as error:
        log.warning("the peak memory cannot be predicted: %s", error)
        return f"{USUAL}; train.fit chooses settings automatically"
    helpful = ", ".join(f"{knob.text}: {units.size(knob.bytes)}" for knob in best)
    return (
        f"The predicted peak of this recipe is {units.size(now)}. Most helpful changes: {helpful or 'more GPUs'}. "
        f"Add about {memory.FRAGMENTATION:.0%} and {units.size(memory.CONTEXT)} before comparing with a GPU's memory; "
        "train.fit chooses settings automatically"
    )


def knobs(recipe: Recipe, gpus: int, node: int, card: int) -> tuple[int, list[Knob]]:
    """Predict the recipe's peak in bytes, and return it with the ADVISED changes that lower it most, best first."""
    predict = fit.Predictions(recipe)
    now, found = predict({}, gpus, node, card).total, []
    for keys in changes(recipe, gpus, node):
        with contextlib.suppress(ValueError, NotImplementedError):
            found.append(Knob(fit.describe(keys), predict(keys, gpus, node, card).total))
    with contextlib.suppress(ValueError, NotImplementedError):
        more = predict({}, 2 * gpus, max(node, min(8, 2 * gpus)), card)
        found.append(Knob(f"{2 * gpus} GPUs", more.total))
    helpful = sorted((knob for knob in found if knob.bytes < now), key=lambda knob: knob.bytes)
    return now, helpful[:ADVISED]


def changes(recipe: Recipe, gpus: int, node: int) -> Iterator[dict[str, Any]]:
    """Yield changes of the recipe that may reduce memory, each as overrides."""
    if recipe.train.activation_checkpointing is not True:
        yield {fit.CHECKPOINTING: True}
    halves = {}
    for task in recipe.active_tasks():
        config = getattr(recipe.objective, task)
        size = min(config.micro_batch, -(-config.batch_size // gpus))
        if config.max_tokens is not None:
            halves[f"objective.{task}.max_tokens"] = max(config.max_tokens // 2, 1)
        elif size > 1 and not recipe.optim.fused_backward:  # which requires one pass per step
            halves[f"objective.{task}.micro_batch"] = size // 2
    if halves:
        yield halves
    if not recipe.optim.offload and recipe.optim.name != "apex":
        yield {"optim.offload": True}
    if fit.has_fp32_moments(recipe):
        yield {"optim.moments": "bf16"}
        yield {"optim.name": "adamw_8bit"}
    if gpus == 1 and recipe.train.cast_once and recipe.train.precision == "bf16":
        yield {fit.CAST_ONCE: False}
    if gpus > 1 and recipe.parallel.shard is None and recipe.parallel.strategy != "fsdp":
        yield {"parallel.strategy": "fsdp"}
    if gpus > 1 and not recipe.parallel.reduce_every_micro_batch:
        yield {"parallel.reduce_every_micro_batch": True}
