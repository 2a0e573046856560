"""The native module as it was built, and setup.py where tools are missing."""

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

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


def test_a_module_of_other_sources_is_refused(monkeypatch):
    """As after an update of the sources without a build: arguments may have changed, or faults been mended."""
    name = "reca_kernels._native"
    built = importlib.import_module(name) if importlib.util.find_spec(name) else None
    spec = importlib.util.spec_from_file_location("reca_kernels.other_native", native.__file__)
    other = importlib.util.module_from_spec(spec)
    stale = SimpleNamespace(sources="0", __file__="_native.so")
    monkeypatch.setitem(sys.modules, name, stale)
    with pytest.warns(RuntimeWarning, match="was built from other sources than those in .*pip install -e "):
        spec.loader.exec_module(other)
    assert other.module is None and "pip install -e" in other.missing
    if built:
        assert built.sources == native._sources(), "CMake and Python do not compute the same"
        assert native.module is built
    monkeypatch.setattr(other, "ROOT", Path("/nowhere"))
    assert other._sources() == "", "an installed package has no sources beside it"


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
def test_a_compiler_that_is_too_old_is_passed_over(tmp_path):
    """Red Hat 8 comes with GCC 8, which would fail in the middle of the build."""
    for name, macro in [("c++", "__GNUC__ 8"), ("g++", "__GNUC__ 8"), ("clang++", "__GNUC__ 4\n#define __clang__ 1")]:
        (tmp_path / name).write_text(f"#!/bin/sh\necho '#define {macro}'\n")
        (tmp_path / name).chmod(0o755)
    assert compiler(PATH=str(tmp_path)) == str(tmp_path / "clang++")
    assert "MissingTool: c++ is GCC 8, older than 9; install a newer one or set CXX" in compiler(
        PATH=str(tmp_path), CXX="c++"
    )


def compiler(**environment):
    """Return what setup.py compiles with, or its error."""
    code = "import setuptools; setuptools.setup = lambda **_: None; import setup; print(setup.find_compiler())"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    return done.stdout.strip() or done.stderr


@needs_setuptools
@pytest.mark.parametrize(
    ("given", "program", "arguments"), [("env c++", "env", ";c++"), ("c++ -m64", "c++", ";-m64"), (" ", "c++", "")]
)
def test_a_compiler_may_have_arguments(given, program, arguments):
    """As CXX="ccache g++" has."""
    assert compiler(CXX=given) == f"{shutil.which(program)}{arguments}"


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


# Without the bindings, which need pybind11, and the digest, which CMake gives.
CPP_SOURCES = [path for path in sorted((ROOT / "csrc").glob("*/*.cpp")) if path.stem in ("cpu", "isa")]


@pytest.mark.skipif(shutil.which("clang++") is None, reason="no clang++")
@pytest.mark.parametrize("source", CPP_SOURCES, ids=lambda source: f"{source.parent.name}-{source.stem}")
def test_clang_takes_the_sources(tmp_path, source):
    """It is macOS's compiler, and setup.py takes it where there is no other; it knows not all builtins of GCC."""
    isa = ["-DRECA_ISA=baseline", "-DRECA_ISA_baseline"]
    command = ["clang++", "-std=c++17", f"-I{ROOT / 'csrc'}", *isa, "-c", str(source), "-o", str(tmp_path / "out.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_setuptools
def test_a_source_distribution_can_be_built(tmp_path):
    """`python -m build` makes the wheel of one, and CMake finds its sources there."""
    command = [sys.executable, "setup.py", "-q", "egg_info", "-e", str(tmp_path), "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")}
    assert sources | {"CMakeLists.txt", "setup.py", "pyproject.toml"} <= packed


def cuda_archs(**environment):
    """What setup.py compiles for, below what it prints; its stderr where it refuses."""
    code = "import setuptools; setuptools.setup = lambda **_: None; import setup; print(setup.cuda_archs())"
    kept = {name: value for name, value in os.environ.items() if name not in ("RECA_CUDA_ARCHS", "CUDACXX")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env={**kept, **environment}, capture_output=True, text=True)
    return done.stdout.splitlines() if done.returncode == 0 else done.stderr


@needs_setuptools
@pytest.mark.parametrize("by", ["PATH", "CUDACXX"])
def test_archs_that_nvcc_does_not_know_are_left_out(tmp_path, by):
    """Toolkits before 12.8 do not know 100. What was asked for stays."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\n[ $1 = --list-gpu-arch ] && echo compute_75 && echo compute_80 && echo compute_90\n")
    nvcc.chmod(0o755)
    found = {by: str(tmp_path if by == "PATH" else nvcc)}
    said = f"reca_kernels: {nvcc} does not support 100: removed from RECA_CUDA_ARCHS"
    assert cuda_archs(**found) == [said, "80;90"]
    assert cuda_archs(**found, RECA_CUDA_ARCHS="90a;100") == ["90a;100"]
    assert cuda_archs(PATH="") == ["80;90;100"]
    assert 'set(RECA_CUDA_ARCHS "80;90;100"' in (ROOT / "CMakeLists.txt").read_text()


@needs_setuptools
@pytest.mark.parametrize("archs", ["native", "all", "all-major", "90-real", "80,90", "9.0"])
def test_archs_are_numbers(archs):
    said = f"RECA_CUDA_ARCHS must be architectures separated by ;, such as 80;90;100 or 90a, got {archs!r}"
    assert said in cuda_archs(RECA_CUDA_ARCHS=archs)


@pytest.mark.parametrize(
    ("archs", "runs", "does_not"),
    [
        ("80-real 90-real 100", [(8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)], [(7, 5)]),
        ("80-real 90-real", [(8, 6), (9, 0)], [(10, 0)]),
        ("86", [(8, 6), (8, 9), (9, 0)], [(8, 0)]),
        ("90a", [(9, 0)], [(9, 1), (10, 0), (8, 0)]),
        ("90a-real 100f", [(9, 0), (10, 0), (10, 3)], [(8, 0), (11, 0), (12, 0)]),
        ("103f", [(10, 3)], [(10, 0), (12, 0)]),
        ("", [], [(8, 0)]),
    ],
)
def test_which_gpus_a_build_runs_on(monkeypatch, archs, runs, does_not):
    monkeypatch.setattr(native, "module", SimpleNamespace(cuda_archs=archs))
    assert [c for c in runs + does_not if native.cuda_runs_on(c)] == runs


@needs_setuptools
def test_unknown_choice(tmp_path):
    done = build(tmp_path, RECA_NATIVE="maybe")
    assert done.returncode != 0 and "must be auto, ON or OFF, got 'maybe'" in done.stderr
