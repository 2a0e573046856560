"""Checks before weights are loaded: recipe, data, memory and disk."""

import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from reca import checkpoint, distributed, precision, units
from reca.config.recipe import Recipe
from reca.data.errors import DataError
from reca.data.loader import chosen_decoder
from reca.data.sample import Source
from reca.data.sources.factory import DATA_KEYS
from reca.data.templates import load_templates
from reca.estimate.held import held, host_moments
from reca.estimate.meta_model import build_meta, check_tasks, check_templates
from reca.eval.training import TrainingSuite
from reca.hardware.devices import usable_device
from reca.hardware.host_memory import total as host_memory
from reca.io.paths import exists
from reca.models import umm_package
from reca.models.base import Adapter
from reca.optim import check_apex, check_passes
from reca.options.fields import RecipeError
from reca.runs import lineage
from reca.runs.published import published_files
from reca.runs.sources import open_run_sources
from reca.training import compiled_blocks, float8
from reca.training.lora import choose_trained

log = logging.getLogger("reca")

COMPARED = 64  # samples of a source whose keys are compared between ranks


def check_on_ranks(
    recipe: Recipe, tasks: Sequence[str], adapter: Adapter | None, state: Mapping[str, Any] | None
) -> tuple[dict[str, Source], dict[str, Any]]:
    """Check everything that needs no weights on rank 0, then open the data on the other ranks.

    state: state of the checkpoint to resume from; None for a new run. Returns the data sources by task, and the run's
    `fingerprint`, which is empty on ranks other than 0.
    Raises the errors of `check`, and RecipeError if the folder contains a run of another recipe.
    """
    sources: dict[str, Source] = {}
    fingerprint: dict[str, Any] = {}
    with distributed.fail_together():
        if distributed.rank() == 0:
            ranks, node = distributed.world_size(), distributed.local_world_size()
            sources, templates = check(recipe, tasks, ranks, node, adapter, begins=state is None)
            fingerprint = lineage.fingerprint(recipe, sources, templates, state)
            if state is not None:
                lineage.reject_changed(recipe, Path(recipe.run_dir), state, fingerprint)
    with distributed.fail_together():
        if distributed.rank() > 0:
            sources = open_run_sources(recipe, tasks)
    _reject_other_samples(sources)
    return sources, fingerprint


def _reject_other_samples(sources: Mapping[str, Source]) -> None:
    """Raise DataError on ranks whose samples differ from rank 0's in number or in COMPARED keys, PeerFailed on others.

    A file server may show a machine an earlier state of a folder; the ranks would then draw from different orders.
    """
    with distributed.fail_together():
        own = {name: [len(source), *_some_keys(source)] for name, source in sources.items()}
    first = distributed.all_gather(own)[0]
    with distributed.fail_together():
        if differing := [name for name in own if own[name] != first[name]]:
            name = differing[0]
            raise DataError(
                f"rank {distributed.rank()} on {socket.gethostname()} has other samples of "
                f"{'data.' + DATA_KEYS[name] if name in DATA_KEYS else name} than rank 0 ({own[name][0]} and "
                f"{first[name][0]}): wait until all machines have the same files, then start again"
            )


