"""The sentence of an error stands once on the terminal, whichever ranks have it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reca import cli
from reca.errors import PeerFailed, lost_rank, print_once

ROOT = Path(__file__).parents[2]

RANKS = """
import logging, os, sys, time
from pathlib import Path
from reca.cli import _set_up_output
from reca.errors import print_once
_set_up_output()
log = logging.getLogger("reca")
for number in (1, 2, 2):
    log.warning("step %d skipped", number)
log.warning("disk of rank %s is slow", os.environ["RANK"])
log.info("going on")
rank, which = int(os.environ["RANK"]), sys.argv[1]

def meet(place):
    # torchrun ends the other rank as soon as one has left, so each stays until the other has said its part.
    Path(f"{sys.argv[0]}.{place}.{rank}").touch()
    while not Path(f"{sys.argv[0]}.{place}.{1 - rank}").exists():
        time.sleep(0.01)

meet("logged")
if which == "own":
    print_once(f"reca: disk {rank} is full")
    meet("told")
elif rank == 1:
    print_once("reca: rank 1 alone has a bad file")
else:
    time.sleep(60)
sys.stderr.flush()
os._exit(3)
"""


def launch(*command: str) -> str:
    path = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*torchrun, *command], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode != 0
    return done.stderr


@pytest.mark.parametrize(
    ("which", "sentences"),
    [
        ("own", ["reca: disk 0 is full", "reca: disk 1 is full"]),
        ("one", ["reca: rank 1 alone has a bad file"]),
    ],
)
def test_ranks_tell_an_error_once(which, sentences, tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    error = launch(str(script), which)
    for sentence in sentences:
        assert error.splitlines().count(sentence) == 1, error
    last = [line for line in error.splitlines() if line.strip(" =")][-1]  # torchrun's report, of the first to fail
    assert any(last == f"  traceback : {sentence}" for sentence in sentences), error
    assert error.count("step 1 skipped") == 1 and error.count("step 2 skipped") == 2, error
    assert "WARNING disk of rank 0 is slow" in error and "[rank 1] WARNING disk of rank 1 is slow" in error
    assert error.count("going on") == 1


def test_ranks_tell_a_mistake_in_a_recipe_once():
    error = launch("-m", "reca", "train", "show_o_tiny", "optim.lrr=1")
    told = [line for line in error.splitlines() if "did you mean optim.lr" in line]
    assert [line[:5] for line in told] == ["reca:", "  tra"], error  # ours, and the last line of torchrun's report


def test_an_error_is_told_where_ranks_cannot_reach_each_other(monkeypatch, capfd):
    """Once, without what torch prints of its attempts."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("reca.errors.HEAD_START", 0.1)
    print_once("reca: alone")
    assert capfd.readouterr().err == "reca: alone\n"


