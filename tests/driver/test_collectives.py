"""What ranks tell each other, and what one process tells itself."""

import json
import subprocess
import sys

import pytest
import torch

from reca import distributed
from tests.driver.test_distributed import ROOT, environment


@pytest.fixture(scope="module")
def ranks() -> list[dict]:
    """What each of three ranks was told; ranks 0 and 2 are on one machine."""
    command = [sys.executable, str(ROOT / "tests/driver/launch_collectives.py")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_ranks_are_told_the_same_in_the_same_order(ranks):
    for told in ranks:
        assert told["gathered"] == [{"own": 0}, {"own": 1}, {"own": 2}]
        assert told["sum"] == [3, 30] and told["most"] == [2, 0, 5] and told["any"] == [True, False]


def test_ranks_count_those_of_their_machine(ranks):
    """Where no launcher says it; memory of the machine is shared among them."""
    assert [told["rank"] for told in ranks] == [[0, 3, 2], [1, 3, 1], [2, 3, 2]]
    assert [told["main"] for told in ranks] == [True, False, False]


def test_an_error_of_one_rank_is_one_of_all(ranks):
    """That of a rank's own comes before that of others."""
    one, wordless, own, none = zip(*(told["failed"] for told in ranks), strict=True)
    for found, kind, reason in ((one, "OSError", "full"), (wordless, "KeyError", "KeyError")):
        assert [name for name, _ in found] == ["PeerFailed", kind, "PeerFailed"]
        assert all("rank 1" in text and reason in text for _, text in found[::2])
    assert list(own) == [["KeyError", ""]] * 3 and list(none) == [[]] * 3


def test_one_process_is_all_ranks(monkeypatch):
    for name in ("RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.is_main_process() and not distributed.is_joined()
    assert [distributed.rank(), distributed.world_size(), distributed.local_world_size()] == [0, 1, 1]
    assert distributed.all_gather("own") == ["own"] and distributed.max_over_ranks([3, 1]) == [3, 1]
    assert distributed.sum_over_ranks(torch.ones(2)).tolist() == [1, 1]
    assert distributed.any_rank(True) and not distributed.any_rank(False)
    assert distributed.gloo_group() is None and distributed.waiting_group() is None
    distributed.barrier()
    with pytest.raises(OSError, match="full"), distributed.fail_together():
        raise OSError(28, "full")
