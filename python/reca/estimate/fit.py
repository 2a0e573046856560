"""Settings that make a recipe fit a GPU (train.fit): micro-batch, recomputation, sharding and optimizer moments.

train.micro_batch=auto chooses only the micro-batch, by the same predictions.

Among the settings whose predicted peak fits, those with the shortest estimated step are chosen. batch_size and all
results stay the same, unless train.fit_allow lists what may change.
"""

import bisect
import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

from reca import units
from reca.config.recipe import Recipe
from reca.config.recipe_files import by_key
from reca.estimate import memory
from reca.estimate.held import held
from reca.estimate.memory import Memory
from reca.estimate.meta_model import build_meta
from reca.models.base import Adapter
from reca.options.fields import RecipeError
from reca.options.values import override_text

CHECKPOINTING, CAST_ONCE = "train.activation_checkpointing", "train.cast_once"
# Overheads in rows (tokens): a pass of PASS rows runs at half of a GPU's throughput. Heuristics to rank settings.
PASS, GATHER, CAST = 1024, 1024, 512
# With fp32 moments of all weights on the host, 16 bytes per parameter cross PCIe in a step, to the GPU and back in one
# stream; a row costs 6 FLOPs per parameter. By data sheets that is 26,400 rows on an A100 (312 TFLOP/s, 31.5 GB/s each
# way) and 41,900 on an H100 (989, 63). It is divided by the number of shards.
OFFLOAD = 32768
RECOMPUTED = (False, "selective", True)  # candidates for train.activation_checkpointing, besides the recipe's value
SELECTIVE = 1.05  # relative work of a step with selective recomputation


class Choice(NamedTuple):
    """Settings of a recipe by key, with the peak memory predicted for them and the estimated time of a step."""

    keys: dict[str, Any]
    memory: Memory
    time: float  # in rows (tokens) that run forward and backward through the model


class DoesNotFit(RecipeError):
    """No allowed settings make the recipe fit."""


def asked_by(recipe: Recipe) -> str:
    """Return the key by which a recipe asks for a choice; empty if it asks for none."""
    if recipe.train.fit is not None:
        return "train.fit"
    return "train.micro_batch" if recipe.train.micro_batch == "auto" else ""


def with_keys(recipe: Recipe, keys: dict[str, Any]) -> Recipe:
    """Return a copy of the recipe with other values of some keys."""
    recipe = copy.deepcopy(recipe)
    for key, value in keys.items():
        group, _, name = key.rpartition(".")
        setattr(attrgetter(group)(recipe), name, value)
    return recipe


def value_of(recipe: Recipe, key: str) -> Any:
    return attrgetter(key)(recipe)


