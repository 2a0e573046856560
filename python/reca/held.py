"""What a rank and a machine hold of a recipe before any activation, counted from shapes: at once, and at least."""

from typing import NamedTuple

import torch
from torch import nn

from reca.config import Recipe
from reca.micro_batches import accumulation_steps
from reca.models.base import Adapter
from reca.optim import state_bytes
from reca.parallelize import predicted_shard_size
from reca.runs import published_files


class Held(NamedTuple):
    """Bytes on the GPU that holds most, without activations, images and allocator fragmentation."""

    weights: int  # the fp32 masters of what is trained, and what is frozen
    gradients: int
    moments: int  # of AdamW
    ema: int  # fp32 averages of what is trained, with ema.half_life
    copies: int  # weights gathered from other GPUs, or cast by autocast, while they are used

    @property
    def total(self) -> int:
        return sum(self)


def held(adapter: Adapter, recipe: Recipe, gpus: int, node: int, card: int = 0) -> Held:
    """Compute the memory of the GPU that holds most, of `gpus` GPUs with `node` in a machine.

    card: bytes of a GPU; with room for it, parallel.strategy=auto gives each all weights.

    weights     FSDP2 splits each parameter's first dimension into `shard` parts, the last ones smaller or empty
    gradients   like weights; where a step has several backward passes and only the last reduces, whole and in fp32
    moments     two per trained weight, in the type that optim asks for; none with optim.offload
    ema         one fp32 number per trained weight
    copies      FSDP2: what is in no block stays gathered from forward to backward, and two blocks at a time, in the
                type of computation; of replicas only what is trained; one GPU: bf16 copies of trained matrices, at
                most, and none without train.cast_once
    """
    for task in recipe.active_tasks():
        if task not in adapter.tasks:
            raise ValueError(f"{recipe.umm} has no {task} loss: set objective.{task}.weight=0")
    several = sum(accumulation_steps(getattr(recipe.objective, task), gpus) for task in recipe.active_tasks()) > 1
    whole = gpus > 1 and several and not recipe.parallel.reduce_every_micro_batch
    shard = predicted_shard_size(adapter, recipe, gpus, node, card)
    half = recipe.train.precision == "bf16"
    cast = gpus == 1 and half and recipe.train.cast_once
    weights = sum(buffer.nbytes for buffer in adapter.buffers())
    gradients = moments = ema = copies = 0
    for parameter in adapter.parameters():
        own = part(parameter, shard) * parameter.itemsize
        weights += own
        if parameter.requires_grad:
            gradients += 4 * parameter.numel() if whole else own
            moments += 0 if recipe.optim.offload else state_bytes(parameter, recipe.optim, shard)
            ema += 4 * part(parameter, shard) if recipe.ema.half_life else 0
            if cast and parameter.ndim > 1 and parameter.dtype == torch.float32:
                copies += 2 * parameter.numel()
    if gpus > 1:
        managed = [p for p in adapter.parameters() if shard > 1 or p.requires_grad]  # replicas leave frozen ones alone
        ids = set(map(id, managed))
        blocks = [[p for p in block.parameters() if id(p) in ids] for block in adapter.blocks()]
        inside = {id(parameter) for block in blocks for parameter in block}
        copies = sum(parameter.nbytes for parameter in managed if id(parameter) not in inside)
        sizes = sorted(sum(p.numel() * 2 if half else p.nbytes for p in block) for block in blocks)
        copies += sum(sizes[-2:])
    return Held(weights, gradients, moments, ema, copies)


def host_memory(adapter: Adapter, recipe: Recipe, gpus: int, node: int, card: int = 0) -> int:
    """Count the bytes of a machine's memory that loading weights on `gpus` GPUs takes, with `node` in a machine.

    Files are mapped, and each process copies its part of one parameter at a time to its GPU; what the system keeps of
    the files beside that it gives back when it must. A model without files is made on one machine as a whole.
    """
    ranks, shard = min(node, gpus), predicted_shard_size(adapter, recipe, gpus, node, card)
    copied = max(part(parameter, shard) * parameter.itemsize for parameter in adapter.parameters())
    need = ranks * (copied + sum(buffer.nbytes for buffer in adapter.buffers()))
    if not published_files(recipe):
        need += sum(parameter.nbytes for parameter in adapter.parameters())
    return need


def host_moments(adapter: Adapter, recipe: Recipe, gpus: int, node: int, card: int = 0) -> int:
    """Count the bytes of a machine's memory in which optim.offload keeps moments, with `node` GPUs in a machine."""
    if not recipe.optim.offload:
        return 0
    ranks, shard = min(node, gpus), predicted_shard_size(adapter, recipe, gpus, node, card)
    return ranks * sum(state_bytes(p, recipe.optim, shard) for p in adapter.parameters() if p.requires_grad)


def part(parameter: nn.Parameter, shard: int) -> int:
    """Count the elements of the largest of `shard` parts along the first dimension."""
    if parameter.ndim == 0:
        return 1
    return -(-parameter.shape[0] // shard) * parameter[:1].numel()
