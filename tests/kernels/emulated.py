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

ROOT = Path(__file__).parents[2]
FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-w")
FLAGS += ('-DRECA_CUDA_ARCHS="emulated"', '-DRECA_SOURCES="emulated"')
# A GPU refuses an access of 8 or 16 bytes that is not aligned to as many; here it ends the process (SIGILL).
FLAGS += ("-fsanitize=alignment", "-fsanitize-undefined-trap-on-error")
RACES = ("-fsanitize=thread",)  # of emulator/races.h


def missing() -> str | None:
    """Why the emulator cannot be built here."""
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


def build(folder: Path, find_races: bool = False) -> ModuleType:
    """Build the native module in `folder`, whose launchers work on any device but the host.

    find_races: a data race of a kernel ends the process, with a line on stderr. Kernels take four times as long.
    """
    includes = [Path(__file__).parent / "emulator", ROOT / "csrc", _pybind11()]
    flags = [*FLAGS, *(f"-I{path}" for path in (*includes, sysconfig.get_paths()["include"])), "-x", "c++"]
    bindings = [ROOT / "csrc/module.cpp", ROOT / "csrc/common/sources.cpp", *sorted((ROOT / "csrc").glob("*/bind.cpp"))]
    together = folder / "bindings.cpp"  # pybind11 is compiled once
    together.write_text("".join(f'#include "{path}"\n' for path in bindings))
    sources = [together, *sorted((ROOT / "csrc").glob("*/cuda.cu"))]

    def compile_one(source: Path) -> str:
        target = folder / f"{source.parent.name}.{source.name}.o"
        optimise = "-O1" if source.suffix == ".cu" else "-O0"
        watched = RACES if find_races and source.suffix == ".cu" else ()
        _run(["g++", optimise, *flags, *watched, "-c", str(source), "-o", str(target)])
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    path = folder / "_native.so"
    # The CPU kernels stay out, their symbols unresolved: nothing calls them.
    _run(["g++", "-shared", "-Wl,-z,lazy", "-o", str(path), *objects])
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
