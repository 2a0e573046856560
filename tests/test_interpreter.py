"""Versions with which Triton's interpreter cannot be used, and what becomes of its tests then."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests import interpreter

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "triton,numpy,works",
    [
        ("3.6.0", "2.5.2", False),
        ("3.6.0", "2.4.6", True),
        ("3.5.1+git1", "2.5.0rc1", False),
        ("3.7.0", "2.5.2", True),
        ("3.10.0", "2.10.0", True),
        ("4.0.0", "3.0.0", True),
        ("3.6.0", "3.0.1", False),
        (None, "2.4.6", False),
    ],
)
def test_versions(monkeypatch, triton, numpy, works):
    def version(name):
        found = {"triton": triton, "numpy": numpy}[name]
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(interpreter.metadata, "version", version)
    assert (interpreter.problem() is None) == works
    if not works:
        assert interpreter.problem() in (
            "triton is not installed",
            f"the interpreter of Triton {triton[:3] if triton else 0} fails with NumPy {numpy[:3]}: "
            "take Triton 3.7 or NumPy 2.4",
        )


def test_kernels_are_skipped_and_the_reason_is_printed(tmp_path):
    """Nothing tries Triton on CPU tensors then: neither tests of kernels nor those of benchmarks."""
    (tmp_path / "sitecustomize.py").write_text(
        "from importlib import metadata\n"
        "real = metadata.version\n"
        "metadata.version = lambda name: {'triton': '3.6.0', 'numpy': '2.5.2'}.get(name) or real(name)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (tmp_path, ROOT, ROOT / "python")))
    tests = "tests/kernels/test_philox.py::test_no_samples_and_no_elements"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-ra", "-q", "-p", "no:cacheprovider", "-k", "triton", tests],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the interpreter of Triton 3.6 fails with NumPy 2.5" in done.stdout, done.stdout
