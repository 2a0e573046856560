"""The script for the day a GPU is at hand: nothing stops it, and it says what happened."""

import importlib.util
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from benchmarks import full_gpu_run, sdp_kernels
from benchmarks.__main__ import OPS
from benchmarks.devices import Cpu
from benchmarks.full_gpu_run import STEPS, Step
from benchmarks.step.targets import TARGETS

PATHS = os.pathsep.join([str(full_gpu_run.ROOT), str(full_gpu_run.ROOT / "python")])
ENVIRONMENT = {**os.environ, "PYTHONPATH": PATHS}
OWN = Path(__file__).relative_to(full_gpu_run.ROOT).as_posix()


def python(name, code, seconds=20.0):
    return Step(name, seconds, [sys.executable, "-c", textwrap.dedent(code)])


def test_a_failing_step_stops_nobody(capfd, tmp_path):
    done = full_gpu_run.run(
        [
            python("fails", "import sys; print('why'); sys.exit(3)"),
            python("hangs", "import time; time.sleep(60)", seconds=1),
            Step("missing", 5, ["a-program-that-nobody-has"]),
            python("works", "import sys; print('done'); print('warned', file=sys.stderr)"),
        ],
        tmp_path / "out",
    )
    assert [(step.name, step.rc) for step in done] == [("fails", 3), ("hangs", 124), ("missing", 127), ("works", 0)]
    shown = capfd.readouterr().out
    assert "why" in shown and "done" in shown
    assert (tmp_path / "out" / "fails.log").read_text() == "why\n"
    assert sorted((tmp_path / "out" / "works.log").read_text().split()) == ["done", "warned"]
    assert "a-program-that-nobody-has" in (tmp_path / "out" / "missing.log").read_text()
    lines = full_gpu_run.table(done).splitlines()
    assert len(lines) == 4 and "rc 124" in lines[1] and lines[3].startswith("works")


def test_out_of_time_pytest_still_says_what_it_has(monkeypatch, tmp_path):
    """SIGINT first: the summary of what has run is in the log, and what was started is gone."""
    (tmp_path / "test_slow.py").write_text(
        textwrap.dedent("""
            import subprocess, sys, time
            def test_wrong(): assert 1 == 2
            def test_slow():
                child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
                print("child", child.pid, file=open("child", "w"))
                time.sleep(60)
        """)
    )
    (tmp_path / "conftest.py").write_text("")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    started, wait = tmp_path / "child", subprocess.Popen.wait

    def out_of_time(process, seconds=None):
        """The first wait ends as soon as the slow test has begun."""
        monkeypatch.setattr(subprocess.Popen, "wait", wait)
        while not started.exists() or not started.read_text().endswith("\n"):
            time.sleep(0.05)
        raise subprocess.TimeoutExpired(process.args, seconds)

    monkeypatch.setattr(subprocess.Popen, "wait", out_of_time)
    step = Step("test", 200, ["sh", "-c", f"cd {tmp_path} && exec {' '.join(command)}"])
    (done,) = full_gpu_run.run([step], tmp_path / "out")
    log = (tmp_path / "out" / "test.log").read_text()
    assert done.rc == 124 and "KeyboardInterrupt" in log and "1 failed" in log and "assert 1 == 2" in log
    stat = Path(f"/proc/{started.read_text().split()[1]}/stat")
    ends = time.monotonic() + 30
    while stat.exists() and stat.read_text().split()[2] != "Z":  # killed, and about to go
        assert time.monotonic() < ends
        time.sleep(0.05)


