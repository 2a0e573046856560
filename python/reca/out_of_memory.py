"""What a run says when memory is full: what would help, with predicted numbers, and a snapshot."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from reca import distributed, fit, full_memory, memory, units
from reca.config import Recipe
from reca.errors import first_line
from reca.options import RecipeError

log = logging.getLogger("reca")

USUAL = "Lower micro_batch of the objective's tasks, set train.activation_checkpointing=true, or use more GPUs"
ADVISED = 3
EVENTS = 100_000  # allocations and releases that a snapshot remembers


class Knob(NamedTuple):
    """A change of the recipe, as overrides, and the peak that is predicted with it."""

    text: str
    bytes: int


@contextlib.contextmanager
def memory_errors(advise: Callable[[], str] = lambda: USUAL) -> Iterator[None]:
    """Turn an error of a full memory into a RecipeError with advice."""
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
    """Begin to remember who allocates what, if the recipe asks for it and there is a GPU."""
    if recipe.log.memory_snapshot and torch.cuda.is_available():
        torch.cuda.memory._record_memory_history(max_entries=EVENTS, stacks="python")


def snapshot(folder: Path) -> str:
    """Write what is allocated, for docs.pytorch.org/memory_viz, and say where; with a history if there is one."""
    if not torch.cuda.is_available():
        return ""
    file = folder / f"out_of_memory_rank{distributed.rank()}.pickle"
    try:
        torch.cuda.memory._dump_snapshot(str(file))
    except Exception as error:  # the error that is being explained matters more
        log.warning("no snapshot of the memory: %s", error)
        return ""
    return f". {file} shows what was allocated (pytorch.org/memory_viz)"


def advice(recipe: Recipe) -> str:
    """Name what would help most, with predicted peaks; without them where no prediction can be made."""
    ranks, node = distributed.world_size(), distributed.local_world_size()
    log.warning("out of memory: predicting what would help")
    try:
        now, best = memory.in_own_process(knobs, recipe, ranks, node, memory.own_card())
    except Exception as error:
        log.warning("no prediction: %s", error)
        return f"{USUAL}; train.fit chooses for you"
    helpful = ", ".join(f"{knob.text}: {units.size(knob.bytes)}" for knob in best)
    return (
        f"{units.size(now)} are predicted for this recipe. What would help most: {helpful or 'more GPUs'}. "
        f"Add about {memory.FRAGMENTATION:.0%} and {units.size(memory.CONTEXT)} to compare with a card; train.fit "
        "chooses for you"
    )


def knobs(recipe: Recipe, gpus: int, node: int, card: int) -> tuple[int, list[Knob]]:
    """Predict the recipe's peak, and return the changes that lower it most, the most helpful first."""
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
    """Yield changes of the recipe that take less memory."""
    if recipe.train.activation_checkpointing is not True:
        yield {fit.CHECKPOINTING: True}
    halves = {}
    for task in recipe.active_tasks():
        config = getattr(recipe.objective, task)
        size = min(config.micro_batch, -(-config.batch_size // gpus))
        if config.max_tokens is not None:
            halves[f"objective.{task}.max_tokens"] = max(config.max_tokens // 2, 1)
        elif size > 1 and not recipe.optim.fused_backward:  # which takes one pass a step
            halves[f"objective.{task}.micro_batch"] = size // 2
    if halves:
        yield halves
    if not recipe.optim.offload and recipe.optim.name != "apex":
        yield {"optim.offload": True}
    if (recipe.optim.name, recipe.optim.moments) == ("adamw", "fp32"):
        yield {"optim.moments": "bf16"}
        yield {"optim.name": "adamw_8bit"}
    if gpus == 1 and recipe.train.cast_once and recipe.train.precision == "bf16":
        yield {fit.CAST_ONCE: False}
    if gpus > 1 and recipe.parallel.shard is None and recipe.parallel.strategy != "fsdp":
        yield {"parallel.strategy": "fsdp"}
    if gpus > 1 and not recipe.parallel.reduce_every_micro_batch:
        yield {"parallel.reduce_every_micro_batch": True}
