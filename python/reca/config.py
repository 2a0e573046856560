"""Recipes: YAML parsed into typed, documented dataclasses (OmegaConf structured configs)."""

import re
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Optional

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from reca.data.config import DataConfig
from reca.models import UMMS, umm
from reca.models.base import KINDS
from reca.options import check_values, option

RECIPES = Path(__file__).parent / "recipes"


class RecipeError(ValueError):
    """A recipe that cannot be run as written; the message says which key, why, and what would be right."""


@dataclass
class KindConfig:
    weight: float = option(0.0, "lambda of this loss in the total; a kind of weight 0 is never computed", least=0)
    per_update: int = option(8, "samples of this kind in one update, over all ranks and micro-batches")
    micro_batch: int = option(8, "most samples in one forward pass on one rank; an update is split evenly below it")


@dataclass
class ObjectiveConfig:
    reca: KindConfig = option(lambda: KindConfig(weight=1.0), "reconstruction from h_v (the RECA loss)")
    i2t: KindConfig = option(KindConfig, "image to text; 1 where understanding and generation share weights")
    t2i: KindConfig = option(KindConfig, "caption to image: supervised fine-tuning (SFT)")
    condition: str = option("own", "whose h_v conditions the reconstruction: own, or other (control)", ("own", "other"))
    mean: str = option(
        "update",
        "what a loss is averaged over: all weights of the update, or each micro-batch by itself (as the releases do) "
        "and then these, each with its share of the update's samples",
        ("update", "micro_batch"),
    )


@dataclass
class OptimConfig:
    name: str = option("adamw", "adamw, or apex for NVIDIA apex's FusedAdam", ("adamw", "apex"))
    lr: float = option(1e-5, "peak learning rate", least=0)
    betas: list[float] = option(lambda: [0.9, 0.95], "AdamW betas")
    eps: float = option(1e-8, "AdamW epsilon")
    weight_decay: float = option(0.0, "decoupled weight decay, on the parameters the adapter's decays() names")
    clip: Optional[float] = option(1.0, "largest global gradient norm; null never clips", least=0)
    schedule: str = option("constant", "shape of the learning rate after warm-up", ("constant", "cosine", "linear"))
    warmup: int = option(0, "updates of linear warm-up", least=0)
    decay_updates: Optional[int] = option(None, "updates after which the schedule has ended; null = train.updates")
    hold: float = option(0.0, "linear and cosine: share of the updates at the peak before the decay starts")
    final: float = option(0.0, "learning rate at the end, as a share of the peak")


@dataclass
class TrainConfig:
    updates: int = option(1000, "optimizer updates to make in all", least=1)
    seed: int = option(0, "key of every random draw of the run")
    init_from: Optional[str] = option(
        None, "folder of another run of the same model: start from what it has trained (SFT then RECA, RECA then SFT)"
    )
    train: Optional[list[str]] = option(None, "parameter roles to train; null = what the paper trains for this UMM")
    frozen: list[str] = option(list, "name patterns of parameters that stay as they are although their role is trained")
    precision: str = option("fp32", "compute type of the forward pass; weights and sums stay fp32", ("fp32", "bf16"))
    activation_checkpointing: bool = option(False, "recompute the repeated layers in the backward pass")
    compile: bool = option(False, "torch.compile the repeated layers")
    max_skips: int = option(3, "consecutive updates with a non-finite loss or gradient before the run stops", least=0)
    threads: Optional[int] = option(None, "CPU threads; null leaves torch's choice", least=1)


@dataclass
class ParallelConfig:
    shard: Optional[int] = option(
        None,
        "ranks that share one copy of the weights (FSDP2); null = those of one node, or all where nodes differ",
        least=1,
    )
    timeout_minutes: int = option(30, "how long a collective may take", least=1)


@dataclass
class CheckpointConfig:
    every: int = option(500, "updates between checkpoints; 0 saves only at the end and on SIGTERM", least=0)
    keep: int = option(2, "newest checkpoints to keep; 0 keeps all", least=0)


@dataclass
class LogConfig:
    every: int = option(10, "updates between lines of log.jsonl", least=0)
    tensorboard: bool = option(True, "write TensorBoard files, if tensorboard is installed")
    prompts: list[str] = option(list, "prompts drawn into a grid PNG during training")
    sample_every: int = option(0, "updates between grids; 0 draws none", least=0)
    gap_every: int = option(0, "updates between measurements of the condition gap; 0 measures none", least=0)
    drift_every: int = option(0, "updates between losses on a fixed captioned batch; 0 measures none", least=0)
    profile: Optional[str] = option(None, "first:last update to record with torch.profiler, e.g. 10:13")