class Predictions:
    """Predicted peak memory of a recipe with other settings, numbers and sizes of GPUs. Predictions are cached."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._found: dict[tuple, Memory] = {}

    @functools.cached_property
    def adapter(self) -> Adapter:
        return build_meta(self.recipe)[0]

    def __call__(
        self, keys: dict[str, Any], gpus: int, node: int, card: int, tasks: Sequence[str] | None = None
    ) -> Memory:
        recipe, tasks = with_keys(self.recipe, keys), tuple(tasks or self.recipe.active_tasks())
        key = tasks, gpus, node, card, str(by_key(recipe))
        if key not in self._found:
            self._found[key] = memory.peak_of(recipe, list(tasks), gpus, node, card)
        return self._found[key]

    def at_least(self, keys: dict[str, Any], gpus: int, node: int, card: int) -> int:
        """Return a lower bound in bytes of the peak with these settings, without running a step."""
        recipe = with_keys(self.recipe, keys)
        parts = held(self.adapter, recipe, gpus, node, card)
        uncertain = gpus > 1 or recipe.optim.fused_backward  # gradients are sharded, or freed in the backward pass
        return parts.weights + parts.moments + parts.ema + (0 if uncertain else parts.gradients)


def choose(
    recipe: Recipe, gpus: int, node: int, card: int, predict: Predictions | None = None, resumes: bool = False
) -> Choice:
    """Choose the settings with which a recipe fits `gpus` GPUs of `card` bytes.

    predict: predictions for this recipe, to reuse its cache. resumes: choose for a run that has begun, in which nothing
    may change that alters the result, whatever train.fit_allow lists.

    Raises:
        DoesNotFit: With the smallest need that was found, and what would help.
        RecipeError, ValueError: For a recipe that `reca train` would reject.
    """
    recipe = with_keys(recipe, {"train.fit_allow": []}) if resumes else recipe
    predict = predict or Predictions(recipe)
    rows, cards = sum(predict.adapter.sequence().values()), (gpus, node, card)
    sizes = {task: _sizes(recipe, task, gpus) for task in recipe.active_tasks()}
    largest = {_size_key(task): own[-1] for task, own in sizes.items()}
    smallest = {
        _size_key(task): own[0] for task, own in sizes.items() if getattr(recipe.objective, task).max_tokens is None
    }
    best: Choice | None = None
    refused: list[tuple[int, dict[str, Any]]] = []  # needed memory and settings

    def time(keys: dict[str, Any]) -> float:
        return _time(recipe, largest | keys, gpus, rows)

    def peak(setting: dict[str, Any], task: str, size: int) -> Memory:
        return predict(setting | {_size_key(task): size}, *cards, [task])

    def need(setting: dict[str, Any], task: str, size: int) -> int:
        return memory.needed(peak(setting, task, size).total)

    def sized(setting: dict[str, Any]) -> dict[str, Any] | None:
        """Add the largest micro-batches that fit; None if some do not, or if the step is not faster than the best."""
        keys = dict(setting)
        for task, own in sizes.items():
            faster = [size for size in own if best is None or time(keys | {_size_key(task): size}) < best.time]
            found = largest_fitting(faster, functools.partial(need, setting, task), card) if faster else None
            if found is None:
                if best is None:
                    refused.append((need(setting, task, own[0]), setting | smallest))
                return None
            keys[_size_key(task)] = found
        return keys

    settings = _settings(recipe, gpus, node, copies=not predict.adapter.repeats_blocks())
    for setting in sorted(settings, key=lambda one: (time(one), _changes(recipe, one))):
        if best is not None and time(setting) >= best.time:
            break
        if (least := memory.needed(predict.at_least(setting, *cards))) > card:
            refused.append((least, setting | smallest))
        elif (keys := sized(setting)) is not None and (best is None or time(keys) < best.time):
            peaks = (peak(setting, task, keys[_size_key(task)]) for task in sizes)
            used = {key: value for key, value in keys.items() if key in setting or key in smallest}
            best = Choice(used, max(peaks, key=lambda found: found.total), time(keys))
    if best is None:
        raise DoesNotFit(_refusal(recipe, gpus, card, *min(refused, key=lambda found: found[0]), resumes))
    return best


def _size_key(task: str) -> str:
    return f"objective.{task}.micro_batch"


def largest_fitting(sizes: Sequence[int], peak: Callable[[int], int], room: int) -> int | None:
    """Return the largest of `sizes`, which ascend, whose peak is at most `room`; None if none is.

    Few peaks are computed, and none far beyond what fits. The peak is a maximum of a few linear functions of the size,
    hence convex: above the line through two smaller sizes, and below that between a size that fits and one that does
    not.
    """
    if peak(sizes[0]) > room:
        return None
    if len(sizes) == 1 or peak(sizes[1]) > room:
        return sizes[0]
    low, high = 1, _below(sizes, room, 0, 1, peak)
    if high <= low or peak(sizes[high]) <= room:
        return sizes[max(low, high)]
    while high - low > 1:
        middle = min(max(_below(sizes, room, low, high, peak), low + 1), high - 1)
        if peak(sizes[middle]) <= room:
            low = middle
        else:
            high = middle
    return sizes[low]


def _below(sizes: Sequence[int], room: int, a: int, b: int, peak: Callable[[int], int]) -> int:
    """Return the index of the last size at which the line through the peaks of sizes a and b is at most `room`."""
    rise = max(peak(sizes[b]) - peak(sizes[a]), 1) / (sizes[b] - sizes[a])
    return bisect.bisect_right(sizes, sizes[a] + (room - peak(sizes[a])) / rise) - 1


def _settings(recipe: Recipe, gpus: int, node: int, copies: bool) -> Iterator[dict[str, Any]]:
    """Yield candidates for all settings but micro-batches. copies: try cast_once=false with recomputed blocks."""
    if asked_by(recipe) == "train.micro_batch":
        yield {key: value_of(recipe, key) for key in (CHECKPOINTING, "optim.offload")}
        return
    optimizer: list[dict[str, Any]] = [{"optim.offload": recipe.optim.offload}]
    if not recipe.optim.offload and recipe.optim.name != "apex":
        optimizer.append({"optim.offload": True})
    if "moments" in recipe.train.fit_allow and has_fp32_moments(recipe):
        optimizer += [one | {"optim.moments": "bf16"} for one in optimizer] + [{"optim.name": "adamw_8bit"}]
    recomputing = dict.fromkeys((*RECOMPUTED, recipe.train.activation_checkpointing))
    for shards, recomputed, moments in itertools.product(_shards(recipe, gpus, node), recomputing, optimizer):
        setting = ({"parallel.shard": shards} if gpus > 1 else {}) | {CHECKPOINTING: recomputed} | moments
        yield setting
        if copies and recomputed and shards == 1 and recipe.train.cast_once and recipe.train.precision == "bf16":
            yield setting | {CAST_ONCE: False}


def _shards(recipe: Recipe, gpus: int, node: int) -> list[int]:
    """List the candidate numbers of ranks that share one copy of the weights. A value in the recipe is kept."""
    if recipe.parallel.shard is not None:
        return [recipe.parallel.shard]
    shared = sorted({size for size in (min(node, gpus), gpus) if gpus % size == 0})
    return {"ddp": [1], "fsdp": shared}.get(recipe.parallel.strategy, sorted({1, *shared}))


def _sizes(recipe: Recipe, task: str, gpus: int) -> list[int]:
    """List a task's candidate micro-batches, in ascending order: one for each number of passes.

    With objective.mean=micro_batch another size changes the loss, which must be allowed. max_tokens is kept.
    optim.fused_backward needs one pass per step.
    """
    config = getattr(recipe.objective, task)
    if config.max_tokens is not None or (
        recipe.objective.mean == "micro_batch" and not _may_change_micro_batch(recipe)
    ):
        return [config.micro_batch]
    most = -(-config.batch_size // gpus)
    most_passes = 1 if recipe.optim.fused_backward else most
    return sorted({-(-most // passes) for passes in range(1, most_passes + 1)})


def _may_change_micro_batch(recipe: Recipe) -> bool:
    return "micro_batch" in recipe.train.fit_allow or recipe.train.micro_batch == "auto"


def has_fp32_moments(recipe: Recipe) -> bool:
    return (recipe.optim.name, recipe.optim.moments) == ("adamw", "fp32")


def _time(recipe: Recipe, keys: dict[str, Any], gpus: int, rows: int) -> float:
    """Estimate a step's time in rows (tokens): its rows, times the work of recomputation, and the passes' overhead."""
    recomputed = keys[CHECKPOINTING]
    work = SELECTIVE if recomputed == "selective" else 1 + (1 / (3 * recomputed) if recomputed else 0)
    time = OFFLOAD / keys.get("parallel.shard", 1) if keys.get("optim.offload") else 0.0
    overhead = PASS + (GATHER if keys.get("parallel.shard", 1) > 1 else 0) + (0 if keys.get(CAST_ONCE, True) else CAST)
    for task in recipe.active_tasks():
        most = -(-getattr(recipe.objective, task).batch_size // gpus)
        passes = -(-most // keys[_size_key(task)])
        time += most * rows * work + passes * overhead
    return time


def _changes(recipe: Recipe, keys: dict[str, Any]) -> int:
    return sum(value_of(recipe, key) != value for key, value in keys.items())


def _refusal(recipe: Recipe, gpus: int, card: int, need: int, keys: dict[str, Any], resumes: bool) -> str:
    helps = [f"more GPUs (there are {gpus})"]
    if asked_by(recipe) == "train.micro_batch":
        helps.append("train.fit=auto, which may also choose recomputation, sharding and optim.offload")
    if recipe.optim.fused_backward:
        helps.append("optim.fused_backward=false, which allows several smaller passes per step")
    for task in recipe.active_tasks():
        if (most := getattr(recipe.objective, task).max_tokens) is not None:
            helps.append(f"a smaller objective.{task}.max_tokens than {most}")
    other = _help_that_alters_the_result(recipe)
    helps += [f"in a new run, with another run_dir: {', or '.join(other)}"] if resumes else other
    return (
        f"{asked_by(recipe) or 'train.fit'}: this recipe does not fit {units.counted(gpus, 'GPU')} of "
        f"{units.size(card)}. The smallest need found is at least {units.size(need)} with its reserve, with "
        f"{describe(keys)}. What would help: {'; '.join(helps)}"
    )


def _help_that_alters_the_result(recipe: Recipe) -> list[str]:
    helps = ["a smaller part of the model (train.roles, train.frozen) or LoRA"]
    if "moments" not in recipe.train.fit_allow and has_fp32_moments(recipe):
        helps.append("train.fit_allow=[moments]: AdamW's moments in bf16 or 8 bits, which changes how they are rounded")
    if recipe.objective.mean == "micro_batch" and not _may_change_micro_batch(recipe):
        helps.append(
            "train.fit_allow=[micro_batch]: smaller micro-batches, which change the average of "
            "objective.mean=micro_batch"
        )
    return helps


def describe(keys: dict[str, Any]) -> str:
    """Format settings as overrides."""
    return " ".join(f"{key}={override_text(value)}" for key, value in keys.items())
