"""Jobs side by side in processes of their own: their order, their results, and what a failure stops."""

import os
import select
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from reca import exits
from reca.hardware import cgroups
from reca.processes import side_by_side, workers
from reca.processes.environment import environment
from reca.processes.side_by_side import Failure, Job


def report(folder, name, *needed):
    """Say that a job ran, what it saw, and that those before it had ended."""
    assert all((folder / other).exists() for other in needed)
    (folder / name).touch()
    return name, os.environ.get("OMP_NUM_THREADS"), os.environ.get("CUDA_VISIBLE_DEVICES")


def wait_for(folder, mine, other):
    """End only if the other job runs at the same time."""
    (folder / mine).touch()
    wait_until(lambda: (folder / other).exists())


def wait_until(condition):
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def fail():
    raise ValueError("no such image")


def join(*parts):
    return "".join(parts)


def die():
    os._exit(9)


def processes():
    return os.getpid(), os.getppid()


def save_on_signal(folder):
    """Run until SIGTERM comes, as a run does."""
    signal.signal(signal.SIGTERM, lambda *_: ((folder / "saved").touch(), sys.exit(75)))
    (folder / "running").touch()
    time.sleep(60)


def test_an_interruption_lets_jobs_save(tmp_path):
    def interrupt():
        if (tmp_path / "running").exists():
            sys.exit(75)

    with pytest.raises(SystemExit):
        side_by_side.run([Job("run", save_on_signal, (tmp_path,))], [None], on_wait=interrupt)
    wait_until(lambda: (tmp_path / "saved").exists())


def descendants(pid):
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [*children, *(found for child in children for found in descendants(child))]


@pytest.mark.skipif(sys.platform != "linux", reason="descendants are read from /proc")
def test_processes_end_with_a_parent_that_is_killed(tmp_path):
    """A run saves first; a process that waits for a job just ends."""
    code = f"""
        import signal
        from pathlib import Path
        from reca.processes.side_by_side import Job, run
        from tests.driver.test_side_by_side import report, save_on_signal
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a script starts with &
        folder = Path({str(tmp_path)!r})
        run([Job("run", save_on_signal, (folder,)), Job("short", report, (folder, "short"))], [None, None])
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], cwd=Path(__file__).parents[2])
    wait_until(lambda: (tmp_path / "running").exists() and (tmp_path / "short").exists())
    ended = [os.pidfd_open(pid) for pid in descendants(parent.pid)]
    assert len(ended) >= 3  # the server and what it forked
    parent.kill()
    parent.wait()
    wait_until(lambda: len(select.select(ended, [], [], 0)[0]) == len(ended))
    assert (tmp_path / "saved").exists()


def test_ctrl_c_ends_all_processes_without_a_word(tmp_path):
    """A terminal sends it to all of them. One that waited for a job printed a traceback."""
    code = f"""
        import signal
        from pathlib import Path
        from reca.processes.side_by_side import Job, run
        from tests.driver.test_side_by_side import report, save_on_signal
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a script starts with &
        folder = Path({str(tmp_path)!r})
        try:
            run([Job("run", save_on_signal, (folder,)), Job("short", report, (folder, "short"))], [None, None])
        except KeyboardInterrupt:
            print("stopped")
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=Path(__file__).parents[2], start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    wait_until(lambda: (tmp_path / "running").exists() and (tmp_path / "short").exists())
    os.killpg(parent.pid, signal.SIGINT)
    assert parent.communicate(timeout=60)[0] == "stopped\n"
    assert (tmp_path / "saved").exists()


