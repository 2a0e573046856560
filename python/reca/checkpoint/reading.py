"""Read checkpoints, on any number of ranks. No code runs: tensors are safetensors, everything else is JSON.

An error during reading is reported as damage only if that is proved: by contents that cannot be parsed, or by files
that differ from their checksums. Other errors, of the process group, the disk or memory, are raised unchanged.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from reca import distributed, exits
from reca.checkpoint import manifest
from reca.checkpoint.contents import EMA, FLAT, changed_parameters, named_parameters, tensors
from reca.checkpoint.errors import CheckpointError, first_reason
from reca.checkpoint.listing import compare, find_damage, latest_valid
from reca.config.recipe import LoraConfig
from reca.errors import PeerFailed
from reca.io.checkpoints import MARKER
from reca.io.files import parse_json
from reca.io.folders import is_utf8
from reca.io.paths import exists, is_dir
from reca.io.shape import OrNull, misfit
from reca.models.base import Adapter
from reca.training import lora

NUMBER = int | float
STATE = {"step": int}
# Shape of the counters that a run resumes from. Names of metrics, of data keys and of the recipe's other keys are free.
RUN_STATE = {
    "step": int, "schedule_end": int, "ranks": int, "inherited": [str], "group_steps": list, "recipe": {"train": dict},
    "fingerprint": dict, "skipped": {"norms": [NUMBER], "total": int, "in_a_row": int},
    "monitor": {"start": {str: [NUMBER]}, "smooth": {str: NUMBER}, "first": {str: NUMBER}, "active": [str]},
    "ema": OrNull({"half_life": NUMBER, "updates": int}),
}  # fmt: skip
PROVE_NOTHING = (OSError, MemoryError, RuntimeError)  # no proof of damage; safetensors reports EMFILE as a missing file


def load(folder: Path, adapter: Adapter, optimizer: torch.optim.Optimizer | None = None) -> dict:
    """Load a checkpoint's parameters (and optimizer state), on any number of ranks. Return the counters.

    Raises CheckpointError if the checkpoint is incomplete or damaged, or contains other parameters than this run's.
    """
    weights = changed_parameters(adapter)
    with distributed.fail_together():
        if not exists(folder / MARKER):
            raise CheckpointError(f"{folder} is not a complete checkpoint (no {MARKER} file); use an earlier one")
        saved, state = _saved(folder / "weights"), read_state(folder)
    wanted = {name: tuple(value.shape) for name, value in weights.items()}
    if saved != wanted:
        differ = sorted(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
        raise CheckpointError(
            f"{folder} does not fit the parameters this run trains: {len(differ)} differ, the first {differ[:5]}. "
            "Was model or train.roles changed? Start in another run_dir, or restore the recipe"
        )
    _read(folder / "weights", weights)
    if optimizer is not None:
        moments = get_optimizer_state_dict(adapter, optimizer, options=FLAT)
        _read(folder / "optimizer", tensors(moments))
        with distributed.fail_together():
            set_optimizer_state_dict(adapter, optimizer, moments, options=FLAT)
            for group, step in zip(optimizer.param_groups, state["group_steps"], strict=True):
                if step is not None:
                    group["step"] = step
    return state


def load_ema(folder: Path, averages: dict[str, Tensor], all_of_them: bool = True) -> None:
    """Fill tensors with the averages of a checkpoint, on any number of ranks.

    all_of_them: False leaves tensors unchanged of which the checkpoint has no average.
    Raises CheckpointError if it has no averages, or averages of other parameters.
    """
    with distributed.fail_together():
        if not is_dir(folder / EMA):
            raise CheckpointError(f"{folder} has no EMA: its run had ema.half_life=0. Use the raw weights")
        saved = _saved(folder / EMA)
    wanted = {name: tuple(value.shape) for name, value in averages.items()}
    if any(wanted.get(name) != shape for name, shape in saved.items()) or (all_of_them and saved != wanted):
        raise CheckpointError(f"{folder / EMA} does not fit this model: both runs must name the same umm and sizes")
    _read(folder / EMA, {name: averages[name] for name in saved})


def digest(folder: Path) -> str:
    """Identify a complete checkpoint by the checksums of its files. Raises CheckpointError if they are damaged."""
    return _reading(folder, lambda: hashlib.sha256((folder / MARKER).read_bytes()).hexdigest())


def read_state(folder: Path, of_run: bool = False) -> dict:
    """Read the counters of a checkpoint.

    of_run: all that a run resumes from must be there; a checkpoint of weights alone has the step only.
    Raises CheckpointError if they are damaged, or those of another version.
    """
    return _reading(folder, lambda: _state(folder / "state.json", RUN_STATE if of_run else STATE))


def _state(path: Path, shape: dict) -> dict:
    state = parse_json(path.read_bytes())
    if (place := misfit(state, shape)) is not None:
        raise CheckpointError(
            f"{path} does not fit this version of reca: {place.lstrip('.') or 'it'} is missing or of another type. Use "
            "the version that wrote it, or an earlier checkpoint"
        )
    return state


def load_weights(folder: Path, adapter: Adapter, ema: bool = False) -> frozenset[str]:
    """Load the parameters that another run has changed, whatever this run trains. Return their names.

    The checkpoint's counters are kept as adapter.state, with its `digest`, because that run may go on. Parameters on
    the meta device are not read.
    folder: checkpoint that `find_valid` has found. ema: load the averages of trained parameters instead of their last
    values.
    Raises CheckpointError if there are no averages, or parameters that this model lacks.
    """
    with distributed.fail_together():
        names, adapter.state = check_fit(folder, adapter), read_state(folder) | {"digest": digest(folder)}
    own = {name: p.detach() for name, p in named_parameters(adapter).items() if name in names and not p.is_meta}
    _read(folder / "weights", own)
    if ema:
        load_ema(folder, own, all_of_them=False)
    return names


def check_fit(folder: Path, adapter: Adapter, mergeable: bool = False) -> frozenset[str]:
    """List a checkpoint's parameters. Raises CheckpointError if this model lacks one or has it in another shape.

    mergeable: LoRA matrices need only fit the weights that they would be merged into.
    """
    own = {name: tuple(p.shape) for name, p in named_parameters(adapter).items()}
    saved = _saved(folder / "weights")
    misfits = sorted(
        name
        for name, shape in saved.items()
        if own.get(name) != shape and not (mergeable and lora.fits(name, shape, own))
    )
    if misfits:
        raise CheckpointError(
            f"{folder} does not fit this model: {len(misfits)} of its parameters are missing here or have another "
            f"shape, the first {misfits[:5]}. Both runs must name the same umm and sizes"
        )
    return frozenset(saved)


def load_lora(folder: Path, adapter: Adapter, config: LoraConfig) -> frozenset[str]:
    """Load the parameters that a run with LoRA has changed into a model without, or with other LoRA, by merging.

    folder: as in `load_weights`. config: that run's LoRA settings. Returns the names of the parameters that were
    changed, and sets adapter.state likewise. Parameters on the meta device are not read.
    Raises CheckpointError like `load_weights`.
    """
    with distributed.fail_together():
        names, shapes = check_fit(folder, adapter, mergeable=True), _saved(folder / "weights")
        adapter.state = read_state(folder) | {"digest": digest(folder)}
    own = {name: p.detach() for name, p in named_parameters(adapter).items() if not p.is_meta}
    plain = {name for name in names if not lora.is_lora(name)}
    _read(folder / "weights", {name: own[name] for name in plain & own.keys()})
    beside = {name for name in names - plain if lora.weight_beside(name) in own}
    matrices = {name: torch.empty(shapes[name], dtype=torch.float32, device="cpu") for name in beside}
    _read(folder / "weights", matrices)
    with distributed.fail_together():
        return frozenset(plain | lora.merge_tensors(adapter, matrices, config))


def list_weights(folder: Path) -> dict[str, tuple[int, ...]]:
    """Read names and shapes of the parameters in a checkpoint. Raises CheckpointError."""
    return _saved(folder / "weights")


def read_weight(folder: Path, name: str) -> Tensor:
    """Read one parameter of a checkpoint as a whole. Raises CheckpointError."""
    weights = folder / "weights"
    metadata = _reading(folder, lambda: HuggingFaceStorageReader(str(weights)).read_metadata())
    entry = metadata.state_dict_metadata[name]
    tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
    _read(weights, {name: tensor})
    return tensor


def find_valid(run_dir: Path, folder: Path | None = None) -> Path:
    """Find the latest valid checkpoint of another run, or check the given one. Raises CheckpointError if that fails."""
    if folder is not None:
        if damage := find_damage(folder):
            raise _damaged(folder, damage)
        return folder
    if (folder := latest_valid(run_dir)) is None:
        raise CheckpointError(f"{run_dir} has no complete checkpoint; did the run save one?")
    return folder


def _saved(folder: Path) -> dict[str, tuple[int, ...]]:
    """Read names and shapes of the tensors in a folder of shards.

    Raises CheckpointError for damaged shards, and for shards that are not listed in the checkpoint.
    """
    listed = _reading(folder.parent, lambda: manifest.read(folder.parent / MARKER))
    strangers = sorted(p.name for p in folder.glob("*.safetensors") if f"{folder.name}/{p.name}" not in listed)
    if strangers:
        raise CheckpointError(f"{folder} contains {strangers[0]}, which is not part of this checkpoint: remove it")
    metadata = _reading(folder.parent, lambda: HuggingFaceStorageReader(str(folder)).read_metadata())
    return {name: tuple(entry.size) for name, entry in metadata.state_dict_metadata.items()}


def _read(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill tensors from a folder of shards, on all ranks together.

    Only read errors, which DCP gathers from all ranks, are examined for damage; errors of its collectives are not.
    """
    if not tensors:
        return
    try:
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)))
    except dcp.api.CheckpointException as error:  # the same on every rank
        failures = {rank: failure for rank, (failure, _) in error.failures.items()}
        for failure in failures.values():
            if not isinstance(failure, Exception):  # such as SystemExit by a signal
                raise failure from error
        if damage := next(filter(None, map(_damage, failures.values())), "") or find_damage(folder.parent):
            raise _damaged(folder.parent, damage) from error
        rank, failure = next(iter(failures.items()))
        if (own := failures.get(distributed.rank())) is not None:
            raise own from error
        raise PeerFailed(rank, exits.code_of(failure), first_reason(failure)) from error


def _reading(folder: Path, read: Callable):
    """Call a function that reads files of a checkpoint, on this rank only. Raises CheckpointError for damage."""
    try:
        return read()
    except Exception as error:
        if damage := _damage(error) or "; ".join(compare(folder)):
            raise _damaged(folder, damage) from error
        raise


def _damage(error: BaseException) -> str:
    """Describe contents that could not be parsed; empty for an error that does not prove damage."""
    return "" if isinstance(error, PROVE_NOTHING) else f"{type(error).__name__}: {first_reason(error)}"


def _damaged(folder: Path, damage: str) -> CheckpointError:
    if not is_utf8(folder):
        return CheckpointError(f"{folder} is not UTF-8, as safetensors requires of paths: rename the folder")
    if not exists(folder):
        return CheckpointError(f"{folder} was removed by a training run while it was read: start again")
    if not exists(folder / MARKER):
        return CheckpointError(f"{folder} is not a complete checkpoint (no {MARKER} file); use an earlier one")
    return CheckpointError(f"{folder} is damaged ({damage}); remove it, and use the checkpoint before it")
