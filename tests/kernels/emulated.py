"""csrc/*/cuda.cu on the CPU: the same files and bindings, compiled by a C++ compiler against emulator/cuda_runtime.h.

A test parametrised with backend "cuda" on device "cpu" (see backends.py) runs on it.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from tests import compiled

ROOT = Path(__file__).parents[2]
FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-w")
FLAGS += ('-DRECA_CUDA_ARCHS="emulated"', '-DRECA_SOURCES="emulated"')
# A GPU refuses an access of 8 or 16 bytes that is not aligned to as many; here it ends the process (SIGILL).
FLAGS += ("-fsanitize=alignment", "-fsanitize-undefined-trap-on-error")
RACES = ("-fsanitize=thread",)  # of emulator/races.h


def missing() -> str | None:
    """Why the emulator cannot be built here."""
    if sys.platform != "linux":  # macOS's g++ is Clang
        return "the CUDA emulator is built on Linux"
    if shutil.which("g++") is None:
        return "no g++ to build the CUDA emulator with"
    if _pybind11() is None:
        return "no pybind11 to build the CUDA emulator with"
    return None


def _pybind11() -> Path | None:
    for package in ("pybind11", "torch"):
        spec = importlib.util.find_spec(package)
        for folder in spec.submodule_search_locations if spec else ():
            if (Path(folder) / "include" / "pybind11" / "pybind11.h").exists():
                return Path(folder) / "include"
    return None


def sources() -> list[Path]:
    """The kernels, and what stands in for CUDA."""
    folders = (ROOT / "csrc", Path(__file__).parent / "emulator")
    return [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]


def build(find_races: bool = False) -> ModuleType:
    """Return the native module whose launchers work on any device but the host.

    find_races: a data race of a kernel ends the process, with a line on stderr. Kernels take four times as long.
    """
    emulator, csrc, pybind11 = Path(__file__).parent / "emulator", ROOT / "csrc", _pybind11()
    flags = [*FLAGS, *(f"-I{path}" for path in (emulator, csrc, pybind11, sysconfig.get_paths()["include"]))]
    bindings = [csrc / "module.cpp", csrc / "common/sources.cpp", *sorted(csrc.glob("*/bind.cpp"))]
    kernels = sorted(csrc.glob("*/cuda.cu"))

    def compile_to(library: Path) -> None:
        together = library.with_name("bindings.cpp")  # pybind11 is compiled once
        together.write_text("".join(f'#include "{path}"\n' for path in bindings))

        def compile_one(source: Path) -> str:
            target = library.with_name(f"{source.parent.name}.{source.name}.o")
            optimise = "-O1" if source.suffix == ".cu" else "-O0"
            watched = RACES if find_races and source.suffix == ".cu" else ()
            _run(["g++", optimise, *flags, *watched, "-x", "c++", "-c", str(source), "-o", str(target)])
            return str(target)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, [together, *kernels]))
        # The CPU kernels stay out, their symbols unresolved: nothing calls them.
        _run(["g++", "-shared", "-Wl,-z,lazy", "-o", str(library), *objects])

    versions = [compiled.version("g++"), sys.version, (pybind11 / "pybind11/detail/common.h").read_text()]
    name = "_native_with_races.so" if find_races else "_native.so"
    path = compiled.once(name, [Path(__file__), *sources(), *flags, *versions], compile_to)
    flags_before = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_LAZY | os.RTLD_LOCAL)
    try:
        spec = importlib.util.spec_from_file_location("_native", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.setdlopenflags(flags_before)
    return module


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
