"""Which backend runs, and what is said when one cannot."""

import ast
import importlib
import inspect
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from reca_kernels import backend_report, dispatch, masked_cross_entropy, native

ROOT = Path(__file__).parents[2]
needs_native = pytest.mark.skipif(native.module is None, reason=str(native.missing))


def run(code, **environment):
    """Stdout of a fresh interpreter; its stderr on failure."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_native
@pytest.mark.parametrize("op", dispatch.OPS)
def test_cpu_tensors_run_on_the_cpu_kernels(op):
    assert dispatch.choose(op, torch.zeros(4)) == "cpu"


@pytest.mark.parametrize("op", dispatch.OPS)
def test_fp64_runs_on_the_reference(op):
    assert dispatch.choose(op, torch.zeros(4, dtype=torch.float64)) == "reference"


def test_environment_forces(monkeypatch):
    monkeypatch.setenv("RECA_BACKEND", "reference")
    assert dispatch.choose("philox", torch.zeros(4)) == "reference"
    monkeypatch.setenv("RECA_BACKEND", "fastest")
    with pytest.raises(ValueError, match="unknown backend 'fastest'; expected auto, reference, cpu, cuda, triton"):
        dispatch.choose("philox", torch.zeros(4))


def test_argument_beats_environment(monkeypatch):
    monkeypatch.setenv("RECA_BACKEND", "fastest")
    assert dispatch.choose("philox", torch.zeros(4), "reference") == "reference"


def test_forced_backend_never_falls_back():
    logits, labels = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="backend 'cuda' was asked for, but .* never falls back"):
        masked_cross_entropy(logits, labels, backend="cuda")
    if native.module is not None:
        with pytest.raises(RuntimeError, match="takes fp32, bf16 or fp16, got torch.float64"):
            masked_cross_entropy(logits.double(), labels, backend="cpu")


def test_rules_are_a_table_of_known_names():
    for (op, device), rules in dispatch.RULES.items():
        assert op in dispatch.OPS and device in ("cpu", "cuda")
        assert rules and all(rule.backend in dispatch.BACKENDS for rule in rules)


@pytest.fixture
def undecided(monkeypatch):
    """Keep no choice, as what it is based on changes in the test."""
    monkeypatch.setattr(dispatch, "_decide", dispatch._decide.__wrapped__)


def test_small_tensors_can_have_their_own_rule(monkeypatch, undecided):
    rules = {("philox", "cpu"): (dispatch.Rule("reference", max_numel=10), dispatch.Rule("cpu"))}
    monkeypatch.setattr(dispatch, "RULES", rules)
    assert dispatch.choose("philox", torch.zeros(9)) == "reference"
    assert dispatch.choose("philox", torch.zeros(10)) == ("cpu" if native.module else "reference")


def test_report_names_every_op():
    report = backend_report()
    assert all(f"{op} on cpu" in report for op in dispatch.OPS) and torch.__version__ in report


def test_report_shows_what_is_forced(monkeypatch):
    """The run's log takes its line of kernels from the report."""
    monkeypatch.setenv("RECA_BACKEND", "reference")
    monkeypatch.setenv("RECA_ATTENTION", "dense")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    report = backend_report().splitlines()
    assert "philox on cpu: reference, forced by RECA_BACKEND=reference" in report
    assert "attention on cpu: dense, forced by RECA_ATTENTION=dense" in report
    monkeypatch.setenv("RECA_BACKEND", "cuda")
    monkeypatch.setenv("RECA_ATTENTION", "fa3")
    report = backend_report()
    assert "philox on cpu: none, forced by RECA_BACKEND=cuda, but " in report
    assert "attention on cpu: none, forced by RECA_ATTENTION=fa3, but the tensors are on cpu" in report
    monkeypatch.setenv("RECA_BACKEND", "rust")
    monkeypatch.setenv("RECA_ATTENTION", "auto")
    with dispatch.use("reference"):
        assert "philox on cpu: reference, forced by reca_kernels.dispatch.use" in backend_report()
    assert "philox on cpu: none, forced by RECA_BACKEND=rust, but there is no such backend" in backend_report()
    assert "attention on cpu: sdpa, " in backend_report()


@pytest.mark.parametrize("forced", ["cuda", "triton"])
def test_a_forced_backend_is_for_its_type_of_device(monkeypatch, forced):
    """A run on a GPU draws masks on the CPU, where no backend of a GPU runs."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("RECA_BACKEND", forced)
    usual = "cpu" if native.module else "reference"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert dispatch.choose("philox", torch.zeros(9)) == usual
    assert dispatch._forced("cuda") == forced
    with dispatch.use("cpu"):
        assert dispatch._forced("cuda") == "auto" and dispatch._forced("cpu") == "cpu"
    with pytest.raises(RuntimeError, match=f"backend '{forced}' was asked for"):
        dispatch.choose("philox", torch.zeros(9), forced)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=f"backend '{forced}' was asked for"):
        dispatch.choose("philox", torch.zeros(9))


def test_ops_are_the_folders_with_a_kernel():
    assert {"philox", "template_concat", "masked_cross_entropy", "masked_linear_cross_entropy"} <= set(dispatch.OPS)
    assert "attention" not in dispatch.OPS, "it has a definition, and runs on torch and flash-attn"


@pytest.mark.parametrize("backend", [name for name in dispatch.BACKENDS if name != "reference"])
@pytest.mark.parametrize("op", dispatch.OPS)
def test_backends_hold_what_their_op_calls(op, backend):
    """Functions of the names and arguments of the op's `Kernels`."""
    if backend == "triton":
        pytest.importorskip("triton")
    contract = importlib.import_module(f"reca_kernels.{op}.kernels").Kernels
    wanted = {name: method for name, method in vars(contract).items() if not name.startswith("_")}
    held = dispatch.load(backend, op)
    assert wanted
    for name, method in wanted.items():
        _, *arguments = inspect.signature(method).parameters
        assert list(inspect.signature(getattr(held, name)).parameters) == arguments, f"{op}.{backend}.{name}"


