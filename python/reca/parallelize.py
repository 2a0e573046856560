"""Wrap a model for training: torch.compile, activation checkpointing, and replicas or shards by FSDP2."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from reca import compiled_blocks, distributed, float8, host_memory
from reca.config import ParallelConfig, Recipe
from reca.models import umm_package
from reca.models.base import Adapter
from reca.models.common.deferred_weights import DeferredWeights, deferring
from reca.recompute import checkpoint_activations

SHARE = 0.5  # of a GPU's memory that weights, gradients and moments may take for every GPU to hold them all


def load(recipe: Recipe, device: torch.device) -> tuple[Adapter, bool]:
    """Load a recipe's model, and tell whether its weights are still to come: `parallelize` reads them into shards.

    They are there at once on a single process without a GPU.
    """
    adapter = umm_package(recipe.umm).Adapter
    if device.type == "cpu" and not dist.is_initialized():
        return adapter.load(recipe.model, device), False
    with deferring():
        return adapter.load(recipe.model, torch.device("cpu")), True


def parallelize(adapter: Adapter, recipe: Recipe, device: torch.device, deferred: bool = False) -> None:
    """Round, compile, recompute and shard the blocks of a model, as the recipe asks.

    Compiled before activation checkpointing, which Dynamo does not look into. deferred: weights are still to come.
    """
    weights = DeferredWeights(adapter) if deferred else None
    if recipe.train.float8:
        float8.convert(adapter)
    compiled = compiled_blocks.wanted(recipe.train, device)
    if compiled:
        compiled_blocks.compile_blocks(adapter)
    checkpoint_activations(adapter, recipe.train, compiled)
    if dist.is_initialized():
        ranks, node = distributed.world_size(), _least(distributed.local_world_size(), device)
        fits = _least(replicas_fit(adapter, memory_per_rank(device)), device)
        shard(adapter, shard_size(recipe.parallel, ranks, node, bool(fits)), device, recipe.train.precision)
        adapter.reduces_every_micro_batch = recipe.parallel.reduce_every_micro_batch
    if weights is not None:
        weights.fill(adapter, device)


def shard(adapter: Adapter, size: int, device: torch.device, precision: str) -> None:
    """Give every rank its part of the parameters: one of `size`, with replicas between groups of `size` ranks.

    size = all ranks is FSDP2; fewer is HSDP; 1 is data parallelism with whole replicas. FSDP2 does all three, and not
    DistributedDataParallel the last: a step runs several tasks whose losses use different parameters, and reduces once,
    after the last of them. DDP would search every graph for unused parameters, see only calls of `forward`, and name
    parameters and checkpoints otherwise. With size 1 nothing is gathered; a block's trained weights are copied, to bf16
    in bf16, as autocast would cast them, and frozen weights are left alone.

    Gradients are reduced in fp32. A block is gathered while the one before it computes, in both directions.
    """
    mesh = distributed.mesh(device, distributed.world_size() // size, size)
    compute = torch.bfloat16 if precision == "bf16" else None
    reduce = None if precision == "fp64" else torch.float32
    left = {p for p in adapter.parameters() if not p.requires_grad} if size == 1 else set()
    for parameter in left:
        if not parameter.is_meta:
            parameter.data = parameter.data.to(device)
    blocks = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce)
    for block in adapter.blocks():
        fully_shard(block, mesh=mesh, mp_policy=blocks, ignored_params=left)
    rest = MixedPrecisionPolicy(reduce_dtype=reduce)
    fully_shard(adapter, mesh=mesh, mp_policy=rest, ignored_params=left)
    adapter.has_whole_replicas = size == 1
    for method in ("generate", "reconstruct", "edit", "answer", "encode"):
        register_fsdp_forward_method(adapter, method)


def shard_size(config: ParallelConfig, ranks: int, node: int, replicas_fit: bool = False) -> int:
    """Return how many of `ranks` ranks share one copy of the weights.

    node: fewest ranks of any machine. replicas_fit: every rank has room for a copy of its own.
    By default a rank has its own copy where they fit; else those of one machine share one; all ranks do where machines
    do not hold equally many.
    Raises ValueError for a `config.shard` that does not divide the ranks.
    """
    if config.shard is None:
        if config.strategy == "ddp" or (config.strategy == "auto" and replicas_fit):
            return 1
        return node if ranks % node == 0 else ranks
    if ranks % config.shard:
        divisors = [str(size) for size in range(1, ranks + 1) if ranks % size == 0]
        raise ValueError(
            f"parallel.shard={config.shard} does not divide the {ranks} ranks of this run: set it to one of "
            f"{', '.join(divisors)}, or to null"
        )
    return config.shard


def predicted_shard_size(adapter: nn.Module, recipe: Recipe, gpus: int, node: int, card: int) -> int:
    """Return how many of `gpus` GPUs of `card` bytes, `node` of them in a machine, would share one copy of the weights.

    Raises ValueError as `shard_size`.
    """
    return shard_size(recipe.parallel, gpus, min(node, gpus), replicas_fit(adapter, card)) if gpus > 1 else 1


def replicas_fit(adapter: nn.Module, memory: int) -> bool:
    """Tell whether weights, fp32 gradients and AdamW's moments take at most half of `memory` bytes.

    The rest is for activations and copies of weights.
    """
    state = sum(tensor.nbytes for tensor in (*adapter.parameters(), *adapter.buffers()))
    state += sum(p.numel() * (4 + 2 * p.itemsize) for p in adapter.parameters() if p.requires_grad)
    return state <= SHARE * memory


def memory_per_rank(device: torch.device) -> int:
    """Count the bytes of memory of this rank's GPU, or its part of this machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return host_memory.total() // distributed.local_world_size()


def _least(value: int, device: torch.device) -> int:
    """Return the least of all ranks' values, the same on every rank."""
    least = torch.tensor(int(value), device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return int(least)


def set_gradient_sync(adapter: Adapter, last: bool) -> None:
    """Set whether the next backward pass reduces gradients: the last of a step does, the others if they are told to."""
    if isinstance(adapter, FSDPModule):
        adapter.set_requires_gradient_sync(last or adapter.reduces_every_micro_batch)
