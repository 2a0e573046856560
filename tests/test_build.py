"""The native module as it was built, and setup.py where tools are missing."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from reca_kernels import native

ROOT = Path(__file__).parents[1]
needs_native = pytest.mark.skipif(native.module is None, reason=str(native.missing))


@needs_native
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm (binutils)")
def test_no_symbol_of_torch():
    symbols = subprocess.run(
        ["nm", "-DC", "--undefined-only", native.module.__file__], capture_output=True, text=True, check=True
    ).stdout
    assert "Py" in symbols
    assert not re.findall(r"\b(?:at|c10|torch|caffe2)::\S*", symbols)


@needs_native
@pytest.mark.skipif(shutil.which("ldd") is None, reason="no ldd")
def test_links_nothing_of_torch():
    libraries = subprocess.run(["ldd", native.module.__file__], capture_output=True, text=True, check=True).stdout
    assert not re.findall(r"lib(?:torch|c10|cuda)\w*", libraries)


def test_setup_imports_the_standard_library_and_setuptools_only():
    imports = set(re.findall(r"^(?:from|import) (\w+)", (ROOT / "setup.py").read_text(), re.MULTILINE))
    assert imports - set(sys.stdlib_module_names) == {"setuptools"}


def test_no_requirement_on_the_other_apex():
    assert not re.search(r"^\s*\"?apex\b|\"apex[\"\[=<>~]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)


def build(tmp_path, **environment):
    """setup.py build_ext into tmp_path."""
    return subprocess.run(
        [
            sys.executable,
            "setup.py",
            "build_ext",
            f"--build-lib={tmp_path / 'lib'}",
            f"--build-temp={tmp_path / 'temp'}",
        ],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


needs_setuptools = pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="no setuptools")


@needs_setuptools
def test_without_a_compiler_it_installs_pure_python_loudly(tmp_path):
    done = build(tmp_path, CXX="no-such-compiler", RECA_NATIVE="auto")
    assert done.returncode == 0, done.stderr
    assert "THE NATIVE MODULE IS NOT BUILT" in done.stdout + done.stderr
    assert not list(tmp_path.rglob("*.so"))


@needs_setuptools
def test_without_a_compiler_but_told_to_build_it_fails(tmp_path):
    done = build(tmp_path, CXX="no-such-compiler", RECA_NATIVE="ON")
    assert done.returncode != 0
    assert "RECA_NATIVE=ON, but the native module cannot be built" in done.stderr


@needs_setuptools
def test_a_cmake_that_is_too_old_is_no_cmake(tmp_path):
    """Whatever stands first: the folder of a cmake package, or PATH."""
    tool = tmp_path / "data" / "bin" / "cmake"
    tool.parent.mkdir(parents=True)
    tool.write_text("#!/bin/sh\necho cmake version 3.25.1\n")
    tool.chmod(0o755)
    code = (
        "import setuptools; setuptools.setup = lambda **_: None; import setup; from pathlib import Path\n"
        f"setup.package_folders = lambda name: [Path({str(tmp_path)!r})]\n"
        "try: setup.find_cmake()\nexcept setup.MissingTool as missing: print(missing)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "is version 3.25, older than 3.26; pip install cmake" in done.stdout, done.stderr
    oldest = re.search(r"cmake_minimum_required\(VERSION (\d+)\.(\d+)", (ROOT / "CMakeLists.txt").read_text())
    assert f"OLDEST_CMAKE = ({oldest[1]}, {oldest[2]})" in (ROOT / "setup.py").read_text()


@needs_setuptools
def test_unknown_choice(tmp_path):
    done = build(tmp_path, RECA_NATIVE="maybe")
    assert done.returncode != 0 and "must be auto, ON or OFF, got 'maybe'" in done.stderr
