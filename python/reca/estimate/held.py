"""Memory that a recipe takes on a GPU and on a node without activations, computed from shapes."""

import math
from typing import NamedTuple

import torch
from torch import nn

from reca.config.recipe import Recipe
from reca.data.micro_batches import accumulation_steps
from reca.models.base import Adapter
from reca.optim import state_bytes
from reca.runs.published import published_files
from reca.training.parallelize import predicted_shard_size


class Held(NamedTuple):
    """Bytes on the GPU that holds the most, without activations, images and allocator fragmentation."""

    weights: int  # trained and frozen parameters, and buffers
    gradients: int
    moments: int  # of AdamW
    ema: int  # fp32 averages of the trained parameters, with ema.half_life
    copies: int  # weights gathered from other GPUs, or cast by autocast, while they are in use

    @property
    def total(self) -> int:
        return sum(self)


def held(adapter: Adapter, recipe: Recipe, gpus: int, node: int, card: int = 0) -> Held:
    """Compute the memory of the GPU that holds the most, of `gpus` GPUs with `node` per node.

    card: memory of a GPU in bytes; if it is large enough, parallel.strategy=auto replicates all weights.

    weights     FSDP2 splits each parameter's first dimension into `shard` parts, the last ones smaller or empty
    gradients   like weights; unsharded and in fp32 if a step has several backward passes and only the last reduces
    moments     two per trained weight, in the dtype that optim selects; none with optim.offload
    ema         one fp32 number per trained weight
    copies      FSDP2: parameters outside blocks stay gathered from forward to backward, blocks two at a time in the
                compute dtype; with replicas only trained parameters. One GPU: bf16 copies of trained matrices, an
                upper bound; none without train.cast_once
    """
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
        managed = [p for p in adapter.parameters() if shard > 1 or p.requires_grad]  # replicas ignore frozen ones
        ids = set(map(id, managed))
        blocks = [[p for p in block.parameters() if id(p) in ids] for block in adapter.blocks()]
        inside = {id(parameter) for block in blocks for parameter in block}
        copies = sum(parameter.nbytes for parameter in managed if id(parameter) not in inside)
        sizes = sorted(sum(p.numel() * 2 if half else p.nbytes for p in block) for block in blocks)
        copies += sum(sizes[-2:])
    return Held(weights, gradients, moments, ema, copies)


def host_loading(adapter: Adapter, recipe: Recipe, gpus: int, node: int, card: int = 0) -> int:
    """Count the bytes of host memory per node that loading weights on `gpus` GPUs takes, with `node` per node.

    Files are memory-mapped, and each process copies its shard of one parameter at a time to its GPU; the system can
    reclaim the file cache. A model without files is initialised as a whole on the host.
    """
    ranks, shard = min(node, gpus), predicted_shard_size(adapter, recipe, gpus, node, card)
    copied = max(part(parameter, shard) * parameter.itemsize for parameter in adapter.parameters())
    need = ranks * (copied + sum(buffer.nbytes for buffer in adapter.buffers()))
    if not published_files(recipe):
        need += sum(parameter.nbytes for parameter in adapter.parameters())
    return need


def host_moments(adapter: Adapter, recipe: Recipe, gpus: int, node: int, card: int = 0) -> int:
    """Count the bytes of host memory per node in which optim.offload keeps moments, with `node` GPUs per node."""
    if not recipe.optim.offload:
        return 0
    ranks, shard = min(node, gpus), predicted_shard_size(adapter, recipe, gpus, node, card)
    return ranks * sum(state_bytes(p, recipe.optim, shard) for p in adapter.parameters() if p.requires_grad)


def part(parameter: nn.Parameter, shard: int) -> int:
    """Count the elements of the largest of `shard` parts along the first dimension."""
    if parameter.ndim == 0:
        return 1
    rows, *row = parameter.shape
    return -(-rows // shard) * math.prod(row)
