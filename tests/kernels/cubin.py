"""What the compiler made of Triton kernels, on any machine: registers, local memory, width of loads and stores.

    def launches(): forward(torch.empty(...), ...)        # a launcher of an op's triton.py, on CPU tensors

    for made in cubin.compiled(launches):                 # one per kernel, specialisation and GPU
        made.assert_lean(loads=(128,), stores=(128,))

`launches` must be a function at the top of its test module. It runs in one fresh process without the interpreter, once
per GPU, on a driver that compiles what is launched and launches nothing. So the kernels are those a GPU would run, with
the alignments that Triton finds in the very arguments; tensors may be uninitialised, and large ones cost nothing.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from benchmarks.sass import tool
from tests import compiled as compiled_files

ARCHS = (80, 90, 100)
ROOT = Path(__file__).parents[2]


class Cubin(NamedTuple):
    kernel: str
    arch: int
    constants: dict[str, object]  # what was compiled in
    registers: int
    local: int  # bytes of stack and local memory per thread; a spill shows here
    shared: int
    loads: dict[int, int]  # bits -> how many instructions that load from global memory
    stores: dict[int, int]

    def assert_lean(self, *, registers: int = 255, loads: tuple[int, ...] = (), stores: tuple[int, ...] = ()) -> None:
        """No local memory, at most so many registers, and accesses of these widths among the others."""
        assert self.local == 0, f"{self}: spills, or an array that is indexed at run time"
        assert self.registers <= registers, f"{self}: more than {registers} registers"
        for widths, found in ((loads, self.loads), (stores, self.stores)):
            assert all(found.get(width) for width in widths), f"{self}: wanted accesses of {widths} bits"


@cache
def compiled(launches: Callable[[], object], archs: tuple[int, ...] = ARCHS) -> list[Cubin]:
    """Every kernel that `launches` launches, compiled for each GPU. Skips the test where triton is not installed."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "RECA_BACKEND")}
    path = [str(ROOT), str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", __name__, launches.__module__, launches.__name__, *map(str, archs)]

    def compile_to(made: Path) -> None:
        done = subprocess.run(
            command, env={**environment, "PYTHONPATH": os.pathsep.join(path)}, cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        made.write_text(done.stdout.splitlines()[-1])

    folders = ROOT / "reca_kernels", ROOT / "tests/kernels", ROOT / "benchmarks"
    sources = [file for folder in folders for file in sorted(folder.rglob("*.py"))]
    versions = [torch.__version__, metadata.version("triton"), sys.version, compiled_files.version(tool("cuobjdump"))]
    name = f"{launches.__module__.rpartition('.')[2]}.{launches.__name__}.json"
    found = json.loads(compiled_files.once(name, [*sources, *command, *versions], compile_to).read_text())
    return [
        Cubin(**{**made, **{k: {int(w): n for w, n in made[k].items()} for k in ("loads", "stores")}}) for made in found
    ]


# ---- in the other process ----


def _inspect(cubin: bytes) -> dict[str, object]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([tool("cuobjdump"), flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    in_local = len(re.findall(r"\b(?:LDL|STL)\b", code))
    widths = {
        # LDG.E.128, LDG.E.U16, LDG.E (32 bits), with words such as EF or CONSTANT between
        name: Counter(
            int(re.search(r"\.[US]?(8|16|64|128)\b", op)[1]) if re.search(r"\.[US]?(8|16|64|128)\b", op) else 32
            for op in re.findall(rf"\b({mnemonic}(?:\.\w+)*)", code)
        )
        for name, mnemonic in (("loads", "LDG"), ("stores", "STG"))
    }
    local = numbers["STACK"] + numbers["LOCAL"] + in_local
    return {"registers": numbers["REG"], "local": local, "shared": numbers["SHARED"], **widths}


def _main(module: str, name: str, archs: list[int]) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    class CompileOnly:
        """Stands for a machine with a GPU of one kind; its devices are numbered by their kind."""

        def __init__(self, arch: int) -> None:
            self.arch = arch

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", self.arch, 32)

        def get_current_device(self) -> int:
            return self.arch

        def get_current_stream(self, device: int) -> int:
            return 0

    made, run, seen = [], JITFunction.run, set()

    def compile_only(self: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: object) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if (self.fn.__name__, kernel.hash) in seen:
            return
        seen.add((self.fn.__name__, kernel.hash))
        names = list(self.arg_names)
        constants = {names[path[0]]: value for path, value in kernel.src.constants.items()}
        plain = {k: v if isinstance(v, int | float | str | None) else str(v) for k, v in constants.items()}
        made.append(
            {
                "kernel": self.fn.__name__,
                "arch": kernel.metadata.target.arch,
                "constants": plain,
                **_inspect(kernel.asm["cubin"]),
            }
        )

    JITFunction.run = compile_only
    launches = getattr(importlib.import_module(module), name)
    for arch in archs:
        driver.set_active(CompileOnly(arch))
        launches()
    print(json.dumps(made))


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2], [int(arch) for arch in sys.argv[3:]])
