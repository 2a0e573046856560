"""Three gloo ranks, the second on a machine of its own: launch_collectives.py; what each is told is printed as JSON."""

import json
import os
import socket
import sys

import torch

from reca import distributed
from tests.driver.forks import exit_codes, fork_ranks

RANKS = 3


def failure(of: int | None, error: Exception) -> list[str]:
    """Type and text of what a rank raises where `of` raises an error, or all do for None; empty where none does."""
    try:
        with distributed.fail_together():
            if of in (None, distributed.rank()):
                raise error
    except Exception as raised:
        return [type(raised).__name__, str(raised)]
    return []


def told(rank: int) -> dict:
    socket.gethostname = lambda: "aba"[rank]
    del os.environ["LOCAL_WORLD_SIZE"]  # as where no torchrun has started the ranks
    distributed.initialize(1)
    return {
        "rank": [distributed.rank(), distributed.world_size(), distributed.local_world_size()],
        "main": distributed.is_main_process(),
        "gathered": distributed.all_gather({"own": rank}),
        "sum": distributed.sum_over_ranks(torch.tensor([1.0, 10.0 * rank])).tolist(),
        "most": distributed.max_over_ranks([rank, -rank, 5]),
        "any": [distributed.any_rank(rank == number) for number in (1, RANKS)],
        "failed": [
            failure(of, error)
            for of, error in ((1, OSError("full")), (1, KeyError()), (None, KeyError()), (RANKS, KeyError()))
        ],
    }


def work(rank: int, write: int) -> None:
    os.write(write, (json.dumps(told(rank)) + "\n").encode())  # in one piece, between those of other ranks
    distributed.shut_down()


if __name__ == "__main__":
    torch.set_num_threads(1)
    read, write = os.pipe()
    codes = exit_codes(fork_ranks(RANKS, lambda rank: work(rank, write)))
    os.close(write)
    with os.fdopen(read) as lines:
        print(*sorted(lines, key=lambda line: json.loads(line)["rank"]), sep="", end="")
    sys.exit(max(map(abs, codes)))
