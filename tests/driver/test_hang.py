"""A run that makes no progress says who waits for whom; other ranks than 0 print nothing."""

import contextlib
import ctypes
import json
import os
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from reca.processes import hang
from reca.processes.hang import HangWatch, numbers, summary
from reca.trainer import Trainer
from tests.driver.toy import ToyAdapter, run_toy

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    """The folder of a run of two ranks, of which rank 1 sleeps in step 3."""
    folder = tmp_path_factory.mktemp("ranks")
    path = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, str(ROOT / "tests/driver/launch_long_runs.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr + (folder / "printed_0").read_text() + (folder / "printed_1").read_text()
    return folder


def test_the_log_says_who_waits_for_whom(two_ranks):
    said = (two_ranks / "printed_0").read_text()
    (line,) = [line for line in said.splitlines() if "step 3 has made no progress" in line]
    assert "WARNING step 3 has made no progress" in line and "rank 1 has been in training of step 3 for" in line
    assert "at overslept (launch_long_runs.py:" in line and ", called by _run (trainer.py:" in line
    assert "ranks waiting for others: 0 (in all_reduce at sum_over_ranks (distributed.py:" in line
    assert line.endswith(f"Stacks of all ranks are in {two_ranks}/run/hang")
    assert "step 3: training ended after" in said


def test_every_rank_writes_its_stacks_and_collectives(two_ranks):
    folder = two_ranks / "run/hang"
    assert "in all_reduce" in (folder / "rank_0.txt").read_text()
    asleep = (folder / "rank_1.txt").read_text()
    assert "rank 1, step 3: training for" in asleep and "in overslept" in asleep
    for rank in range(2):
        recorded = pickle.loads((folder / f"collectives_{rank}").read_bytes())
        assert any("all_reduce" in entry["profiling_name"] for entry in recorded["entries"])
    assert not (folder / hang.REQUEST).exists()


@pytest.mark.parametrize("unwritable", [False, True])
def test_a_phase_that_ends_while_it_is_reported_leaves_no_request(unwritable, tmp_path, monkeypatch):
    """Every later phase was reported as slow on all ranks then, up to the end of the run."""
    ask = HangWatch._ask

    def moves_on(watch):
        watch.enter(2, "training")
        ask(watch)
        if unwritable:  # as a network file system that went away
            (tmp_path / "hang" / hang.REQUEST).unlink()
            (tmp_path / "hang" / hang.REQUEST).mkdir()

    monkeypatch.setattr(HangWatch, "_ask", moves_on)
    with HangWatch(tmp_path, 600) as watch:
        watch.enter(1, "training")
        monkeypatch.setattr(watch, "ended", SimpleNamespace(wait=lambda _: None, set=watch.ended.set))
        watch._report((1, "training"), late=True)
        assert (tmp_path / "hang" / hang.REQUEST).exists() == unwritable


def of_libraries(line: str) -> bool:
    """A line that torch or torchao prints while it is imported."""
    return "torchao" in line or "torch/utils" in line


def test_rank_0_alone_prints(two_ranks):
    said = (two_ranks / "printed_0").read_text()
    assert "step 2/4  loss" in said and "step 4/4  loss" in said and "trained    4.7k" in said and "2 x CPU" in said
    others = [line for line in (two_ranks / "printed_1").read_text().splitlines() if not of_libraries(line)]
    assert others == []
    kept = (two_ranks / "run/rank_1.log").read_text()
    assert "WARNING rank 1 alone has something to say" in kept and "of no use" not in kept
    assert "step 3: training ended after" in kept and not (two_ranks / "run/rank_0.log").exists()


def test_one_process_that_hangs(recipe, caplog):
    trainer = Trainer(recipe("log.hang_seconds=0.2", "train.steps=2"), ToyAdapter())
    step = trainer.train_step

    def slow(batches):
        if trainer.step == 1:
            time.sleep(0.8)
        return step(batches)

    trainer.train_step, began = slow, time.monotonic()
    trainer.run()
    record = json.loads((trainer.run_dir / "hang/rank_0.json").read_text())
    assert record["step"] == 2 and 0.2 <= record["seconds"] <= time.monotonic() - began
    assert "step 2 has made no progress" in caplog.text and "rank 0 has been in training of step 2" in caplog.text
    assert "in slow" in (trainer.run_dir / "hang/rank_0.txt").read_text()


def test_the_report_names_the_part_of_a_step_that_hangs(recipe, monkeypatch, caplog):
    trainer = Trainer(recipe("log.hang_seconds=0.15", "train.steps=2"), ToyAdapter())
    for owner, name in ((trainer, "next_batches"), (trainer.diagnostics, "measure"), (trainer.writer, "collect")):
        original = getattr(owner, name)

        def slow(*given, original=original):
            time.sleep(0.4 if trainer.step == 1 else 0)
            return original(*given)

        monkeypatch.setattr(owner, name, slow)
    trainer.run()
    said = re.findall(r"rank 0 has been in (.*? of step \d)", caplog.text)
    for phase in ("measuring and sampling of step 1", "saving of step 1", "loading of batches of step 2"):
        assert phase in said


@pytest.mark.parametrize(
    ("asked", "start", "steps", "limit"), [(300, 30, 4, 120), (300, 3, 4, 90), (50, 30, 4, 50), (0, 30, 4, 0)]
)
def test_a_hang_is_reported_before_a_collective_times_out(asked, start, steps, limit, recipe, monkeypatch):
    limits, enter = [], HangWatch.__enter__
    monkeypatch.setattr(HangWatch, "__enter__", lambda watch: limits.append(watch.limit) or enter(watch))
    timeouts = f"parallel.timeout_minutes={start}", f"parallel.step_timeout_minutes={steps}"
    run_toy(recipe("train.steps=1", f"log.hang_seconds={asked}", *timeouts))
    assert limits == [limit]


@pytest.mark.parametrize("fails", [False, True])
def test_a_loader_that_hangs_while_it_closes(fails, recipe, caplog):
    """It waits for its threads and writes features to a disk, also after an error."""
    trainer = Trainer(recipe("log.hang_seconds=0.2", "train.steps=1"), ToyAdapter())

    def slow() -> None:
        time.sleep(0.6)

    def broken(_):
        raise OSError("the disk is gone")

    trainer.loaders["reca"].close = slow
    if fails:
        trainer.train_step = broken
    with pytest.raises(OSError, match="disk is gone") if fails else contextlib.nullcontext():
        trainer.run()
    assert (
        "rank 0 has been in closing of loaders of step" in caplog.text
        and "in slow" in (trainer.run_dir / "hang/rank_0.txt").read_text()
    )


def test_a_rank_that_waits_for_the_end_of_another(recipe, monkeypatch, caplog):
    trainer = Trainer(recipe("log.hang_seconds=0.2", "train.steps=1"), ToyAdapter())
    monkeypatch.setattr("reca.distributed.barrier", lambda: time.sleep(0.6))
    trainer.run()
    assert "rank 0 has been in waiting for all ranks of step 1" in caplog.text


def test_nothing_is_left_of_a_run_that_does_not_hang(recipe, caplog):
    trainer = run_toy(recipe())
    assert not (trainer.run_dir / "hang").exists() and "progress" not in caplog.text
    trainer = run_toy(recipe("log.hang_seconds=0", "train.steps=8"))
    assert not (trainer.run_dir / "hang").exists()


def test_a_call_that_holds_the_interpreter(tmp_path):
    """No thread of Python runs, so faulthandler's own writes the stacks."""
    with HangWatch(tmp_path, 0.05, without_python=0.1) as watch:
        watch.enter(7, "training")
        ctypes.PyDLL(None).usleep(600_000)
        watch.enter(7, "saving")
    stacks = (tmp_path / "hang/rank_0.txt").read_text()
    assert re.search(r"Timeout \(.*\)!.*test_a_call_that_holds_the_interpreter", stacks, re.DOTALL)


def test_a_rank_that_is_not_late_answers_the_request_of_another(tmp_path, monkeypatch, caplog):
    """Once in each phase, and the request stays until the rank that made it goes on."""
    monkeypatch.setattr(hang, "LONGEST_POLL", 0.01)
    folder = tmp_path / hang.FOLDER

    def wait_for_answer(phase: str) -> None:
        end = time.monotonic() + 60
        while caplog.text.count(f"in {phase} of step 3") == 0:
            assert time.monotonic() < end
            time.sleep(0.01)

    with HangWatch(tmp_path, 1000.0) as watch:
        for rank, age in ((1, 500.0), (7, 2000.0)):  # the last of an earlier hang, with more ranks
            (folder / f"rank_{rank}.json").write_text(json.dumps(report(rank, "all_reduce", time=time.time() - age)))
        watch.enter(3, "training")
        time.sleep(0.05)
        assert "progress" not in caplog.text
        (folder / hang.REQUEST).touch()
        wait_for_answer("training")
        time.sleep(0.05)
        watch.enter(3, "saving")
        wait_for_answer("saving")
    assert caplog.text.count("rank 0 has been in training of step 3") == 1
    assert caplog.text.count("ranks waiting for others: 1 (in all_reduce at f (a.py:1)). Stacks of all ranks") == 2
    assert (folder / hang.REQUEST).exists()
    stacks = (folder / "rank_0.txt").read_text()
    assert "rank 0, step 3: training for" in stacks and "rank 0, step 3: saving for" in stacks


def test_a_rank_that_is_late_asks_the_others_until_it_goes_on(tmp_path, monkeypatch):
    """It withdraws its own request, and none that another rank makes afterwards."""
    monkeypatch.setattr(hang, "LONGEST_POLL", 0.01)
    request, report = tmp_path / hang.FOLDER / hang.REQUEST, tmp_path / hang.FOLDER / "rank_0.json"

    def wait_for_report() -> None:
        end = time.monotonic() + 60
        while not report.exists():
            assert time.monotonic() < end
            time.sleep(0.01)
        report.unlink()

    with HangWatch(tmp_path, 0.02) as watch:
        watch.enter(3, "training")
        wait_for_report()
        assert request.exists()
        watch.limit = 1000.0
        watch.enter(3, "saving")
        assert not request.exists()
        request.touch()
        wait_for_report()
        watch.enter(4, "training")
        assert request.exists()


@pytest.mark.parametrize("key", [*hang.SUMMARY, None])
def test_a_damaged_summary_of_another_rank_is_left_out(tmp_path, key):
    """A folder may have those of another version. The thread that watches ended with a traceback."""
    watch = HangWatch(tmp_path, 0.02)
    watch.folder.mkdir()
    whole = {"rank": 1, "step": 3, "phase": "training", "seconds": 0.5, "waits": None, "time": 9.0, "innermost": "f"}
    whole |= {"place": "g"}
    (watch.folder / "rank_1.json").write_text(json.dumps(whole))
    assert watch._reports(9.0) == [whole] and "rank 1 has been in" in summary(watch._reports(9.0), 1, tmp_path)
    for damaged in ({k: v for k, v in whole.items() if k != key}, whole | {key: {}}) if key else ([], "text", 3):
        (watch.folder / "rank_1.json").write_text(json.dumps(damaged))
        assert watch._reports(0.0) == []


def test_the_flight_recorder_of_nccl(monkeypatch):
    """The names of a build with NCCL, which this machine may lack; and one that fails costs nothing."""
    module = torch._C._distributed_c10d
    assert hang.recorded_collectives() is None
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "nccl")
    monkeypatch.setattr(module, "_dump_fr_trace", lambda: b"any", raising=False)
    monkeypatch.setattr(module, "_dump_nccl_trace", lambda: b"nccl", raising=False)
    assert hang.recorded_collectives() == b"nccl"
    monkeypatch.setattr(module, "_dump_nccl_trace", lambda: 1 / 0)
    assert hang.recorded_collectives() == b"any"