def test_a_file_that_cannot_be_imported_stops_no_other(tmp_path):
    """On a machine without a package; and the log names every test as it ends."""
    (tmp_path / "test_broken.py").write_text("import a_package_that_nobody_has")
    (tmp_path / "test_whole.py").write_text("import pytest\n@pytest.mark.gpu\ndef test_it(): pass")
    command = [*full_gpu_run._tests(str(tmp_path)), "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
    (done,) = full_gpu_run.run([Step("test", 60, command)], tmp_path / "out")
    log = (tmp_path / "out" / "test.log").read_text()
    assert done.rc == 1 and "1 passed" in log and "1 error" in log and "test_whole.py::test_it PASSED" in log


def test_what_ignores_the_interrupt_is_killed(tmp_path):
    code = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    (done,) = full_gpu_run.run([python("deaf", code, seconds=4)], tmp_path)
    assert done.rc == 124 and done.seconds < 20 and (tmp_path / "deaf.log").read_text() == "up\n"


def test_results_are_kept_from_a_call_that_is_cut_off(monkeypatch, tmp_path):
    """The second step finds in the folder what the first has measured, and both what PYTHONPATH names."""
    results, steps, packages = tmp_path / "results", tmp_path / "step", tmp_path / "packages"
    for folder in (results, steps, packages):
        folder.mkdir()
    (packages / "carried.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(packages))
    monkeypatch.setattr(full_gpu_run, "RESULTS", results)
    monkeypatch.setattr(full_gpu_run, "STEP_RESULTS", steps)
    for name in ("results/cpu.csv", "step/cpu.csv"):  # of an earlier run
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 0))
    files = [str(folder / "nvidia.csv") for folder in (results, steps)]
    measures = f"import carried; [open(name, 'w').write('rows') for name in {files}]"
    finds = "import carried, os; print(sorted(name for name in os.listdir(OUT) if name.endswith('csv')))"
    done = full_gpu_run.run(
        [python("one", measures), python("two", f"OUT = {str(tmp_path / 'out')!r}; {finds}")], tmp_path / "out"
    )
    log = (tmp_path / "out" / "two.log").read_text()
    assert [step.rc for step in done] == [0, 0] and log == "['nvidia.csv', 'step_nvidia.csv']\n"


