"""What a checkpoint holds of a model and its optimizer, and which rank writes which part of it."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from reca import distributed
from reca.config import OptimConfig
from reca.lora import published_name
from reca.models.base import Adapter
from reca.optim import state_bytes

EMA = "ema"  # the folder of the averages
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
FILE_BYTES = 1 << 30  # of one file, about: it is put together in memory


@dataclass(frozen=True)
class Snapshot:
    """One rank's share of a checkpoint.

    state    JSON-able, with the number of steps done as "step"
    parts    the tensors that this rank writes, by folder and name: its shards, and its share of what all ranks hold
    files    for every tensor of the checkpoint, in which file of its rank it is written, by folder and name
    bytes    of the whole checkpoint
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
    """Collect what a checkpoint of now consists of. The tensors are the run's own, no copies.

    ema: averages of the trained parameters.
    """
    for module in adapter.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # what is in no block stays gathered after a pass that no backward pass follows
    moments = get_optimizer_state_dict(adapter, optimizer, options=FLAT)
    whole = {"weights": changed_parameters(adapter), "optimizer": tensors(moments), EMA: ema or {}}
    whole = {name: part for name, part in whole.items() if part}
    return Snapshot(
        state | {"group_steps": [group.get("step") for group in optimizer.param_groups]},  # where apex counts
        {name: own_share(part) for name, part in whole.items()},
        {name: split_into_files(part) for name, part in whole.items()},
        sum(tensor.nbytes for part in whole.values() for tensor in part.values()),
    )


def changed_parameters(adapter: Adapter) -> dict[str, Tensor]:
    """Return the parameters that are not as published, by name: trained by this run or by one before it.

    The tensors themselves, so that loading fills them. Names are published ones, whatever LoRA has made of them.
    """
    own = named_parameters(adapter)
    return {name: p.detach() for name, p in own.items() if p.requires_grad or name in adapter.inherited}


def named_parameters(adapter: Adapter) -> dict[str, nn.Parameter]:
    """Return all parameters under the names that checkpoints have."""
    return {published_name(name): parameter for name, parameter in adapter.named_parameters()}


def size(adapter: Adapter, config: OptimConfig, ema: bool = False) -> int:
    """Count the bytes of a checkpoint: the changed parameters, and the optimizer's state of each that is trained.

    ema: with an fp32 average of these, too.
    """
    trained = [p for p in adapter.parameters() if p.requires_grad]
    changed = sum(parameter.nbytes for parameter in changed_parameters(adapter).values())
    return changed + sum(state_bytes(p, config) + (4 * p.numel() if ema else 0) for p in trained)


def tensors(state: dict) -> dict[str, Tensor]:
    """Return the tensors of a flat optimizer state. All else are settings, which come from the recipe."""
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def own_share(whole: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave to each rank what it alone has, and an equal share of what several ranks hold the same copies of."""
    loads: dict[int, list[int]] = {}  # bytes by owner, for every number of copies
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
    """Number the files, from 1, that each rank's tensors go to. Every rank gets the same answer."""
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
    """Return how many ranks hold the same data as this one, and this rank's number among them."""
    if not isinstance(tensor, DTensor):
        return distributed.world_size(), distributed.rank()
    mesh, coordinate = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    if coordinate is None:  # of other ranks
        return 1, 1
    replicated = [dim for dim, placement in enumerate(tensor.placements) if placement.is_replicate()]
    index = 0
    for dim in replicated:
        index = index * mesh.size(dim) + coordinate[dim]
    return math.prod(mesh.size(dim) for dim in replicated), index