def test_nccl_dumps_into_the_run_folder(monkeypatch, tmp_path):
    names = ("TORCH_FR_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DUMP_ON_TIMEOUT")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    hang.record_collectives(tmp_path)
    assert [os.environ[name] for name in names] == ["2000", f"{tmp_path}/hang/timeout_", "1"]


def test_the_request_of_a_killed_run_is_removed(recipe):
    trainer = run_toy(recipe("train.steps=1"))
    (trainer.run_dir / hang.FOLDER).mkdir()
    request = trainer.run_dir / hang.FOLDER / hang.REQUEST
    request.touch()
    run_toy(recipe())
    assert not request.exists() and not (trainer.run_dir / hang.FOLDER).exists()


def test_files_without_stacks_of_a_killed_run_are_removed(recipe):
    """Of its four ranks, one had written something; the next start has one, and no watch."""
    trainer = run_toy(recipe("train.steps=1"))
    folder = trainer.run_dir / hang.FOLDER
    folder.mkdir()
    for rank in range(4):
        (folder / f"rank_{rank}.txt").write_text("stacks" * (rank == 2))
    run_toy(recipe("log.hang_seconds=0"))
    assert [path.name for path in folder.iterdir()] == ["rank_2.txt"]


def report(rank: int, waits: str | None = None, **values) -> dict:
    state = {"rank": rank, "step": 9, "phase": "training", "seconds": 300.2, "waits": waits, "place": "f (a.py:1)"}
    state["innermost"] = "read (tar.py:2)"
    return state | values


def test_the_summary_names_every_rank():
    busy = report(3, phase="loading of batches", seconds=301.0)
    waiting = [report(rank, "all_reduce") for rank in (0, 1, 2, 5)]
    text = summary([*waiting, busy], 8, Path("run/hang"))
    assert text == (
        "step 9 has made no progress for 301 s: rank 3 has been in loading of batches of step 9 for 301 s, at read "
        "(tar.py:2), called by f (a.py:1); ranks waiting for others: 0-2, 5 (in all_reduce at f (a.py:1)); no answer "
        "(stopped, dead, or in a call that holds the GIL): 4, 6-7. Stacks of all ranks are in run/hang"
    )
    assert numbers([0]) == "0" and numbers([0, 2, 3, 4, 9]) == "0, 2-4, 9"
    assert json.dumps(report(0))