def test_a_folder_does_not_hide_the_function_of_its_name():
    """Python sets a package as an attribute of its parent when it is first imported."""
    out = run("""
        import importlib, inspect, reca_kernels
        from reca_kernels import dispatch
        for op in dispatch.OPS:
            for backend in dispatch.BACKENDS:
                if dispatch.has_backend(op, backend) and (backend != "triton" or importlib.util.find_spec("triton")):
                    dispatch.load(backend, op)
        print([name for name in reca_kernels.__all__ if inspect.ismodule(getattr(reca_kernels, name))])
        """)
    assert out == "[]\n"


def test_without_the_native_module_everything_runs_and_says_so():
    """An import that fails stands for a machine without a compiler."""
    out = run("""
        import sys, warnings
        sys.modules["reca_kernels._native"] = None
        import torch, reca_kernels
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            logits = torch.zeros(4, 8, requires_grad=True)
            reca_kernels.masked_cross_entropy(logits, torch.zeros(4, dtype=torch.int64)).backward()
            reca_kernels.masked_cross_entropy(logits, torch.zeros(4, dtype=torch.int64))
            hidden, weight = torch.zeros(4, 2), torch.zeros(8, 2)
            reca_kernels.masked_linear_cross_entropy(hidden, weight, torch.zeros(4, dtype=torch.int64))
        print(len(caught), caught[0].message)
        print(reca_kernels.backend_report())
        """)
    assert out.startswith("1 ops run on their slow PyTorch reference on cpu (cpu: the native module did not load")
    advice = "install a C++ compiler and reinstall with pip's --force-reinstall --no-deps --no-cache-dir and"
    assert "NO NATIVE MODULE" in out and out.count(advice) == 2  # the warning's, and once in the report
    assert "masked_cross_entropy on cpu: reference  (not cpu: no native module)\n" in out


def test_kernels_do_not_import_the_driver():
    assert (
        run("import sys, reca_kernels; print([m for m in sys.modules if m == 'reca' or m.startswith('reca.')])")
        == "[]\n"
    )


def launches_in(tree, on_device=False):
    """Per launch of a Triton kernel, kernel[grid](...): its line, and whether it runs on a tensor's device."""
    if isinstance(tree, ast.With):
        on_device |= any(ast.unparse(item.context_expr).startswith("torch.cuda.device_of(") for item in tree.items)
    if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Subscript):
        yield tree.lineno, on_device
    for child in ast.iter_child_nodes(tree):
        yield from launches_in(child, on_device)


@pytest.mark.parametrize("op", [op for op in dispatch.OPS if dispatch.has_backend(op, "triton")])
def test_every_triton_kernel_runs_on_the_device_of_its_tensors(op):
    """Triton launches on the current device, which another one's tensors leave as it is."""
    launches = list(launches_in(ast.parse((dispatch.PACKAGE / op / "triton.py").read_text())))
    assert launches and not [line for line, on_device in launches if not on_device]


def test_use_forces_a_backend_for_a_while(monkeypatch):
    """Over RECA_BACKEND, under an argument, and back to the one before, whatever happens inside."""
    monkeypatch.setenv("RECA_BACKEND", "nonsense")
    x = torch.zeros(1)
    with dispatch.use("reference"):
        assert dispatch.choose("philox", x) == "reference"
        with pytest.raises(ValueError, match="unknown backend 'other'"), dispatch.use("other"):
            dispatch.choose("philox", x)
        assert dispatch.choose("philox", x) == "reference"
        with pytest.raises(ValueError, match="unknown backend 'wrong'"):
            dispatch.choose("philox", x, "wrong")
    with pytest.raises(ValueError, match="unknown backend 'nonsense'"):
        dispatch.choose("philox", x)


def test_a_gpu_that_is_assumed_runs_every_backend(monkeypatch, undecided):
    """For fake tensors, on a machine without one: whatever is built or installed there, and forced as on a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(native, "module", None)
    monkeypatch.setattr(native, "missing", "not built")
    chosen = {}
    for forced in ("auto", "triton", "reference", "cpu"):
        monkeypatch.setenv("RECA_BACKEND", forced)
        with dispatch.assume_gpu():
            chosen[forced] = dispatch.choose("philox", torch.zeros(9))
    assert chosen == {"auto": "cuda", "triton": "triton", "reference": "reference", "cpu": "cuda"}
    monkeypatch.delenv("RECA_BACKEND")
    with dispatch.assume_gpu():
        assert dispatch.choose("philox", torch.zeros(9, dtype=torch.float64)) == "reference"
        with pytest.raises(ValueError, match="unknown backend 'rust'"):
            dispatch.choose("philox", torch.zeros(9), "rust")
    assert dispatch.choose("philox", torch.zeros(9)) == "reference"  # not "cuda" any more


def test_of_a_gpu_of_this_machine_what_runs_there_is_assumed(monkeypatch, undecided):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 0))
    monkeypatch.setattr(native, "module", None)
    monkeypatch.setattr(native, "missing", "not built")
    dispatch._warn_slow.cache_clear()
    needs = "it needs" if importlib.util.find_spec("triton") else "triton is not installed"
    with dispatch.assume_gpu(), pytest.warns(UserWarning, match=rf"on cuda \(cuda: not built; triton: {needs}"):
        assert dispatch.choose("philox", torch.zeros(9)) == "reference"