RAN = "WorkNCCL(SeqNum=7, OpType=ALLREDUCE, NumelIn=1, NumelOut=1, Timeout(ms)=600000) ran for 600081 milliseconds"
LOST = {  # as torch and NCCL word them
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:4711": "closed by",
    "[../gloo/transport/tcp/pair.cc:525] Read error [10.0.0.2]:4711: Connection reset by peer": "reset by peer",
    "[../gloo/transport/tcp/pair.cc:369] Write error [10.0.0.2]:4711: Broken pipe": "Broken pipe",
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.hpp:268, remote process exited or there was a "
    "network error, NCCL version 2.21.5\nncclRemoteError: A call failed possibly due to a network error or a remote "
    "process exiting prematurely.\nLast error:\nsocketProgressOpt: Call to recv from 10.0.0.2<33759> failed : "
    "Connection reset by peer": "remote process exited",
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, unhandled system error (run with "
    "NCCL_DEBUG=INFO for details), NCCL version 2.27.5\nncclSystemError: System call (e.g. socket, malloc) or external "
    "library call failed or device error.\nLast error:\nsocketProgress: Connection closed by remote peer "
    "node2<57859>": "closed by remote peer",
    "[3] is setting up NCCL communicator and retrieving ncclUniqueId from [0] via c10d key-value store by key '0', but "
    "store->get('0') got error: Failed to recv, got 0 bytes. Connection was likely closed.": "Failed to recv",
    "NCCL communicator was aborted on rank 2. Original reason for failure was: NCCL error: remote process exited or "
    "there was a network error, NCCL version 2.27.5": "remote process exited",
}  # fmt: skip
LATE = {
    f"NCCL communicator was aborted on rank 2.  Original reason for failure was: [Rank 2] Watchdog caught collective "
    f"operation timeout: {RAN} before timing out.": "in 600 s",
    "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv "
    "operation to complete": "in 1800 s",
}  # fmt: skip


@pytest.mark.parametrize(("text", "words"), LOST.items())
def test_a_lost_rank_is_recognised(text, words):
    said = lost_rank(torch.distributed.DistBackendError(text))
    assert said.startswith("another rank ended without reporting an error (") and words in said.partition("):")[0]


def test_a_lost_rank_is_the_last_line_below_the_traceback(capfd):
    lost, other = (RuntimeError(f"[/gloo/transport/tcp/pair.cc:1] {what}") for what in ("Broken pipe", "no address"))
    cli._report(lost)
    first, *_, last = capfd.readouterr().err.splitlines()
    assert first.startswith("RuntimeError: [/gloo") and last == f"reca: {lost_rank(lost)}"
    cli._report(other)
    assert "reca:" not in capfd.readouterr().err


PEERS = {"[10.0.0.2]:4711": "[10.0.0.3]:815", "10.0.0.2<33759>": "fe80::3%eth0<815>", "node2<57859>": "node3<815>",
         "[::1]:4711": "[fe80::3]:815"}  # fmt: skip


@pytest.mark.parametrize("peer", PEERS)
def test_ranks_that_lost_different_peers_print_one_report(peer, monkeypatch, capfd):
    """Of several ranks that survive another, each has its own connection to it."""
    store = torch.distributed.HashStore()
    monkeypatch.setattr("reca.errors._store", lambda: store)
    monkeypatch.setattr("reca.errors.time.sleep", lambda seconds: None)
    monkeypatch.setattr("reca.errors.HEAD_START", 0.01)
    monkeypatch.setenv("WORLD_SIZE", "3")
    reports = [
        f"Traceback: in step 3\nRuntimeError: Connection closed by peer {other}" for other in (PEERS[peer], peer)
    ]
    for rank, report in enumerate([*reports, f"Traceback: in step 4\nRuntimeError: closed by peer {peer}"]):
        monkeypatch.setenv("RANK", str(rank))
        print_once(report)
    printed = capfd.readouterr().err
    assert printed.count("step 3") == printed.count("step 4") == 1
    said = [lost_rank(RuntimeError(f"[/gloo/transport/tcp/pair.cc:1] Read error {p}: Broken pipe")) for p in PEERS]
    assert len(set(said)) == 1 and "Broken pipe" in said[0]


@pytest.mark.parametrize(("text", "words"), LATE.items())
def test_a_collective_that_timed_out_is_recognised(text, words):
    said = lost_rank(torch.distributed.DistBackendError(text))
    assert said.startswith("a collective did not complete") and words in said and "hangs or was killed" in said


@pytest.mark.parametrize(
    "error",
    [
        OSError("[Errno 104] Connection reset by peer"),  # of a download
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("NCCL error in: NCCLUtils.cpp:94, unhandled cuda error, NCCL version 2.27.5\nLast error:\n"
                     "Cuda failure 2 'out of memory'"),
        RuntimeError("NCCL error: invalid usage (run with NCCL_DEBUG=WARN for details)"),
    ],
)  # fmt: skip
def test_another_error_is_no_lost_rank(error):
    assert lost_rank(error) is None


@pytest.mark.parametrize(
    ("own", "machine", "failed", "times"),
    [(0, 2, 2, True), (0, 2, 1, False), (2, 2, 1, False), (1, 2, 2, False), (1, None, 0, False), (0, None, 1, False)],
)
def test_rank_0_says_what_failed_on_another_machine(monkeypatch, capsys, own, machine, failed, times):
    """The output of that machine may be elsewhere; in the one terminal of a machine it stands once."""
    monkeypatch.setattr("reca.errors.HEAD_START", -1)
    monkeypatch.setenv("RANK", str(own))
    if machine is None:
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    else:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(machine))
    cli._report(PeerFailed(failed, 4, "its disk is full"))
    assert capsys.readouterr().err == times * f"reca: rank {failed} failed: its disk is full\n"
