"""Recipes: YAML and overrides read into typed, documented dataclasses."""

import copy
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Optional, get_type_hints

from reca.data.batch import TASKS
from reca.data.config import DataConfig
from reca.folders import write_atomically
from reca.models import UMMS, umm_package
from reca.options import (
    LOCAL,
    RecipeError,
    check_heads,
    check_values,
    config_field,
    format_value,
    share,
)
from reca.paths import each_path, expand_home, make_absolute
from reca.values import BLANK, convert, override_text, read_override, read_yaml, write_yaml

RECIPES = Path(__file__).parent / "recipes"
COMMAND_LINE = "the command line"
MAX_STEPS = 10**9  # the most that a run makes: samples are numbered in 56 bits


class UnknownRecipe(RecipeError):
    """No recipe has this name."""


@dataclass
class TaskConfig:
    weight: float = config_field(
        0.0, "weight (lambda) of this loss in the total; a task of weight 0 is not computed", least=0
    )
    batch_size: int = config_field(
        8, "global batch size: samples of this task in one step, over all ranks and micro-batches", least=1, most=2**24
    )
    micro_batch: int = config_field(
        8,
        "largest number of samples in one forward pass on one rank; batches are split evenly below it",
        least=1,
        most=2**24,
    )


@dataclass
class ObjectiveConfig:
    reca: TaskConfig = config_field(lambda: TaskConfig(weight=1.0), "reconstruction from h_v (the RECA loss)")
    i2t: TaskConfig = config_field(TaskConfig, "image to text; 1 where understanding and generation share weights")
    t2i: TaskConfig = config_field(TaskConfig, "caption to image: supervised fine-tuning (SFT)")
    condition: str = config_field(
        "own", "whose h_v conditions the reconstruction: own, or other (control)", ("own", "other")
    )
    mean: str = config_field(
        "batch",
        "what a loss is averaged over: the whole batch, or each micro-batch by itself (as the releases do), weighted "
        "by its fraction of the batch's samples",
        ("batch", "micro_batch"),
    )


@dataclass
class OptimConfig:
    name: str = config_field("adamw", "adamw, or apex for NVIDIA apex's FusedAdam", ("adamw", "apex"))
    lr: float = config_field(1e-5, "peak learning rate", least=0)
    betas: list[float] = config_field(lambda: [0.9, 0.95], "AdamW betas", least=0, below=1)
    eps: float = config_field(1e-8, "AdamW epsilon", above=0)
    weight_decay: float = config_field(
        0.0, "decoupled weight decay, on the parameters the adapter's decays() names", least=0
    )
    max_grad_norm: Optional[float] = config_field(1.0, "global gradient norm to clip to; null does not clip", above=0)
    schedule: str = config_field("constant", "learning rate schedule after warm-up", ("constant", "cosine", "linear"))
    warmup_steps: int = config_field(0, "steps of linear warm-up", least=0, most=MAX_STEPS)
    decay_steps: Optional[int] = config_field(
        None, "step at which the schedule ends; null = train.steps", least=1, most=MAX_STEPS
    )
    stable_fraction: float = share(
        0.0, "linear and cosine: fraction of the steps at peak learning rate before the decay"
    )
    min_lr_ratio: float = share(0.0, "final learning rate as a fraction of the peak")


@dataclass
class TrainConfig:
    steps: int = config_field(1000, "optimizer steps of the whole run", least=1, most=MAX_STEPS)
    seed: int = config_field(0, "seed of all random numbers of the run", least=0)
    init_from: Optional[str] = config_field(
        None,
        "folder of another run of the same model, whose trained weights this run starts from (SFT then RECA, for "
        "example)",
        path=LOCAL,
    )
    train: Optional[list[str]] = config_field(
        None, "parameter roles to train; null = what the paper trains for this UMM"
    )
    frozen: list[str] = config_field(
        list, "name patterns of parameters that stay frozen although their role is trained"
    )
    precision: str = config_field(
        "fp32", "compute dtype of the forward pass; weights and accumulators stay fp32", ("fp32", "bf16")
    )
    activation_checkpointing: bool = config_field(False, "recompute the transformer blocks in the backward pass")
    compile: bool = config_field(False, "torch.compile the transformer blocks")
    max_skips: int = config_field(
        3, "consecutive steps with a non-finite loss or gradient before the run stops", least=0
    )
    threads: Optional[int] = config_field(None, "CPU threads; null keeps torch's default", least=1, most=2**12)


@dataclass
class ParallelConfig:
    shard: Optional[int] = config_field(
        None,
        "ranks that share one copy of the weights (FSDP2); null = those of one node, or all where nodes differ in size",
        least=1,
        most=2**20,
    )
    timeout_minutes: int = config_field(30, "how long a collective may take", least=1, most=60 * 24 * 365)


@dataclass
class CheckpointConfig:
    every: int = config_field(500, "steps between checkpoints; 0 saves only at the end and on SIGTERM", least=0)
    keep: int = config_field(2, "number of latest checkpoints to keep; 0 keeps all", least=0)