def _some_keys(source: Source) -> list[str]:
    """Return the keys of COMPARED samples at equal distances."""
    return [source.key(len(source) * number // COMPARED) for number in range(COMPARED)]


def check(
    recipe: Recipe, tasks: Sequence[str], ranks: int, node: int, adapter: Adapter | None = None, begins: bool = True
) -> tuple[dict[str, Source], list[str]]:
    """Raise within seconds the errors that `Trainer` would otherwise raise after minutes of loading.

    tasks: tasks whose data is opened. node: number of ranks on this machine.
    adapter: an existing model to use instead of the recipe's. begins: the run is new rather than resumed, so
    train.init_from is checked.

    Returns the data sources, as `open_run_sources`, and the templates.
    Raises RecipeError or ValueError for the recipe and the machine, DataError for data and disk, CheckpointError for
    train.init_from.
    """
    model = adapter
    if model is None:
        check_files(recipe)
        model, _ = build_meta(recipe)
    else:
        check_tasks(model, recipe)
        choose_trained(model, recipe)
    templates = check_recipe(recipe)
    check_passes(recipe, ranks)
    check_apex(model, recipe.optim, ranks)
    device = usable_device(None)
    precision.check_usable(recipe.train.precision, device)
    if recipe.train.float8:
        float8.check_usable(device)
    compiled_blocks.check_usable(recipe.train, device)
    chosen_decoder(recipe.data)
    if begins:
        lineage.check_parent(recipe, model)
    sources = open_run_sources(recipe, tasks)
    _others_exist(recipe, sources)
    if adapter is None:
        _memory(recipe, model, ranks, node)
    _disk(recipe, model)
    if "reca" in tasks and adapter is None:
        check_templates(recipe, umm_package(recipe.umm).Adapter.load_tokenizer(recipe.model), templates)
    elif "reca" in tasks:
        model.check_templates(templates)
    return sources, templates


def _others_exist(recipe: Recipe, sources: Mapping[str, Source]) -> None:
    """Check that there is another image to take h_v from, if there is only one.

    Raises DataError for objective.condition=other; logs a warning for log.gap_every.
    """
    if "reca" not in sources or len(sources["reca"]) > 1:
        return
    if recipe.objective.condition == "other":
        raise DataError("objective.condition=other takes h_v from another image, but data.images has only one")
    if recipe.log.gap_every:
        log.warning("log.gap_every takes h_v from another image, but data.images has only one: the gap is always 0")


def check_recipe(recipe: Recipe) -> list[str]:
    """Check a recipe's evaluations and templates, without weights, data or hardware. Return the templates.

    Raises RecipeError, or DataError for the templates.
    """
    if recipe.eval.every and recipe.eval.suite is not None:
        TrainingSuite(recipe, Path(recipe.run_dir))
    return load_templates(recipe.data.templates, recipe.data.template_count)


def check_files(recipe: Recipe) -> None:
    """Raise RecipeError if a model file that is given as a path does not exist."""
    for name, value in published_files(recipe).items():
        if value.startswith(("/", "./", "../", "~")) and not exists(Path(value)):
            raise RecipeError(
                f"model.{name}={value} does not exist; set a file, a folder, or a hub id such as owner/name"
            )


def _memory(recipe: Recipe, adapter: Adapter, ranks: int, node: int) -> None:
    need = held(adapter, recipe, ranks, node).total
    if torch.cuda.is_available():
        have, where, each = torch.cuda.get_device_properties(0).total_memory, "the GPU", 1
    else:
        have, where, each = host_memory(), "this machine", node
    if (moments := host_moments(adapter, recipe, ranks, node)) > host_memory():
        raise RecipeError(
            f"optim.offload=true needs {units.size(moments)} of host memory for moments on each machine, but this one "
            f"has {units.size(host_memory())}. Set optim.name=adamw_8bit or optim.moments=bf16 for smaller moments, or "
            "use more machines"
        )
    if need * each + (0 if torch.cuda.is_available() else moments) > have:
        raise RecipeError(
            f"training needs at least {units.size(need)} per process ({ranks} in total), without activations, but "
            f"{where} has {units.size(have / each)}. Use more GPUs, or train less of the model (train.roles, "
            "train.frozen); `reca check` shows what uses the memory"
        )


def space_for_checkpoints(recipe: Recipe, adapter: Adapter) -> Callable[[Path], int]:
    """Return a function that returns how many bytes of a folder's disk to leave to the run's next checkpoints.

    They are a quarter more than the checkpoints' size: the run also writes logs, images and the features of a step.
    """
    run_dir, each, most = Path(recipe.run_dir), *_checkpoints(recipe, adapter)

    def needed(folder: Path) -> int:
        if folder.stat().st_dev != (run_dir / "checkpoints").stat().st_dev:
            return 0
        return each * max(0, most - len(checkpoint.list_complete(run_dir))) * 5 // 4

    return needed


def _checkpoints(recipe: Recipe, adapter: Adapter) -> tuple[int, int]:
    """Return the size of a checkpoint, and the largest number of them."""
    keep = checkpoint.Keep(recipe.checkpoint.keep, recipe.checkpoint.keep_every)
    each = checkpoint.size(adapter, recipe.optim, recipe.ema.half_life > 0)
    return each, keep.most(recipe.train.steps, recipe.checkpoint.every)


def _disk(recipe: Recipe, adapter: Adapter) -> None:
    run_dir, config = Path(recipe.run_dir), recipe.checkpoint
    need, most = _checkpoints(recipe, adapter)
    free = checkpoint.free_space(run_dir)
    if need > free:
        raise DataError(
            f"run_dir {run_dir}: a checkpoint needs about {units.size(need)}, but only {units.size(free)} are free; "
            "free space or set another run_dir"
        )
    more = most - len(checkpoint.list_complete(run_dir))
    if more * need > free:
        rule = f"the latest {config.keep}" if config.keep else "all"
        rule += f" and one for every {config.keep_every} steps" if config.keep and config.keep_every else ""
        log.warning(
            "run_dir %s: %d more checkpoints of %s will be kept (%s), but only %s are free; free space, or set "
            "checkpoint.keep and keep_every to keep fewer",
            run_dir, more, units.size(need), rule, units.size(free),
        )  # fmt: skip
