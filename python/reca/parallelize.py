"""Wrap a model for training: torch.compile, activation checkpointing, and sharding by FSDP2."""

import functools

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint

from reca import distributed
from reca.config import ParallelConfig, Recipe
from reca.models.base import Adapter


def parallelize(adapter: Adapter, recipe: Recipe, device: torch.device) -> None:
    """Compile, recompute and shard the blocks of a model, as the recipe asks.

    Compiled first: Dynamo does not look into activation checkpointing.
    """
    if recipe.train.compile:
        for block in adapter.blocks():
            block.forward = torch.compile(block.forward)
    if recipe.train.activation_checkpointing:
        checkpoint_activations(adapter)
    if dist.is_initialized():
        shard(adapter, recipe.parallel, device, recipe.train.precision)


def checkpoint_activations(adapter: Adapter) -> None:
    """Run the blocks again in the backward pass, and keep none of their activations."""
    for block in adapter.blocks():
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def shard(adapter: Adapter, config: ParallelConfig, device: torch.device, precision: str) -> None:
    """Shard the adapter by FSDP2 within groups of `config.shard` ranks, with replicas between them (HSDP)."""
    size = shard_size(config, distributed.world_size(), _ranks_per_node(device))
    replicas = distributed.world_size() // size
    if replicas == 1:
        mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    else:
        mesh = init_device_mesh(device.type, (replicas, size), mesh_dim_names=("replicate", "shard"))
    compute = torch.bfloat16 if precision == "bf16" else None
    blocks = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    for block in adapter.blocks():
        fully_shard(block, mesh=mesh, mp_policy=blocks)
    fully_shard(adapter, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
    for method in ("generate", "edit", "answer", "encode"):
        register_fsdp_forward_method(adapter, method)


def shard_size(config: ParallelConfig, ranks: int, node: int) -> int:
    """Return how many of `ranks` ranks share one copy of the weights. node: fewest ranks of any machine.

    By default those of one machine; all ranks where machines do not hold equally many.
    Raises ValueError for a `config.shard` that does not divide the ranks.
    """
    if config.shard is None:
        return node if ranks % node == 0 else ranks
    if ranks % config.shard:
        divisors = [str(size) for size in range(1, ranks + 1) if ranks % size == 0]
        raise ValueError(
            f"parallel.shard={config.shard} does not divide the {ranks} ranks of this run: set it to one of "
            f"{', '.join(divisors)}, or to null"
        )
    return config.shard


def _ranks_per_node(device: torch.device) -> int:
    """Return the fewest ranks of any machine, the same on every rank."""
    ranks = torch.tensor(distributed.local_world_size(), device=device)
    dist.all_reduce(ranks, dist.ReduceOp.MIN)
    return int(ranks)


def set_gradient_sync(adapter: nn.Module, on: bool) -> None:
    """Set whether the next backward pass reduces gradients; only the last micro-batch of a step needs to."""
    if isinstance(adapter, FSDPModule):
        adapter.set_requires_gradient_sync(on)