@dataclass
class LogConfig:
    every: int = config_field(10, "steps between lines of log.jsonl", least=0)
    tensorboard: bool = config_field(True, "write TensorBoard files, if tensorboard is installed")
    prompts: list[str] = config_field(list, "prompts whose images are saved as a grid PNG during training")
    sample_every: int = config_field(0, "steps between grids of images; 0 generates none", least=0)
    gap_every: int = config_field(0, "steps between measurements of the condition gap; 0 measures none", least=0)
    drift_every: int = config_field(0, "steps between losses on a fixed captioned batch; 0 measures none", least=0)
    profile: Optional[str] = config_field(
        None, "first:last step to record with torch.profiler, numbered as in log.jsonl, e.g. 10:13"
    )


@dataclass
class Recipe:
    umm: str = config_field("show_o", f"the model: {', '.join(UMMS)}, or an importable package.module of your own")
    model: Any = config_field(None, "keys of that model, see models/<umm>/config.py")
    data: DataConfig = config_field(DataConfig, "")
    objective: ObjectiveConfig = config_field(ObjectiveConfig, "")
    optim: OptimConfig = config_field(OptimConfig, "")
    train: TrainConfig = config_field(TrainConfig, "")
    parallel: ParallelConfig = config_field(ParallelConfig, "")
    checkpoint: CheckpointConfig = config_field(CheckpointConfig, "")
    log: LogConfig = config_field(LogConfig, "")
    run_dir: str = config_field("runs/reca", "folder of checkpoints and logs; an existing one is continued", path=LOCAL)

    def active_tasks(self) -> list[str]:
        """List the tasks whose loss has a weight, in the order in which a step runs them."""
        return [task for task in TASKS if getattr(self.objective, task).weight]


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name: str | Path, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Recipe:
    """Read a recipe by name (see `recipe_names`) or path.

    Args:
        overrides: Keys to change, as ["key.sub=value", ...] or {"key.sub": value, ...}.

    Raises:
        RecipeError: An unknown recipe, key or value.
    """
    path = Path(expand_home(str(name)))
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / f"{name}.yaml"
    try:
        written = read_yaml(path.read_bytes(), format_value(str(path))[1:-1])
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError) as error:
        if isinstance(error, RecipeError):
            raise
        raise UnknownRecipe(
            f"no recipe {format_value(str(name))}: give a .yaml file, or one of {', '.join(recipe_names())}"
        ) from error
    except OSError as error:
        raise RecipeError(f"recipe {format_value(str(path))} cannot be read ({error.strerror})") from error
    source = format_value(str(path))[1:-1]
    if not isinstance(written, dict):
        raise RecipeError(f"{source} holds no keys; a recipe is a YAML file of key: value lines")

    given = _given(overrides)
    umm = convert(written["umm"], str, "umm", source) if "umm" in written else Recipe.umm
    for key, text in given:
        if key == "umm":
            umm = convert(read_override(key, text, str), str, key, COMMAND_LINE)
    recipe = Recipe(umm=umm, model=umm_package(umm).Config())
    _Layer(recipe, source).put(recipe, written)
    layer = _Layer(recipe, COMMAND_LINE)
    for key, text in given:
        layer.override(key, text)
    _check(recipe)
    return recipe


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe that `load_recipe` reads back to the same values. One that stands there stays until it is."""
    write_atomically(path, write_yaml(as_dict(recipe)))


def as_dict(recipe: Recipe) -> dict:
    return asdict(recipe)


def absolute_paths(recipe: Recipe) -> Recipe:
    """Return the recipe with paths that mean the same in every working folder: relative ones made absolute.

    Importable specs, addresses and names of the hub stay as they are.
    """
    recipe = copy.deepcopy(recipe)
    for config, f, _ in walk(recipe):
        value, kind = getattr(config, f.name), f.metadata.get("path")
        if kind and value:
            setattr(config, f.name, each_path(value, functools.partial(make_absolute, kind=kind)))
    return recipe


def walk(config: Any, prefix: str = "") -> Iterator[tuple[Any, Any, str]]:
    """Yield (group, field, full key) of every key that is not a group."""
    for f in fields(config):
        value, key = getattr(config, f.name), f"{prefix}{f.name}"
        if is_dataclass(value):
            yield from walk(value, f"{key}.")
        else:
            yield config, f, key


def explain(recipe: Recipe) -> str:
    """List every key as an override that sets its value, with its documentation, one a line."""
    lines = []
    for config, f, key in walk(recipe):
        choices = f.metadata.get("choices")
        among = f" [{', '.join(map(override_text, choices))}]" if choices else ""
        lines.append((f"{key}={override_text(getattr(config, f.name))}", f"{f.metadata.get('doc', '')}{among}"))
    width = min(48, max(len(left) for left, _ in lines))
    return "\n".join(f"{left:<{width}}  {doc}" for left, doc in lines)


def _given(overrides: Sequence[str] | Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return overrides as pairs of key and text."""
    if isinstance(overrides, str):
        raise RecipeError(f"overrides={format_value(overrides)} must be a list of key=value, or a dict")
    if not isinstance(overrides, Mapping):
        return [_split(text) for text in overrides]
    pairs: list[tuple[str, str]] = []
    for key, value in overrides.items():
        if isinstance(value, Mapping):
            pairs += [(f"{key}.{name}", text) for name, text in _given(value)]
        else:
            value = list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
            pairs.append((key, override_text(value)))
    return pairs


