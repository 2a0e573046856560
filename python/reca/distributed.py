"""Ranks, meshes and sharding: torchrun + FSDP2, and nothing where there is one process."""

import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from reca import exits
from reca.config import ParallelConfig, RecipeError
from reca.models.base import Adapter


def start(config: ParallelConfig) -> torch.device:
    """Join the process group that torchrun prepared, if any. Returns the device of this rank.

    Other launchers will do that set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
    Raises RecipeError for more processes on this machine than it has GPUs.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", _gpu(torch.cuda.device_count()))
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=config.timeout_minutes)
        )
    if dist.is_initialized() and "LOCAL_WORLD_SIZE" not in os.environ:
        hosts = gather(socket.gethostname())
        os.environ["LOCAL_WORLD_SIZE"] = str(hosts.count(hosts[rank()]))
    return device


def _gpu(visible: int) -> int:
    """Choose the GPU of this process among those that it sees: by its number here, or the only one it was given."""
    node = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    own = visible == 1 and "TORCHELASTIC_RUN_ID" not in os.environ  # torchrun shows the same GPUs to all processes
    if node > visible and not own:
        raise RecipeError(
            f"{node} processes on a machine with {visible} GPUs: start as many as there are GPUs (torchrun "
            "--nproc-per-node), or make more of them visible (CUDA_VISIBLE_DEVICES)"
        )
    names = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "RANK")
    return next((int(os.environ[name]) for name in names if name in os.environ), 0) % visible


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(code: int) -> None:
    """End the process here if torchrun started it.

    On a busy machine a rank that had finished was seen to abort while the interpreter shut down (torch 2.13, gloo:
    "terminate called without an active exception"), which torchrun reports as a failed run.
    """
    if "RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def speaks() -> bool:
    """Tell whether this process is the one of its run that talks to the user, joined to the others or not."""
    return os.environ.get("RANK", "0") == "0"


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def node() -> int:
    """Count the ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world()))


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


class PeerFailed(RuntimeError):
    """Another rank has failed, and prints the reason itself."""

    def __init__(self, rank: int, exit_code: int, reason: str):
        super().__init__(f"rank {rank} failed: {reason}")
        self.exit_code, self.reason = exit_code, reason


@contextlib.contextmanager
def fail_together() -> Iterator[None]:
    """Run the body on every rank and wait for all of them: where it raises on any rank, all others raise PeerFailed."""
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    failures = gather(None if error is None else (exits.code_of(error), str(error) or type(error).__name__))
    if error is not None:
        raise error
    for rank, failure in enumerate(failures):
        if failure is not None:
            raise PeerFailed(rank, *failure)


def gather(value: Any) -> list[Any]:
    """Return what every rank holds, in the order of ranks, on every rank. value: anything that pickles."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def sum_over_ranks(value: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def any_rank(flag: bool, device: torch.device) -> bool:
    """Tell whether the flag is up on any rank; every rank gets the same answer."""
    if not dist.is_initialized():
        return flag
    return bool(sum_over_ranks(torch.tensor(float(flag), device=device)))


def shard_size(config: ParallelConfig, ranks: int, node: int) -> int:
    """Count the ranks that share one copy of the weights, of `ranks` with at least `node` on each machine.

    By default those of one machine; all ranks where machines do not hold equally many.
    Raises ValueError for a `config.shard` that does not divide the ranks.
    """
    if config.shard is None:
        return node if ranks % node == 0 else ranks
    if ranks % config.shard:
        fitting = [str(size) for size in range(1, ranks + 1) if ranks % size == 0]
        raise ValueError(
            f"parallel.shard={config.shard} does not divide the {ranks} ranks of this run: set it to one of "
            f"{', '.join(fitting)}, or to null"
        )
    return config.shard


def shard(adapter: Adapter, config: ParallelConfig, device: torch.device, precision: str) -> nn.Module:
    """Shard the adapter over the ranks: FSDP2 inside groups of `config.shard`, replicas between them (HSDP)."""
    if not dist.is_initialized():
        return adapter
    size = shard_size(config, world(), _ranks_per_node(device))
    if size == world():
        mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    else:
        mesh = init_device_mesh(device.type, (world() // size, size), mesh_dim_names=("replicate", "shard"))
    compute = torch.bfloat16 if precision == "bf16" else None
    blocks = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    for block in adapter.blocks():
        fully_shard(block, mesh=mesh, mp_policy=blocks)
    fully_shard(adapter, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
    for method in ("generate", "edit", "answer", "encode"):
        register_fsdp_forward_method(adapter, method)
    return adapter


def _ranks_per_node(device: torch.device) -> int:
    """The fewest of any machine, so that every rank says the same."""
    own = torch.tensor(node(), device=device)
    dist.all_reduce(own, dist.ReduceOp.MIN)
    return int(own)


def sync_gradients(adapter: nn.Module, on: bool) -> None:
    """Set whether the next backward reduces gradients; only the last micro-batch of an update needs to."""
    if dist.is_initialized():
        adapter.set_requires_gradient_sync(on)
