"""The sentence of an error stands once on the terminal, whichever ranks have it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from reca.errors import print_once

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