def _split(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise RecipeError(f"override {format_value(text)} has no {'key' if equals else repr('=')}; write key.sub=value")
    return key, value


class _Layer:
    """Values from one source, a file or the command line, to be put into a recipe."""

    def __init__(self, recipe: Recipe, source: str):
        self.recipe, self.source = recipe, source

    def put(self, group: Any, raw: dict, prefix: str = "") -> None:
        for name, value in raw.items():
            self.put_key(group, name, value, f"{prefix}{name}")

    def put_key(self, group: Any, name: str, raw: Any, key: str) -> None:
        wanted, f = self._declared(group, name, key)
        if is_dataclass(wanted):
            if not isinstance(raw, dict):
                raise RecipeError(
                    f"{format_value(key)[1:-1]} in {self.source} is a group of keys, not a value; write {key}.sub=value"
                )
            self.put(getattr(group, name), raw, f"{key}.")
            return
        value = convert(raw, wanted, key, self.source)
        if f.metadata.get("path") and value is not None:
            value = each_path(value, functools.partial(self._path, key=key))
        elif any(
            "\ud800" <= c <= "\udfff" for item in (value if isinstance(value, list) else [value]) for c in str(item)
        ):
            raise RecipeError(f"{key} in {self.source} is not UTF-8 text")
        setattr(group, name, value)

    def _path(self, text: str, key: str) -> str:
        if not text.strip(BLANK):
            raise RecipeError(f"{key} in {self.source} is an empty text; write a path")
        try:
            return expand_home(text)
        except RecipeError as error:
            raise RecipeError(f"{key} in {self.source}: {error}") from error

    def override(self, key: str, text: str) -> None:
        *groups, name = key.split(".")
        group = self.recipe
        for part in groups:
            wanted, _ = self._declared(group, part, key)
            if not is_dataclass(wanted):
                raise self._unknown(key)
            group = getattr(group, part)
        wanted, _ = self._declared(group, name, key)
        self.put_key(group, name, read_override(key, text, wanted), key)

    def _declared(self, group: Any, name: str, key: str) -> tuple[Any, Any]:
        """Return the type and the field of a key; of a group, its dataclass."""
        for f in fields(group):
            if f.name == name:
                value = getattr(group, name)
                return (type(value), f) if is_dataclass(value) else (_types(group.__class__)[name], f)
        raise self._unknown(key)

    def _unknown(self, key: str) -> RecipeError:
        known = [full for _, _, full in walk(self.recipe)]
        groups = {full[: m.start()] for full in known for m in re.finditer(r"\.", full)}
        lists = [full for full in known if re.match(rf"{re.escape(full)}[.\[]", key)]
        if lists:
            return RecipeError(
                f"{format_value(key)} in {self.source}: {lists[0]} has no keys below it; write all of its value"
            )
        last = key.rsplit(".", 1)[-1]
        near = get_close_matches(key[:200], [*known, *groups], 1)
        near = near or [full for full in known if full.rsplit(".", 1)[-1] == last][:1]
        hint = f"; did you mean {near[0]}?" if near else ""
        return RecipeError(
            f"unknown key {format_value(key)} in {self.source}{hint} (reca train RECIPE --explain lists all keys)"
        )


@functools.cache
def _types(group: Any) -> dict[str, Any]:
    return get_type_hints(group)


def _check(config: Any, prefix: str = "") -> None:
    check_values(config, prefix)
    check_heads(config, prefix)
    if hasattr(config, "check"):
        config.check(prefix)
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            _check(value, f"{prefix}{f.name}.")
    if isinstance(config, ObjectiveConfig) and config.condition == "other" and config.reca.batch_size < 2:
        raise RecipeError(
            f"{prefix}condition=other takes h_v from another sample: set {prefix}reca.batch_size to 2 or more"
        )
    if isinstance(config, OptimConfig) and len(config.betas) != 2:
        raise RecipeError(f"{prefix}betas={format_value(config.betas)} must be two numbers from 0 to below 1")
    if isinstance(config, LogConfig) and config.profile is not None:
        match = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", config.profile)
        if not match or int(match[1]) > int(match[2]):
            raise RecipeError(f"{prefix}profile={format_value(config.profile)} must be first:last, such as 10:13")
    if isinstance(config, Recipe) and not config.active_tasks():
        raise RecipeError("every weight of objective is 0: there is nothing to train")
