"""The script for the day a GPU is at hand: nothing stops it, and it says what happened."""

import os
import subprocess
import sys
import textwrap

import pytest

from benchmarks import full_gpu_run
from benchmarks.__main__ import OPS
from benchmarks.full_gpu_run import STEPS, Step


def python(name, code, seconds=20):
    return Step(name, seconds, [sys.executable, "-c", code])


def test_a_failing_step_stops_nobody(capfd):
    done = full_gpu_run.run(
        [
            python("fails", "import sys; sys.exit(3)"),
            python("hangs", "import time; time.sleep(60)", seconds=0.5),
            Step("missing", 5, ["a-program-that-nobody-has"]),
            python("works", "print('done')"),
        ]
    )
    assert [(step.name, step.rc) for step in done] == [("fails", 3), ("hangs", 124), ("missing", 127), ("works", 0)]
    assert "done" in capfd.readouterr().out
    lines = full_gpu_run.table(done).splitlines()
    assert len(lines) == 4 and "rc 124" in lines[1] and lines[3].startswith("works")


def test_out_of_time_altogether():
    assert [step.rc for step in full_gpu_run.run([python("a", "0"), python("b", "0")], minutes=0)] == [124, 124]


def test_steps_fit_and_cover_every_op():
    assert sum(step.seconds for step in STEPS) <= 60 * full_gpu_run.MINUTES
    names = [step.name for step in STEPS]
    assert {f"bench_{op}" for op in OPS} < set(names) and len(set(names)) == len(names)
    assert names.index("build") < names.index("test") < names.index("bench_philox") < names.index("dispatch")


def test_chosen_steps_their_files_and_the_exit_status(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(full_gpu_run, "STEPS", [python("good", "0"), python("bad", "import sys; sys.exit(1)")])
    assert full_gpu_run.main(["good", "--copy-to", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "dispatch_table.json").exists()
    assert full_gpu_run.main([]) == 1
    assert capfd.readouterr().out.splitlines()[-1].startswith("bad")
    with pytest.raises(SystemExit):
        full_gpu_run.main(["build_it"])
    assert "unknown steps build_it; known are good, bad" in capfd.readouterr().err


def test_what_runs_on_a_gpu_needs_the_libraries_of_kernels_only():
    """Machines with GPUs may lack what the driver needs, and a network to get it."""
    code = """
        import sys, pytest
        for name in ("diffusers", "transformers", "omegaconf", "safetensors", "tqdm", "jinja2"):
            sys.modules[name] = None
        sys.exit(pytest.main(["-q", "--collect-only", "-m", "gpu", "tests/kernels", "tests/benchmarks"]))
        """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(full_gpu_run.ROOT), str(full_gpu_run.ROOT / "python")]),
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=full_gpu_run.ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