@dataclass
class Recipe:
    umm: str = option("show_o", "the model family", UMMS)
    model: Any = option(None, "keys of that family, see models/<umm>/config.py")
    data: DataConfig = option(DataConfig, "")
    objective: ObjectiveConfig = option(ObjectiveConfig, "")
    optim: OptimConfig = option(OptimConfig, "")
    train: TrainConfig = option(TrainConfig, "")
    parallel: ParallelConfig = option(ParallelConfig, "")
    checkpoint: CheckpointConfig = option(CheckpointConfig, "")
    log: LogConfig = option(LogConfig, "")
    run_dir: str = option("runs/reca", "folder of checkpoints and logs; an existing one is continued")

    def active_kinds(self) -> list[str]:
        """Kinds of loss with a weight, in the order in which an update runs them."""
        return [kind for kind in KINDS if getattr(self.objective, kind).weight]


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name: str | Path, overrides: list[str] = ()) -> Recipe:
    """A recipe by name (see `recipe_names`) or path, with `key.sub=value` overrides.

    Raises RecipeError for an unknown recipe, key or value.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / f"{name}.yaml"
    if not path.is_file():
        raise RecipeError(f"no recipe {str(name)!r}: give a .yaml file or one of {', '.join(recipe_names())}")
    for text in overrides:
        if "=" not in text:
            raise RecipeError(f"override {text!r} has no '='; write key.sub=value")
    written = _read(str(path), OmegaConf.load, path)
    given = _read("the command line", OmegaConf.from_dotlist, list(overrides))

    family = OmegaConf.merge(written, given).get("umm", "show_o")
    try:
        schema = OmegaConf.structured(Recipe(umm=family, model=umm(family).Config()))
    except ValueError as error:
        raise RecipeError(str(error)) from error
    for source, layer in ((str(path), written), ("the command line", given)):
        _reject_unknown(schema, layer, source)
    try:
        recipe = OmegaConf.to_object(OmegaConf.merge(schema, written, given))
        _check(recipe)
    except (OmegaConfBaseException, ValueError) as error:
        key = getattr(error, "full_key", None)
        reason = str(error).splitlines()[0]  # OmegaConf adds lines about its own types
        raise RecipeError(f"{key}: {reason}" if key else reason) from error
    return recipe


def save_recipe(recipe: Recipe, path: Path) -> None:
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(recipe)))


def as_dict(recipe: Recipe) -> dict:
    return OmegaConf.to_container(OmegaConf.structured(recipe))


def explain(recipe: Recipe) -> str:
    """Every key with its value and its documentation, one a line."""
    lines = []

    def walk(config: Any, prefix: str) -> None:
        for f in fields(config):
            value, key = getattr(config, f.name), f"{prefix}{f.name}"
            if is_dataclass(value):
                walk(value, f"{key}.")
                continue
            choices = f.metadata.get("choices")
            among = f" [{', '.join(map(str, choices))}]" if choices else ""
            lines.append((f"{key}={value}", f"{f.metadata.get('doc', '')}{among}"))

    walk(recipe, "")
    width = min(48, max(len(left) for left, _ in lines))
    return "\n".join(f"{left:<{width}}  {doc}" for left, doc in lines)


def _read(source: str, parse: Callable, what: Any) -> Any:
    try:
        config = parse(what)
    except Exception as error:  # YAML errors come as their own family
        reason = " ".join(str(error).split())
        raise RecipeError(f"{source} is not YAML: {reason} (did the shell take quotes away?)") from error
    if not OmegaConf.is_dict(config):
        raise RecipeError(f"{source} holds no keys; a recipe is a YAML file of key: value lines")
    return config


def _keys(config: Any, prefix: str = "") -> list[str]:
    keys = []
    for key in config:
        full = f"{prefix}{key}"
        keys.append(full)
        if OmegaConf.is_dict(config._get_node(key)) and not OmegaConf.is_missing(config, key):
            keys += _keys(config[key], f"{full}.")
    return keys


def _reject_unknown(schema: Any, layer: Any, source: str) -> None:
    known = _keys(schema)
    free = [
        key for key in known if OmegaConf.is_dict(OmegaConf.select(schema, key)) and not OmegaConf.select(schema, key)
    ]
    for key in _keys(layer):
        group, value = OmegaConf.select(schema, key), OmegaConf.select(layer, key)
        if OmegaConf.is_dict(group) and not OmegaConf.is_dict(value):
            raise RecipeError(f"{key} in {source} is a group of keys, not a value; write {key}.sub=value")
        if key in known or any(key.startswith(f"{parent}.") for parent in free):
            continue
        last = key.rsplit(".", 1)[-1]
        near = get_close_matches(key, known, 1) or [full for full in known if full.rsplit(".", 1)[-1] == last][:1]
        hint = f"; did you mean {near[0]}?" if near else ""
        raise RecipeError(f"unknown key {key!r} in {source}{hint} (reca train RECIPE --explain lists all keys)")


def _check(config: Any, prefix: str = "") -> None:
    check_values(config, prefix)
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            _check(value, f"{prefix}{f.name}.")
    if isinstance(config, KindConfig) and config.weight and (config.per_update < 1 or config.micro_batch < 1):
        raise ValueError(f"{prefix}per_update and micro_batch must be at least 1 for a kind with a weight")
    if isinstance(config, ObjectiveConfig) and config.condition == "other" and config.reca.per_update < 2:
        raise ValueError(
            f"{prefix}condition=other takes h_v from another sample: set {prefix}reca.per_update to 2 or more"
        )
    if isinstance(config, OptimConfig) and (len(config.betas) != 2 or not all(0 <= beta < 1 for beta in config.betas)):
        raise ValueError(f"{prefix}betas={config.betas} must be two numbers from 0 to below 1")
    if isinstance(config, LogConfig) and config.profile and not re.fullmatch(r"\d+:\d+", config.profile):
        raise ValueError(f"{prefix}profile={config.profile!r} must be first:last, such as 10:13")
    if isinstance(config, Recipe) and not config.active_kinds():
        raise ValueError("every weight of objective is 0: there is nothing to train")
