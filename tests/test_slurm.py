"""examples/slurm/train.sbatch, on stand-ins of srun and scontrol."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from reca.cli import _parse
from reca.runs.folder import RunFolder
from reca.runs.status import FIELDS

SCRIPT = Path(__file__).parents[1] / "examples/slurm/train.sbatch"

# Records its arguments and waits for `signals` signals; then leaves the status of a run, and ends as torchrun does.
# srun passes SIGUSR1 on, and on SIGTERM kills its tasks at once. SIGUSR2 is SLURM's own SIGTERM to the tasks.
SRUN = """#!{python} -S
import json, os, pathlib, signal, sys
here, came = pathlib.Path({here!r}), []
todo = json.loads((here / "todo.json").read_text())
for number, name in ((signal.SIGUSR1, "SIGUSR1"), (signal.SIGUSR2, "SIGTERM")):
    signal.signal(number, lambda number, _, name=name: came.append(name))
signal.signal(signal.SIGTERM, lambda *_: os._exit(137))
(here / "srun.pid").write_text(str(os.getpid()))
(here / "started").write_text("\\n".join(sys.argv[1:]))
while len(came) < todo["signals"]:
    signal.pause()
(here / "signals").write_text(" ".join(came))
if todo["status"]:
    (here / "run").mkdir(exist_ok=True)
    (here / "run/status.json").write_text(json.dumps(todo["status"], indent=1))
sys.exit(0 if (todo["status"] or {{}}).get("state") == "finished" else 1)
"""
SCONTROL = """#!/bin/sh
case $1 in
    show) echo "$3" | tr , '\\n' ;;
    requeue) echo "$2" > {here}/requeued ;;
