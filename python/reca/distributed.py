"""The process group of a run and its collectives, which without a process group return the local value."""

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from reca import exits
from reca.errors import PeerFailed, first_line
from reca.launcher import is_launched, number
from reca.options.fields import RecipeError

log = logging.getLogger("reca")

LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # set by torchrun for every process
# Number of the processes that a launcher has started: any, srun, and mpirun of Open MPI and of MPICH.
STARTED = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
HOURS = 24  # that ranks wait for one that works alone, such as generating images or asking a judge


def initialize(timeout_minutes: int) -> torch.device:
    """Join the launcher's process group, if there is one, and return the device of this rank.

    The launcher, such as torchrun, must set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
    timeout_minutes: timeout of collectives, until `set_timeout`; also in a process group that exists already.
    Raises RecipeError if this machine runs more processes than it has GPUs, if only some of these are set, or if not
    all join within the timeout.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", _gpu(torch.cuda.device_count()))
        torch.cuda.set_device(device)
    timeout = timedelta(minutes=timeout_minutes)
    _forget_ended()
    if dist.is_initialized():
        set_timeout(timeout_minutes, device)
    elif is_launched():
        gpu = device if device.type == "cuda" else None  # given, so NCCL connects now and knows each rank's GPU
        try:
            if number("RANK", -1) not in range(number("WORLD_SIZE", 0)):  # it would wait until the timeout
                raise ValueError("RANK must be from 0 to below WORLD_SIZE, which counts the processes of all machines")
            dist.init_process_group("nccl" if gpu else "gloo", timeout=timeout, device_id=gpu)
        except (dist.DistStoreError, dist.DistNetworkError) as error:
            raise RecipeError(_not_joined(error)) from error
        except ValueError as error:  # of a variable
            found = ", ".join(f"{name}={os.environ.get(name, '(not set)')}" for name in LAUNCHER)
            raise RecipeError(
                f"RANK is set, so this process joins a group, but {found}: start it with torchrun, which sets all "
                f"four, or unset RANK to train in one process ({first_line(error)})"
            ) from error
    else:
        _warn_if_others_were_started()
    if dist.is_initialized():
        _gloo("threads", timeout)
        if device.type == "cuda":
            _gloo("host", timeout)
    if dist.is_initialized() and not number("LOCAL_WORLD_SIZE", 0):
        hosts = all_gather(socket.gethostname())
        os.environ["LOCAL_WORLD_SIZE"] = str(hosts.count(hosts[rank()]))
    return device


def _warn_if_others_were_started() -> None:
    """Warn of a launcher that starts several processes and does not tell them that they are one run."""
    name = next((name for name in STARTED if os.environ.get(name, "1") not in ("", "1")), None)
    if name and "TORCHELASTIC_RUN_ID" not in os.environ:  # a subprocess of a rank has the variables of its launcher
        log.warning(
            "%s=%s, but RANK is not set: this process trains alone. To train with all of them start torchrun, once per "
            "machine, or set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in each", name, os.environ[name],
        )  # fmt: skip


def _not_joined(error: Exception) -> str:
    rank, size, address, port = map(os.environ.get, LAUNCHER)
    return (
        f"rank {rank} could not join the {size} processes of this run at {address}:{port} ({first_line(error)}). One "
        "that failed earlier has printed why. Otherwise check that all were started, with the address of the machine "
        "of rank 0 (MASTER_ADDR) and a port that is free and reachable there (MASTER_PORT)"
    )


def _gpu(visible: int) -> int:
    """Choose the GPU of this process among the visible ones, by local rank."""
    node = number("LOCAL_WORLD_SIZE", 1)
    alone = visible == 1 and "TORCHELASTIC_RUN_ID" not in os.environ  # under torchrun all processes see the same GPUs
    if node > visible and not alone:
        raise RecipeError(
            f"{node} processes on a machine with {visible} GPUs: start as many as there are GPUs (torchrun "
            "--nproc-per-node), or make more of them visible (CUDA_VISIBLE_DEVICES)"
        )
    names = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "RANK")
    return next((own for name in names if (own := number(name, -1)) >= 0), 0) % visible


# By the training group they are of: a script may end it and join another, in which a mesh would find groups of its own
# by names that are used again.
_meshes: dict[tuple[Any, ...], DeviceMesh] = {}


def mesh(device: torch.device, replicas: int, size: int) -> DeviceMesh:
    """Return the mesh of `replicas` groups of `size` adjacent ranks; with one replica it has one dimension."""
    key = dist.group.WORLD, device.type, replicas, size
    if key not in _meshes:
        shape, names = ((replicas, size), ("replicate", "shard")) if replicas > 1 else ((size,), ("shard",))
        _meshes[key] = init_device_mesh(device.type, shape, mesh_dim_names=names)
    return _meshes[key]


def set_timeout(minutes: int, device: torch.device) -> None:
    """Set the timeout of training collectives from now on. All ranks must call it.

    The first step includes compilation, NCCL's initialisation and reads of uncached files, so it needs a longer timeout
    than later steps. torch gives the groups of a new mesh a timeout of its own. Groups such as those of checkpoints and
    of `waiting_group` keep theirs.
    """
    if not dist.is_initialized():
        return
    dist.barrier()  # finishes all collectives that began with the old timeout
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    groups = [
        dist.group.WORLD,
        *(group for (_, use), group in _groups.items() if use == "host"),
        *(group for mesh in _meshes.values() for group in mesh.get_all_groups()),
    ]
    set_group_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout  # public from torch 2.15
    for group in groups:
        set_group_timeout(timedelta(minutes=minutes), group)


# Gloo groups by training group and use. "host": host-side collectives of the training thread, if training uses NCCL.
_groups: dict[tuple[Any, ...], dist.ProcessGroup] = {}


def _gloo(use: str, timeout: timedelta) -> dist.ProcessGroup:
    """Return the gloo group of all ranks for one use. The first call creates it, so all ranks must make that call."""
    key = dist.group.WORLD, use
    if key not in _groups:
        _groups[key] = dist.new_group(backend="gloo", timeout=timeout)
    return _groups[key]


def gloo_group() -> dist.ProcessGroup | None:
    """Return the gloo group of all ranks for collectives of a thread other than the training thread.

    None without a process group. Two threads that use the same group can deadlock.
    """
    return _groups.get((dist.group.WORLD, "threads")) if dist.is_initialized() else None


def waiting_group() -> dist.ProcessGroup | None:
    """Return the gloo group of all ranks in which they can wait up to HOURS for one that works alone.

    The first call creates it, so all ranks must make that call. None without a process group.
    """
    return _gloo("waiting", timedelta(hours=HOURS)) if dist.is_initialized() else None


def shut_down() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
    _forget_ended()


def _forget_ended() -> None:
    """Drop meshes and groups of training groups that have ended."""
    for key in [*_meshes, *_groups]:
        if key[0] is not dist.group.WORLD:
            _meshes.pop(key, None)
            _groups.pop(key, None)


def is_joined() -> bool:
    """Tell whether this process has joined the process group of its run."""
    return dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_world_size() -> int:
    """Count the ranks on this machine."""
    return number("LOCAL_WORLD_SIZE", world_size())


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def fail_together(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Run the body on every rank and wait for all of them: if it raises on any rank, all others raise PeerFailed.

    group: of all ranks; None: the training group.
    """
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    failures = all_gather(None if error is None else (exits.code_of(error), str(error) or type(error).__name__), group)
    if error is not None:
        raise error
    for rank, failure in enumerate(failures):
        if failure is not None:
            raise PeerFailed(rank, *failure)


def all_gather(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return the values of all ranks, ordered by rank, on every rank.

    value: any picklable object. group: of all ranks; None: the training group.
    """
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group)
    return values


def sum_over_ranks(value: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def max_over_ranks(numbers: list[int]) -> list[int]:
    """Return the elementwise maximum over all ranks. Does not synchronise with the device."""
    if not dist.is_initialized():
        return numbers
    found = torch.tensor(numbers)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=_groups.get((dist.group.WORLD, "host")))
    return found.tolist()


def any_rank(flag: bool) -> bool:
    """Tell whether the flag is set on any rank. Does not synchronise with the device."""
    return bool(max_over_ranks([int(flag)])[0])
