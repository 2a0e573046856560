"""Preparation of a model for training: float8, torch.compile, activation checkpointing, and FSDP2."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from reca import distributed
from reca.config.recipe import ParallelConfig, Recipe
from reca.hardware import host_memory
from reca.models import umm_package
from reca.models.base import Adapter
from reca.models.common.deferred_weights import DeferredWeights, deferring
from reca.options.fields import RecipeError
from reca.training import compiled_blocks, float8
from reca.training.recompute import checkpoint_activations

SHARE = 0.5  # fraction of a GPU's memory up to which weights, gradients and moments are replicated


def load(recipe: Recipe, device: torch.device) -> tuple[Adapter, bool]:
    """Load a recipe's model. Return it, and whether its weights are deferred: `parallelize` reads them into shards.

    Weights are loaded immediately in a single process without a GPU.
    """
    adapter = umm_package(recipe.umm).Adapter
    if device.type == "cpu" and not dist.is_initialized():
        return adapter.load(recipe.model, device), False
    with deferring():
        return adapter.load(recipe.model, torch.device("cpu")), True


def parallelize(adapter: Adapter, recipe: Recipe, device: torch.device, deferred: bool = False) -> None:
    """Apply float8, torch.compile, activation checkpointing and sharding to a model as the recipe requests.

    Blocks are compiled before checkpointing is applied, because Dynamo does not trace into it. deferred: as returned by
    `load`.
    Raises RecipeError for a model that an earlier run of this process has sharded, besides what these raise.
    """
    with distributed.fail_together():
        if isinstance(adapter, FSDPModule):
            raise RecipeError(
                "the model is sharded over the processes of an earlier run, which cannot be undone: pass another, or "
                "none and that run as train.init_from"
            )
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
        size = shard_size(recipe.parallel, ranks, node, bool(fits))
        distributed.mesh(device, ranks // size, size)  # before what can fail, because all ranks create it together
        with distributed.fail_together():
            shard(adapter, size, device, recipe.train.precision)
        distributed.set_timeout(recipe.parallel.timeout_minutes, device)  # also of the mesh
        adapter.reduces_every_micro_batch = recipe.parallel.reduce_every_micro_batch
    if weights is not None:
        with distributed.fail_together():
            weights.read(adapter, device)
        weights.receive(adapter)


def shard(adapter: Adapter, size: int, device: torch.device, precision: str) -> None:
    """Shard parameters within groups of `size` ranks and replicate them between groups, by FSDP2.

    size equal to the world size is full sharding, a smaller size is HSDP, and 1 is data parallelism with whole
    replicas. FSDP2 implements the latter as well, instead of DistributedDataParallel: a step runs several tasks whose
    losses use different parameters, and reduces once, after the last task. DDP would search every graph for unused
    parameters, would hook calls of `forward` only, and would change the names of parameters and checkpoints. With size
    1 nothing is gathered: a block's trained weights are copied (cast to bf16 in a bf16 run, as by autocast), frozen
    ones are not.

    Gradients are reduced in fp32 (fp64 in an fp64 run). A block is prefetched while the previous one computes, in both
    passes.
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
    """Return the number of ranks that share one copy of the weights.

    node: smallest number of ranks on a machine. replicas_fit: every rank has memory for its own copy.
    By default every rank has a copy if they fit. Otherwise the ranks of a machine share one, or all ranks if `node`
    does not divide their number.
    Raises ValueError if `config.shard` does not divide the number of ranks.
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
    """Tell whether weights, fp32 gradients and AdamW's moments use at most SHARE of `memory` bytes.

    The rest is reserved for activations and copies of weights.
    """
    state = sum(tensor.nbytes for tensor in (*adapter.parameters(), *adapter.buffers()))
    state += sum(p.numel() * (4 + 2 * p.itemsize) for p in adapter.parameters() if p.requires_grad)
    return state <= SHARE * memory


def memory_per_rank(device: torch.device) -> int:
    """Return the memory in bytes of this rank's GPU, or its share of the machine's memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return host_memory.total() // distributed.local_world_size()


def _least(value: int, device: torch.device) -> int:
    """Return the minimum over all ranks."""
    least = torch.tensor(int(value), device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return int(least)


def set_gradient_sync(adapter: Adapter, last: bool) -> None:
    """Set whether the next backward pass reduces gradients: the last pass of a step, or all if the adapter says so."""
    if isinstance(adapter, FSDPModule):
        adapter.set_requires_gradient_sync(last or adapter.reduces_every_micro_batch)