esac
"""


def status(state: str, step: int, exit_code: int | None) -> dict:
    return dict.fromkeys(FIELDS) | {"state": state, "step": step, "exit_code": exit_code, "host": "", "pid": 1}


@pytest.fixture
def cluster(tmp_path):
    """A folder with the stand-ins, and the environment of a job on two nodes."""
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        path = tmp_path / "bin" / name
        path.write_text(text.format(python=sys.executable, here=str(tmp_path)))
        path.chmod(0o755)
    return tmp_path


def job(cluster: Path, ends_as: dict | None, signals: tuple = (), before: dict | None = None) -> tuple[int, bool]:
    """Run the script as one job. Returns its exit code, and whether it was requeued."""
    run = cluster / "run"
    if before:
        run.mkdir(exist_ok=True)
        (run / "status.json").write_text(json.dumps(before, indent=1))
    (cluster / "todo.json").write_text(json.dumps({"status": ends_as, "signals": len(signals)}))
    # The batch host has neither reca nor its Python: they may be in a container.
    environment = os.environ | {"PATH": f"{cluster / 'bin'}:/usr/bin:/bin", "SLURM_JOB_ID": "1234567"}
    environment |= {"SLURM_JOB_NODELIST": "node3,node4", "SLURM_JOB_NUM_NODES": "2"}
    process = subprocess.Popen(
        [SCRIPT, "show_o_512", f"run_dir={run}"], env=environment, stdout=subprocess.PIPE, text=True
    )
    for number in signals:
        deadline = time.monotonic() + 30
        while not (cluster / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(number)
        if number == signal.SIGTERM:
            time.sleep(0.2)  # SLURM signals the script and the tasks at once: the script may be the first
            with contextlib.suppress(ProcessLookupError):
                os.kill(int((cluster / "srun.pid").read_text()), signal.SIGUSR2)
    output, _ = process.communicate(timeout=30)
    assert f"{run}: state " in output
    return process.returncode, (cluster / "requeued").exists()


def test_the_time_limit_requeues_until_the_run_is_finished(cluster):
    assert job(cluster, status("interrupted", 40, 75), (signal.SIGUSR1,)) == (0, True)
    assert (cluster / "signals").read_text() == "SIGUSR1" and (cluster / "requeued").read_text() == "1234567\n"
    (cluster / "requeued").unlink()
    assert job(cluster, status("finished", 100, 0)) == (0, False)


@pytest.mark.parametrize(
    ("before", "after", "code", "requeued"),
    [
        (None, status("finished", 100, 0), 0, False),
        (None, status("failed", 0, 3), 3, False),  # a recipe error
        (status("interrupted", 40, 75), status("failed", 60, 5), 5, False),  # NaN, however far it came
        (status("interrupted", 40, 75), status("failed", 60, 6), 6, False),  # a full disk
        (status("interrupted", 40, 75), status("failed", 60, 8), 8, False),  # stopped by an alarm, which saves first
        (status("interrupted", 40, 75), status("running", 60, None), 0, True),  # killed without a word: a node is gone
        (status("interrupted", 40, 75), status("failed", 60, 1), 0, True),  # NCCL or a GPU broke
        (status("interrupted", 40, 75), status("failed", 40, 1), 1, False),  # again at the same step: a bug
        (status("interrupted", 40, 75), status("running", 40, None), 1, False),  # killed again before a checkpoint
        (None, None, 1, False),  # nothing began
    ],
)
def test_what_else_a_start_ends_as(cluster, before, after, code, requeued):
    assert job(cluster, after, before=before) == (code, requeued)


def test_the_time_limit_before_the_first_checkpoint(cluster):
    assert job(cluster, status("failed", 0, 75), (signal.SIGUSR1,)) == (0, True)


def test_a_recipe_error_at_the_time_limit(cluster):
    assert job(cluster, status("failed", 0, 3), (signal.SIGUSR1,)) == (3, False)


def test_a_cancelled_job_is_not_requeued(cluster):
    assert job(cluster, status("interrupted", 40, 75), (signal.SIGTERM,)) == (75, False)
    assert (cluster / "signals").read_text() == "SIGTERM"


def test_the_run_folder_is_needed(cluster):
    done = subprocess.run([SCRIPT, "show_o_512"], capture_output=True, text=True, env=os.environ)
    assert done.returncode != 0 and "give run_dir=FOLDER" in done.stderr


def test_the_command_is_one(cluster):
    """torchrun and reca know every option that the script gives them."""
    job(cluster, status("finished", 100, 0))
    started = (cluster / "started").read_text().splitlines()
    assert started[:2] == ["--kill-on-bad-exit=1", "torchrun"]
    options = get_args_parser().parse_args(started[2:])
    assert (options.nnodes, options.nproc_per_node, options.rdzv_endpoint) == ("2", "gpu", "node3:24567")
    assert options.training_script == "reca" and options.module
    assert set(options.signals_to_handle.split(",")) >= {"SIGTERM", "SIGUSR1"}
    assert _parse(options.training_script_args).recipe == "show_o_512"


def test_the_timeouts_leave_each_other_room():
    text = SCRIPT.read_text()
    ahead = int(re.search(r"--signal=B:USR1@(\d+)", text)[1])
    assert int(re.search(r"--shutdown-timeout (\d+)", text)[1]) < ahead
    assert subprocess.run(["bash", "-n", SCRIPT]).returncode == 0


@pytest.mark.parametrize(
    ("ends_as", "told"), [("finished", "finished, exit code 0"), ("running", "running, exit code none")]
)
def test_the_script_reads_what_a_run_writes(ends_as, told, cluster):
    (cluster / "run").mkdir()
    folder = RunFolder(cluster / "run", 9)
    folder.record_checkpoint(cluster / "run/checkpoints/000007")
    folder.write_status(ends_as, 0 if ends_as == "finished" else None, 'a "state": "failed",\n "exit_code": 3,')
    folder.close()
    (cluster / "todo.json").write_text(json.dumps({"status": None, "signals": 0}))
    environment = os.environ | {"PATH": f"{cluster / 'bin'}:/usr/bin:/bin", "SLURM_JOB_ID": "1", "HOME": str(cluster)}
    environment |= {"SLURM_JOB_NODELIST": "node3", "SLURM_JOB_NUM_NODES": "1"}
    done = subprocess.run([SCRIPT, "show_o_512", "run_dir=~/run"], env=environment, capture_output=True, text=True)
    assert f"{cluster}/run: state {told}, step 7 (was 7)" in done.stdout and not done.stderr
    assert {shlex.split(use)[1] for use in re.findall(r"\$\((field \w+)\)", SCRIPT.read_text())} <= set(FIELDS)