def test_jobs_run_side_by_side_and_after_those_they_need(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    jobs = [
        Job("last", report, (tmp_path, "last", "a", "b"), after=("a", "b")),
        Job("a", wait_for, (tmp_path, "a", "b")),
        Job("b", wait_for, (tmp_path, "b", "a")),
    ]
    begun, ended, waits = [], [], []
    found = side_by_side.run(
        jobs,
        [None, None],
        lambda job, result: ended.append(job.name),
        lambda: waits.append(1),
        lambda job: begun.append((job.name, len(ended))),
    )
    assert found == {"a": None, "b": None, "last": ("last", "1", None)}
    assert ended[-1] == "last" and sorted(ended) == ["a", "b", "last"] and waits
    assert begun == [("a", 0), ("b", 0), ("last", 2)]
    assert "OMP_NUM_THREADS" not in os.environ


def test_a_job_takes_the_results_of_those_it_uses(tmp_path):
    jobs = [
        Job("last", join, ("c",), uses=("second", "first")),
        Job("first", join, ("a",)),
        Job("second", join, ("b",), after=("first",)),
        Job("never", report, (tmp_path, "never"), uses=("broken",)),
        Job("broken", fail),
    ]
    found = side_by_side.run(jobs, [None])
    assert found["last"] == "cba"
    assert str(found["never"]) == "broken failed"


@pytest.mark.parametrize("slot", [None, "7"])
def test_a_failure_stops_what_comes_after_it_and_nothing_else(slot, tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    jobs = [
        Job("broken", fail),
        Job("never", report, (tmp_path, "never"), after=("broken",)),
        Job("nor this", report, (tmp_path, "nor"), after=("never",)),
        Job("killed", die),
        Job("fine", report, (tmp_path, "fine")),
    ]
    found = side_by_side.run(jobs, [slot])
    assert str(found["broken"]) == "ValueError: no such image"
    assert str(found["never"]) == "broken failed" and str(found["nor this"]) == "never failed"
    assert isinstance(found["killed"], Failure) and "runs out of memory (see dmesg)" in str(found["killed"])
    assert exits.code_of(found["killed"].error) == exits.RECIPE  # one sentence; it was the traceback of a bug
    assert found["fine"] == ("fine", "1", slot)  # by a new process, on the same core or GPU
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("slot", [None, "7"])
def test_a_process_of_a_core_is_kept_and_one_of_a_gpu_is_replaced(slot):
    """CUDA does not survive a fork, and a process that ends gives back all memory of its GPU."""
    jobs = [Job("first", processes), Job("second", processes, after=("first",))]
    (first, its_parent), (second, _) = side_by_side.run(jobs, [slot]).values()
    assert (first == second) == (slot is None)
    assert (its_parent != os.getpid()) == (slot is None and workers.FORK_SERVER)


@pytest.mark.parametrize("kind", ["after", "uses"])
@pytest.mark.parametrize("others", [("a",), ("b",), ("nobody",)])
def test_jobs_that_can_never_start_are_refused(kind, others):
    with pytest.raises(ValueError, match="unknown job, or a circular dependency"):
        side_by_side.run([Job("a", fail, **{kind: others}), Job("b", fail, after=("a",))], [None])


def test_imports_before_a_fork_do_not_ask_for_gpus():
    """CUDA, once asked, does not work in a process that is forked."""
    code = """
        import torch
        def refuse(*_, **__): raise AssertionError("CUDA was asked for at import")
        for name in ("is_available", "device_count", "init", "_lazy_init", "get_device_capability"):
            setattr(torch.cuda, name, refuse)
        import reca.processes.quiet_imports, reca.demo.experiment, reca.studies.work
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=Path(__file__).parents[2], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="affinities and cgroups are Linux's")
def test_slots(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {1, 5, 6})  # as in a container or a job of SLURM
    assert side_by_side.cores() == [None] * 3
    monkeypatch.setattr(cgroups, "OWN", tmp_path / "own")
    monkeypatch.setattr(cgroups, "ROOT", tmp_path)
    (tmp_path / "cpu").mkdir()
    for own, files, wanted in (  # docker run --cpus 1.5, by version 2 and 1
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 3),
        ("3:cpu,cpuacct:/docker/1\n", {"cpu/cpu.cfs_quota_us": "150000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
        ("3:cpu,cpuacct:/docker/1\n", {"cpu/cpu.cfs_quota_us": "-1\n"}, 3),
    ):
        for name, text in (files | {"own": own}).items():
            (tmp_path / name).write_text(text)
        assert side_by_side.cores() == [None] * wanted
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,MIG-7")
    assert side_by_side.gpus() == ["2", "MIG-7"]
    for given, wanted in (("", []), ("-1", []), ("1, 0", ["1", "0"]), ("1,-1,0", ["1"])):  # as CUDA reads it
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        assert side_by_side.gpus() == wanted


def test_variables_of_the_environment_are_restored(monkeypatch):
    monkeypatch.setenv("RECA_SET", "before")
    monkeypatch.delenv("RECA_UNSET", raising=False)
    with pytest.raises(KeyError, match="job"), environment(RECA_SET="now", RECA_UNSET="now"):
        assert (os.environ["RECA_SET"], os.environ["RECA_UNSET"]) == ("now", "now")
        raise KeyError("job")
    assert os.environ["RECA_SET"] == "before" and "RECA_UNSET" not in os.environ