def test_a_run_that_is_terminated_copies_its_results_and_ends_its_step(monkeypatch, tmp_path):
    results, begun = tmp_path / "results", tmp_path / "begun"
    results.mkdir()
    code = f"""
        import os, time
        open({str(results / "gpu.csv")!r}, "w").write("rows")
        open({str(begun)!r}, "w").write(f"{{os.getpid()}} {{os.getsid(0)}} {{os.getpgid(0)}}\\n")
        time.sleep(60)
        """
    monkeypatch.setattr(full_gpu_run, "RESULTS", results)
    monkeypatch.setattr(full_gpu_run, "STEPS", [python("long", code, 60)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before, wait = signal.signal(signal.SIGTERM, signal.SIG_IGN), subprocess.Popen.wait

    def terminated(process, seconds=None):
        monkeypatch.setattr(subprocess.Popen, "wait", wait)
        while not begun.exists() or not begun.read_text().endswith("\n"):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr(subprocess.Popen, "wait", terminated)
    try:
        with pytest.raises(SystemExit) as ended:
            full_gpu_run.main(["--out", str(tmp_path / "out")])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 143 and (tmp_path / "out" / "gpu.csv").read_text() == "rows"
    process, session, group = map(int, begun.read_text().split())
    assert session == os.getsid(0) and group == process and not Path(f"/proc/{process}").exists()


def test_a_call_ends_in_its_time(monkeypatch, tmp_path, capfd):
    """A step gets what the earlier ones left, and one that is left too little is not begun."""
    clock, given = [0.0], {}

    def takes_a_minute(step, log):
        given[step.name] = step.seconds
        log.write_text("")
        clock[0] += min(60, step.seconds)
        return 0

    monkeypatch.setattr(full_gpu_run, "time", SimpleNamespace(time=time.time, monotonic=lambda: clock[0]))
    monkeypatch.setattr(full_gpu_run, "_run", takes_a_minute)
    steps = [Step(name, seconds, []) for name, seconds in (("a", 100), ("b", 100), ("c", 100), ("d", 15))]
    done = full_gpu_run.run(steps, tmp_path, seconds=135)
    assert given == {"a": 100, "b": 75, "d": 15}
    assert [(step.name, step.rc) for step in done] == [("a", 0), ("b", 0), ("c", 124), ("d", 0)]
    assert "==== c: not started, 15 s are left" in capfd.readouterr().out


def test_a_build_without_cuda_is_an_error():
    assert full_gpu_run.BUILD.environment == {"RECA_NATIVE": "ON", "RECA_CUDA": "ON"}


def test_calls_fit_into_what_is_lent_and_cover_every_op():
    """Ten minutes and eight files a command: logs, results with their plot, of steps and loaders, dispatch tables.

    The first call also builds, and leaves its tests at least four minutes.
    """
    from benchmarks.step.recipes import MODELS  # which needs the driver's packages

    for call in full_gpu_run.CALLS:
        names = [step.name for step in call]
        kinds = {"bench_": 2, "step_": 1, "data": 1, "dispatch": 2}
        made = sum(count for kind, count in kinds.items() if any(name.startswith(kind) for name in names))
        assert len({"build", *names}) + made <= 8
    first, *others = full_gpu_run.CALLS
    assert [step.name for step in first] == ["build", "report", "first", "test"]
    assert full_gpu_run.CALL_SECONDS - sum(step.seconds for step in first[:-1]) >= 240
    assert all(sum(step.seconds for step in call) <= 600 for call in others) and full_gpu_run.CALL_SECONDS < 590
    limits = {step.name: step.seconds for step in STEPS}
    assert {f"step_{model}" for model in MODELS} < set(limits) and {*TARGETS["cuda", "real"]} < {*MODELS}
    assert len(limits) == len(STEPS) and {f"bench_{op}" for op in OPS} < set(limits)
    assert (
        limits["test"] == 480
        and limits["bench_masked_linear_cross_entropy"] == 300
        and limits["bench_attention"] >= 290
    )
    names = list(limits)
    assert names[:3] == ["build", "report", "first"]
    assert names.index("first") < names.index("test") < names.index("sanitizers")
    assert max(names.index(f"bench_{op}") for op in OPS) < names.index("dispatch") < names.index("docs")


@pytest.fixture(scope="module")
def gpu_tests():
    """Names of the tests that kernels and benchmarks have for a GPU.

    Collected without what only the driver needs: machines with GPUs may lack it, and a network to get it.
    """
    code = """
        import sys, pytest
        for name in ("diffusers", "transformers", "yaml", "safetensors", "tqdm", "jinja2"):
            sys.modules[name] = None
        sys.exit(pytest.main(["-q", "--collect-only", "-m", "gpu", *sys.argv[1:]]))
        """
    command = [sys.executable, "-c", textwrap.dedent(code), *full_gpu_run.KERNEL_TESTS]
    done = subprocess.run(command, cwd=full_gpu_run.ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if "::" in line]


def test_which_tests_run_where(gpu_tests):
    """Every GPU test of kernels and benchmarks is in one step; the first of them wait for every kernel."""
    steps = {step.name: step for step in STEPS}
    first = steps["first"]
    assert first.environment == {"CUDA_LAUNCH_BLOCKING": "1"} and "-x" in first.command and "-n" not in first.command
    path, words = first.command[-3], first.command[-1]
    assert sum(test.startswith(path) and words in test for test in gpu_tests) > 20
    for name, told in (("test", "not {} and not {}"), ("test_large", "{}"), ("sanitizers", "{1}")):
        words = told.format(full_gpu_run.LARGE, full_gpu_run.SANITIZED)
        command = steps[name].command
        assert command[-2:] == ["-k", words] and command[command.index("-m", 2) + 1] == "gpu"
    large, sanitized = (
        {test for test in gpu_tests if word in test} for word in (full_gpu_run.LARGE, full_gpu_run.SANITIZED)
    )
    assert len(large) >= 10 and len(sanitized) >= 10 and not large & sanitized
    assert all(test.startswith("tests/kernels/") for test in sanitized)
    if importlib.util.find_spec("xdist"):
        assert "-n 8" in " ".join(steps["test"].command)


def test_no_file_with_gpu_tests_is_left_out():
    root = full_gpu_run.ROOT
    files = [path.relative_to(root).as_posix() for path in root.glob("tests/**/test_*.py")]
    marked = [name for name in files if "pytest.mark.gpu" in (root / name).read_text() and name != OWN]
    run = [argument for step in STEPS for argument in step.command if argument.startswith("tests/")]
    assert len(marked) > 9 and [name for name in marked if not name.startswith(tuple(run))] == []


def test_without_xdist_the_tests_run_in_one_process(monkeypatch):
    monkeypatch.setattr(full_gpu_run.importlib.util, "find_spec", lambda name: None)
    assert "-n" not in full_gpu_run._tests("tests/kernels", processes=8)


def test_chosen_steps_their_files_and_the_exit_status(monkeypatch, tmp_path, capfd):
    good, bad = python("good", "0"), python("bad", "import sys; sys.exit(1)")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(full_gpu_run, "STEPS", [good, bad])
    monkeypatch.setattr(full_gpu_run, "CALLS", [[good], [bad]])
    monkeypatch.setenv("OUT", str(tmp_path / "given"))
    assert full_gpu_run.main(["good", "--out", str(tmp_path / "out")]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["good.log"]
    assert full_gpu_run.main([]) == 1
    assert capfd.readouterr().out.splitlines()[-1].startswith("bad")
    assert (tmp_path / "given" / "bad.log").exists()
    monkeypatch.setattr(full_gpu_run, "BUILD", python("build", "0"))
    for archs, built in (("90-real", False), ("", True)):  # on a bare machine a call builds what it runs
        monkeypatch.setattr(full_gpu_run.native, "module", SimpleNamespace(cuda_archs=archs))
        assert full_gpu_run.main(["--call", "1"]) == 0
        assert full_gpu_run.main(["--call", "2"]) == 1
        assert (tmp_path / "given" / "build.log").exists() == built
    assert full_gpu_run.main(["--call", "1", "--seconds", "5"]) == 1
    assert "==== good: not started, 5 s are left" in capfd.readouterr().out
    for wrong, told in (
        (["build_it"], "unknown steps build_it; expected some of good, bad"),
        (["--seconds", "5"], "--seconds must be above 0, and is the time limit of --call, got 5"),
        (["--call", "3"], "--call must be 1 to 2"),
        (["--call", "1", "good"], "cannot be combined with names of steps"),
    ):
        with pytest.raises(SystemExit):
            full_gpu_run.main(wrong)
        assert told in capfd.readouterr().err


def test_without_a_gpu_nothing_is_run(monkeypatch, capsys):
    """All tests would be skipped, and their steps reported as passed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        full_gpu_run.main(["first"])
    assert "finds no CUDA device" in capsys.readouterr().err


def test_the_log_of_attention_names_the_kernel(capsys):
    """The operators are those that torch's profiler names, on a CPU as on a GPU."""
    q = torch.randn(1, 2, 8, 16)
    (ran,) = sdp_kernels.kernels_of(lambda: F.scaled_dot_product_attention(q, q, q), Cpu())
    assert (ran.kernel, ran.calls) == ("flash (CPU)", 1)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        (ran,) = sdp_kernels.kernels_of(lambda: F.scaled_dot_product_attention(q, q, q), Cpu())
    assert ran.kernel == "math"
    for kernel in ("flash", "efficient", "cudnn"):  # the names of the others are torch's
        assert hasattr(torch.ops.aten, f"_scaled_dot_product_{kernel}_attention")
        assert f"_scaled_dot_product_{kernel}_attention" in sdp_kernels.KERNELS
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            sdp_kernels.main([])
        assert "finds no CUDA device" in capsys.readouterr().err
