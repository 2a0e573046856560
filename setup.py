"""Build the native module with CMake. Requires only the standard library and setuptools, and never imports torch.

RECA_NATIVE      auto (default): pure Python if a C++ compiler, CMake or pybind11 is missing; ON: this is an error;
                 OFF: pure Python. A build that starts and fails is always an error.
RECA_CUDA        auto (default): CUDA kernels if nvcc is found; ON; OFF
RECA_CUDA_ARCHS  architectures such as 80, 90a or 100f: machine code for each, and PTX for the last; default
                 "80;90;100", without those that nvcc does not support
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OLDEST_CMAKE = (3, 26)  # as in CMakeLists.txt
OLDEST_GCC = 9  # the first with __builtin_convertvector
CUDA_ARCHS = "80;90;100"  # as in CMakeLists.txt


class MissingTool(Exception):
    """A tool that is needed to build the native module is missing."""


def package_folders(name: str) -> list[Path]:
    """Return the folders of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    return [Path(folder) for folder in spec.submodule_search_locations] if spec else []


def find_program(name: str, *folders: Path) -> str | None:
    return shutil.which(name, path=os.pathsep.join(map(str, folders))) or shutil.which(name)


def find_cmake() -> str:
    cmake = find_program("cmake", *(folder / "data" / "bin" for folder in package_folders("cmake")))
    if cmake is None:
        raise MissingTool("CMake was not found; pip install cmake")
    text = subprocess.run([cmake, "--version"], capture_output=True, text=True).stdout
    version = tuple(map(int, re.findall(r"\d+", text)[:2]))
    if version < OLDEST_CMAKE:
        found, oldest = (".".join(map(str, v)) for v in (version, OLDEST_CMAKE))
        raise MissingTool(f"{cmake} is version {found or 'unknown'}, older than {oldest}; pip install cmake")
    return cmake


def find_pybind11() -> Path:
    """Return the headers of the pybind11 package, or the copy in torch's wheel."""
    for package in ("pybind11", "torch"):
        for folder in package_folders(package):
            if (folder / "include" / "pybind11" / "pybind11.h").exists():
                return folder / "include"
    raise MissingTool("pybind11 was not found; pip install pybind11")


def find_compiler() -> str:
    """Return a compiler's path and, as further items of a CMake list, the arguments of CXX, such as "ccache g++"."""
    names = [os.environ["CXX"]] if os.environ.get("CXX", "").strip() else ["c++", "g++", "clang++"]
    too_old = []
    for name in names:
        program, *arguments = shlex.split(name)
        path = shutil.which(program)
        if path is None:
            continue
        version = gcc_version([path, *arguments])
        if version is None or version >= OLDEST_GCC:
            return ";".join([path, *arguments])
        too_old.append(f"{name} is GCC {version}, older than {OLDEST_GCC}")
    found = "; ".join(too_old) or f"no C++ compiler was found among {', '.join(names)}"
    raise MissingTool(f"{found}; install {'a newer one' if too_old else 'one'} or set CXX")


def gcc_version(compiler: list[str]) -> int | None:
    """Return a compiler's major version, None if it is not GCC. Clang calls itself GCC 4.2 as well."""
    command = [*compiler, "-dM", "-E", "-x", "c++", os.devnull]
    macros = dict(re.findall(r"#define (\S+) (.*)", subprocess.run(command, capture_output=True, text=True).stdout))
    return int(macros["__GNUC__"]) if "__GNUC__" in macros and "__clang__" not in macros else None


def cuda_archs() -> str:
    """Return RECA_CUDA_ARCHS; by default those of CUDA_ARCHS that nvcc supports."""
    if asked := os.environ.get("RECA_CUDA_ARCHS"):
        if not re.fullmatch(r"\d+[af]?(;\d+[af]?)*", asked):
            raise SystemExit(
                f"RECA_CUDA_ARCHS must be architectures separated by ;, such as {CUDA_ARCHS} or 90a, got {asked!r}; "
                "instead of native or all, give the compute capability shown by nvidia-smi --query-gpu=compute_cap"
            )
        return asked
    nvcc = shutil.which(os.environ.get("CUDACXX") or "nvcc")
    if nvcc is None:
        return CUDA_ARCHS
    text = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    known = re.findall(r"compute_(\w+)", text)
    archs = CUDA_ARCHS.split(";")
    if unknown := [arch for arch in archs if arch not in known]:
        print(f"reca_kernels: {nvcc} does not support {', '.join(unknown)}: removed from RECA_CUDA_ARCHS")
    return ";".join(arch for arch in archs if arch in known)


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        native = os.environ.get("RECA_NATIVE", "auto").lower()
        if native not in ("auto", "on", "off"):
            raise SystemExit(f"RECA_NATIVE must be auto, ON or OFF, got {native!r}")
        if native == "off":
            return
        try:
            configure = [
                find_cmake(),
                f"-S{ROOT}",
                f"-B{Path(self.build_temp).resolve()}",
                f"-DCMAKE_CXX_COMPILER={find_compiler()}",
                f"-DRECA_PYBIND11_INCLUDE={find_pybind11()}",
            ]
        except MissingTool as missing:
            if native == "on":
                raise SystemExit(f"RECA_NATIVE=ON, but the native module cannot be built: {missing}") from None
            rule = "!" * 100
            self.warn(
                f"\n{rule}\nreca_kernels: THE NATIVE MODULE IS NOT BUILT: {missing}\n"
                "Installing pure Python: on CPUs every op runs on its slow PyTorch reference.\n"
                "`reca doctor` reports this. Install the missing tool, then reinstall with pip's --force-reinstall "
                f"--no-deps --no-cache-dir.\n{rule}"
            )
            return
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        configure += [
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DRECA_MODULE_FILE={target.name}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DRECA_CUDA={os.environ.get('RECA_CUDA', 'auto')}",
            f"-DRECA_CUDA_ARCHS={cuda_archs()}",
        ]
        if ninja := find_program("ninja", Path(sys.executable).parent):
            configure += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(configure, check=True)
        subprocess.run([configure[0], "--build", self.build_temp, "--parallel", str(os.cpu_count())], check=True)


setup(
    packages=[*find_packages("python", include=["reca*"]), *find_packages(include=["reca_kernels*"])],
    package_dir={"reca": "python/reca"},
    package_data={
        "reca": ["py.typed", "**/*.yaml", "**/*.json", "**/*.jsonl", "**/*.html", "**/*.md", "**/*.txt"],
        "reca_kernels": ["py.typed", "**/*.json"],
    },
    ext_modules=[Extension("reca_kernels._native", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
