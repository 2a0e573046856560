"""python -m benchmarks.sass [--arch 90a]: count the instructions of row_gradients per 8 logits, from its machine code.

Needs nvcc and cuobjdump (included in Triton's wheel), but no GPU. For each dtype, for the plain loss with a bias, it
prints the instructions per loop iteration of both passes, their sum, registers, and the resulting blocks per
multiprocessor.
"""

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FILE = ROOT / "csrc" / "masked_linear_cross_entropy" / "cuda.cu"
NVCC = ("nvcc", "-std=c++17", "-O3", "--expt-relaxed-constexpr", f"-I{ROOT / 'csrc'}")
DTYPES = {"f16": "16", "bf16": "16", "f": "32"}  # type in a mangled name -> bits per element
THREADS, REGISTERS = 512, 65536  # per block; per multiprocessor


class Passes(NamedTuple):
    """Instructions per 8 logits of the two passes of one template instance."""

    dtype: str
    first: float
    second: float

    @property
    def both(self) -> float:
        return self.first + self.second


def tool(name: str) -> str:
    """Return the path of a program of the CUDA toolkit, preferably from Triton's wheel."""
    spec = importlib.util.find_spec("triton")
    carried = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name if spec and spec.origin else Path()
    return str(carried) if carried.is_file() else shutil.which(name) or name


def disassembled(file: Path) -> str:
    return subprocess.run([tool("cuobjdump"), "-sass", str(file)], capture_output=True, text=True, check=True).stdout


def loops(code: str) -> Iterator[tuple[int, str, list[str]]]:
    """Yield every loop of the machine code: index and symbol of its function, instructions including inner loops."""
    for number, section in enumerate(code.split("Function : ")[1:]):
        lines = [(int(at, 16), op) for at, op in re.findall(r"/\*([0-9a-f]{4,})\*/ +([^;]+);", section)]
        for at, op in lines:
            if (target := re.search(r"\bBRA\b.*?0x([0-9a-f]+)", op)) and int(target[1], 16) < at:
                yield number, section.split()[0], [op for place, op in lines if int(target[1], 16) <= place <= at]


def passes(code: str) -> list[Passes]:
    """Count the instructions of every instance of row_gradients_kernel for the plain loss; loops may be unrolled.

    Pass 1 computes a maximum and one exponential more than it has logits, to rescale its sum. Pass 2 has a second loop,
    for negative slopes, which is not counted.
    """
    found: dict[int, tuple[str, list[float], list[float]]] = {}
    for function, symbol, inside in loops(code):
        name = re.search(r"row_gradients_kernelI\w*?(f16|bf16|f)(?:EL|L)b0E", symbol)
        powers = sum("MUFU.EX2" in op for op in inside)
        n = 8 if name and DTYPES[name[1]] == "16" else 4
        if name is None or powers < n or len(inside) > 250:  # not a loop over units, or the loop around both passes
            continue
        is_first = any("FMNMX" in op for op in inside)
        units, left = divmod(powers, n + is_first)
        if left == 0:
            _, first, second = found.setdefault(function, (name[1], [], []))
            (first if is_first else second).append(len(inside) / units * 8 / n)
    return [Passes(name, max(first), min(second)) for name, first, second in found.values()]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sass", description=__doc__)
    parser.add_argument("--arch", default="90a", help="compute capability (default: %(default)s)")
    arch = parser.parse_args(arguments).arch
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "made.o")
        target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
        said = subprocess.run(
            [*NVCC, "-Xptxas", "-v", target, "-c", str(FILE), "-o", str(made)], capture_output=True, text=True
        )
        if said.returncode:
            sys.exit(said.stderr)
        counted = passes(disassembled(made))
    pattern = r"function '\w*row_gradients_kernelI\w*?(f16|bf16|f)(?:EL|L)b0E.*?Used (\d+) registers"
    registers = {name: int(count) for name, count in re.findall(pattern, said.stderr, re.DOTALL)}
    print(f"row_gradients, sm_{arch}, instructions per 8 logits:")
    for one in counted:
        blocks = REGISTERS // (THREADS * -(-registers[one.dtype] // 8) * 8)
        print(
            f"  {'fp32' if one.dtype == 'f' else one.dtype:<5} pass 1 {one.first:5.1f}  pass 2 {one.second:5.1f}  both "
            f"{one.both:5.1f}  registers {registers[one.dtype]}: {blocks} blocks of {THREADS} per multiprocessor"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
