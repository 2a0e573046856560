"""Four gloo ranks, the second on a machine of its own: launch_collectives.py FOLDER; the results of each go to stdout.

As a line of JSON for each rank. FOLDER: of files by which ranks see who was where.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from reca import distributed
from reca.launcher import is_main_process
from tests.driver.forks import exit_codes, fork_ranks

RANKS = 4
FOLDER = Path(sys.argv[1])


def failure(of: int | None, error: Exception) -> list[str]:
    """Type and text of what a rank raises where `of` raises an error, or all do for None; empty where none does."""
    try:
        with distributed.fail_together():
            if of in (None, distributed.rank()):
                raise error
    except Exception as raised:
        return [type(raised).__name__, str(raised)]
    return []


def waits(wait: Callable[[], None], name: str) -> bool:
    """Whether no rank is through before the last, which is late, is there."""
    there = FOLDER / name
    if distributed.rank() == RANKS - 1:
        time.sleep(0.3)
        there.touch()
    wait()
    return there.exists()


def groups(device: torch.device) -> list[list[int]]:
    """Ranks with which this one shares weights, and those that hold the same part: of 2 x 2, and of one replica."""
    both, one = distributed.mesh(device, 2, 2), distributed.mesh(device, 1, RANKS)
    found = [both.get_group("shard"), both.get_group("replicate"), one.get_group()]
    return [dist.get_process_group_ranks(group) for group in found]


def minutes(device: torch.device) -> list[float]:
    """Timeouts of all groups of training, and of one that is not."""
    both, backend = distributed.mesh(device, 2, 2), distributed.gloo_group()._get_backend(device)
    backends = [dist.group.WORLD._get_backend(device), *(g._get_backend(device) for g in both.get_all_groups())]
    return [found.options._timeout.total_seconds() / 60 for found in (*backends, backend)]


def results(rank: int) -> dict:
    socket.gethostname = lambda: "abaa"[rank]
    del os.environ["LOCAL_WORLD_SIZE"]  # as where no torchrun has started the ranks
    device = distributed.initialize(3)
    errors = (1, OSError("full")), (1, KeyError()), (None, KeyError()), (RANKS, KeyError())
    return {
        "rank": [distributed.rank(), distributed.world_size(), distributed.local_world_size()],
        "main": is_main_process(),
        "gathered": distributed.all_gather({"own": rank}),
        "sum": distributed.sum_over_ranks(torch.tensor([1.0, 10.0 * rank])).tolist(),
        "most": distributed.max_over_ranks([rank, -rank, 5]),
        "any": [distributed.any_rank(rank == number) for number in (1, RANKS)],
        "failed": [failure(of, error) for of, error in errors],
        "groups": groups(device),
        "waits": [waits(distributed.barrier, "barrier"), waits(lambda: distributed.set_timeout(2, device), "timeout")],
        "minutes": minutes(device),
    }


def again(port: int) -> list[list[int]]:
    """Groups of a second process group, in a script that has ended the first by itself."""
    dist.destroy_process_group()
    os.environ["MASTER_PORT"] = str(port)
    found = groups(distributed.initialize(3))
    distributed.shut_down()
    return found


def work(rank: int, write: int, port: int) -> None:
    found = results(rank) | {"again": again(port)}
    os.write(write, (json.dumps(found) + "\n").encode())  # in one piece, between those of other ranks


if __name__ == "__main__":
    torch.set_num_threads(1)
    read, write = os.pipe()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    codes = exit_codes(fork_ranks(RANKS, lambda rank: work(rank, write, port)))
    os.close(write)
    with os.fdopen(read) as lines:
        print(*sorted(lines, key=lambda line: json.loads(line)["rank"]), sep="", end="")
    sys.exit(max(map(abs, codes)))
