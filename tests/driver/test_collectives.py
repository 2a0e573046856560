"""What ranks tell each other, and what one process tells itself."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from reca import distributed
from reca.launcher import is_main_process
from tests.driver.test_distributed import ROOT, environment


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """The results of each of four ranks; rank 1 is on another machine than the others."""
    command = [sys.executable, str(ROOT / "tests/driver/launch_collectives.py"), str(tmp_path_factory.mktemp("ranks"))]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_ranks_are_told_the_same_in_the_same_order(ranks):
    for found in ranks:
        assert found["gathered"] == [{"own": number} for number in range(4)]
        assert found["sum"] == [4, 60] and found["most"] == [3, 0, 5] and found["any"] == [True, False]


def test_ranks_count_those_of_their_machine(ranks):
    """Where no launcher says it; memory of the machine is shared among them."""
    assert [found["rank"] for found in ranks] == [[0, 4, 3], [1, 4, 1], [2, 4, 3], [3, 4, 3]]
    assert [found["main"] for found in ranks] == [True, False, False, False]


def test_an_error_of_one_rank_is_one_of_all(ranks):
    """That of a rank's own comes before that of others."""
    one, wordless, own, none = zip(*(found["failed"] for found in ranks), strict=True)
    for found, kind, reason in ((one, "OSError", "full"), (wordless, "KeyError", "KeyError")):
        assert [name for name, _ in found] == ["PeerFailed", kind, "PeerFailed", "PeerFailed"]
        assert all("rank 1" in text and reason in text for name, text in found if name != kind)
    assert list(own) == [["KeyError", ""]] * 4 and list(none) == [[]] * 4


@pytest.mark.parametrize("group", ["groups", "again"])
def test_adjacent_ranks_share_weights(ranks, group):
    """Two replicas of two shards; also in a second process group, where names of groups come again."""
    everyone = [0, 1, 2, 3]
    assert [found[group] for found in ranks] == [
        [[0, 1], [0, 2], everyone], [[0, 1], [1, 3], everyone],
        [[2, 3], [0, 2], everyone], [[2, 3], [1, 3], everyone],
    ]  # fmt: skip


def test_a_new_timeout_is_that_of_all_groups_of_training(ranks):
    """From when the last rank is there, which may still do what the old one was for."""
    assert [found["waits"] for found in ranks] == [[True, True]] * 4
    assert [found["minutes"] for found in ranks] == [[2, 2, 2, 3]] * 4


def test_one_process_is_all_ranks(monkeypatch):
    for name in ("RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    distributed.initialize(1)
    assert is_main_process() and not distributed.is_joined() and "LOCAL_WORLD_SIZE" not in os.environ
    assert [distributed.rank(), distributed.world_size(), distributed.local_world_size()] == [0, 1, 1]
    assert distributed.all_gather("own") == ["own"] and distributed.max_over_ranks([3, 1]) == [3, 1]
    assert distributed.sum_over_ranks(torch.ones(2)).tolist() == [1, 1]
    assert distributed.any_rank(True) and not distributed.any_rank(False)
    assert distributed.gloo_group() is None and distributed.waiting_group() is None
    distributed.barrier()
    with pytest.raises(OSError, match="full"), distributed.fail_together():
        raise OSError(28, "full")


def test_groups_of_the_host_are_of_gloo_whatever_training_uses():
    dist.init_process_group("fake", rank=0, world_size=1, store=dist.HashStore())
    try:
        assert dist.get_backend() == "fake" and dist.get_backend(distributed.waiting_group()) == "gloo"
    finally:
        distributed.shut_down()
