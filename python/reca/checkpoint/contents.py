"""Contents of a checkpoint, and which rank writes which part of it."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from reca import distributed
from reca.config.recipe import OptimConfig
from reca.models.base import Adapter
from reca.optim import state_bytes
from reca.training.lora import published_name

EMA = "ema"  # folder of the averages
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
FILE_BYTES = 1 << 30  # approximate size of a file, which is assembled in memory


@dataclass(frozen=True)
class Snapshot:
    """One rank's share of a checkpoint.

    state    JSON-serialisable, with the number of completed steps as "step"
    parts    tensors that this rank writes, by folder and name: its shards, and its share of the replicated tensors
    files    number of the file, for every tensor of the checkpoint, by folder and name
    bytes    size of the whole checkpoint
    """

    state: dict[str, Any]
    parts: dict[str, dict[str, Tensor]]
    files: dict[str, dict[str, int]]
    bytes: int


def snapshot(
    state: dict[str, Any],
    adapter: Adapter,
    optimizer: torch.optim.Optimizer,
    ema: dict[str, Tensor] | None = None,
) -> Snapshot:
    """Collect the contents of a checkpoint of the current state. The tensors are the run's own, not copies.

    ema: averages of the trained parameters.
    """
    for module in adapter.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # parameters outside blocks stay gathered after a forward pass without a backward pass
    moments = get_optimizer_state_dict(adapter, optimizer, options=FLAT)
    whole = {"weights": changed_parameters(adapter), "optimizer": tensors(moments), EMA: ema or {}}
    whole = {name: part for name, part in whole.items() if part}
    return Snapshot(
        state | {"group_steps": [group.get("step") for group in optimizer.param_groups]},  # apex counts steps there
        {name: own_share(part) for name, part in whole.items()},
        {name: split_into_files(part) for name, part in whole.items()},
        sum(tensor.nbytes for part in whole.values() for tensor in part.values()),
    )


def changed_parameters(adapter: Adapter) -> dict[str, Tensor]:
    """Return the parameters that this run trains or an earlier one has trained, by name.

    They are the model's own tensors, so that loading fills them. Names are the published ones, also with LoRA.
    """
    own = named_parameters(adapter)
    return {name: p.detach() for name, p in own.items() if p.requires_grad or name in adapter.inherited}


def named_parameters(adapter: Adapter) -> dict[str, nn.Parameter]:
    """Return all parameters under their names in checkpoints."""
    return {published_name(name): parameter for name, parameter in adapter.named_parameters()}


def size(adapter: Adapter, config: OptimConfig, ema: bool = False) -> int:
    """Count the bytes of a checkpoint: the changed parameters, and the optimizer state of the trained ones.

    ema: include the fp32 averages of the trained parameters.
    """
    trained = [p for p in adapter.parameters() if p.requires_grad]
    changed = sum(parameter.nbytes for parameter in changed_parameters(adapter).values())
    return changed + sum(state_bytes(p, config) + (4 * p.numel() if ema else 0) for p in trained)


def tensors(state: dict) -> dict[str, Tensor]:
    """Return the tensors of a flat optimizer state. All other values are settings, which come from the recipe."""
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def own_share(whole: dict[str, Tensor]) -> dict[str, Tensor]:
    """Select the tensors that this rank writes: those that only it holds, and an equal share of the replicated ones."""
    loads: dict[int, list[int]] = {}  # bytes by owner, for each number of copies
    own = set()
    for name in sorted(whole, key=lambda name: -whole[name].nbytes):
        copies, index = _copies(whole[name])
        load = loads.setdefault(copies, [0] * copies)
        owner = load.index(min(load))
        load[owner] += whole[name].nbytes
        if owner == index:
            own.add(name)
    return {name: tensor for name, tensor in whole.items() if name in own}


def split_into_files(whole: dict[str, Tensor]) -> dict[str, int]:
    """Assign each tensor the number of its file, from 1. The result is the same on every rank."""
    files, file, filled = {}, 1, 0
    for name, tensor in whole.items():
        shards = tensor.device_mesh.size() // _copies(tensor)[0] if isinstance(tensor, DTensor) else 1
        need = -(-tensor.nbytes // shards)
        if filled and filled + need > FILE_BYTES:
            file, filled = file + 1, 0
        filled += need
        files[name] = file
    return files


def _copies(tensor: Tensor) -> tuple[int, int]:
    """Return the number of ranks that hold the same data as this one, and this rank's index among them."""
    if not isinstance(tensor, DTensor):
        return distributed.world_size(), distributed.rank()
    mesh = tensor.device_mesh
    coordinate: Any = mesh.get_coordinate()  # never None: every mesh is of all ranks
    replicated = [dim for dim, placement in enumerate(tensor.placements) if placement.is_replicate()]
    index = 0
    for dim in replicated:
        index = index * mesh.size(dim) + coordinate[dim]
    return math.prod(mesh.size(dim) for dim in replicated), index
