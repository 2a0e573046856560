"""Every CUDA kernel, compiled for the architectures of a release: no spills, no local memory, few enough registers.

The budget is nvcc_budget.csv: per kernel the most registers that any of its instances may use on any architecture, and
what each instance must do 128 bits at a time somewhere: load, store, both; and the most instructions that its longest
loop may have (a turn of flow matching's handles eight elements). A kernel that is not in it fails.
"""

import csv
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from benchmarks import sass
from tests import compiled

ROOT = Path(__file__).parents[2]
ARCHS = (80, 90, 100)
FILES = sorted((ROOT / "csrc").glob("*/cuda.cu"))
BUDGET = Path(__file__).with_name("nvcc_budget.csv")

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc in PATH")


def name_of(symbol: str) -> str:
    """The kernel's own name in a mangled one: the last of the length-prefixed names before its template arguments."""
    rest, name = re.sub(r"^_ZN?", "", symbol), ""
    while match := re.match(r"(\d+)", rest):
        length = int(match[1])
        name, rest = rest[match.end() : match.end() + length], rest[match.end() + length :]
    return name


def test_names_are_read_from_symbols():
    assert name_of("_ZN4reca4cuda41_GLOBAL__N__458a7d03_9_philox_cu_155099c118philox_fill_kernelILi0EEEvl") == (
        "philox_fill_kernel"
    )
    assert name_of("_Z4copyPf") == "copy"


def compile_once(file: Path) -> Path:
    """The object file of a source for all architectures, and beside it what ptxas says, in usage.txt."""
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    command = ["nvcc", "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v", f"-I{ROOT / 'csrc'}", *targets]
    headers = sorted((ROOT / "csrc").rglob("*.h*")) + sorted((ROOT / "csrc").rglob("*.cuh"))

    def compile_to(made: Path) -> None:
        done = subprocess.run([*command, "-c", str(file), "-o", str(made)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        made.with_name("usage.txt").write_text(done.stderr)

    parts = [file, *headers, *command, compiled.version("nvcc")]
    return compiled.once(f"{file.parent.name}.o", parts, compile_to)


def usage_of(said: str) -> dict[str, list[str]]:
    """Per kernel, what ptxas says about each of its instances on each architecture."""
    usage = defaultdict(list)
    for symbol, used in re.findall(
        r"Compiling entry function '(\w+)' for.*?\n(.*?Used \d+ registers.*?)\n", said, re.DOTALL
    ):
        usage[name_of(symbol)].append(used)
    return usage


def wide_accesses(code: str) -> dict[str, list[set[str]]]:
    """Per kernel and instance, which of "load" and "store" its machine code does 128 bits at a time."""
    wide = defaultdict(list)
    for section in code.split("Function : ")[1:]:
        ops = re.findall(r"\b(?:LDG|LDGSTS|STG)(?:\.\w+)*\.128\b", section)
        wide[name_of(section.split()[0])].append({"store" if op.startswith("STG") else "load" for op in ops})
    return wide


def longest_loops(code: str) -> dict[str, int]:
    """Per kernel, the instructions of the longest loop in the machine code of any instance."""
    longest = defaultdict(int)
    for _, symbol, inside in sass.loops(code):
        longest[name_of(symbol)] = max(longest[name_of(symbol)], len(inside))
    return longest


def check_passes(code: str) -> None:
    """Count what row_gradients_kernel does for 8 logits, plain loss: at most 190 instructions, both passes.

    In a row of Show-o a scheduler has 57 of these units: 190 instructions each are 6.2 us at 1.75 GHz, and the memory
    of an H200 takes 7.2 us for 16-bit logits.
    """
    counted = sass.passes(code)
    assert sorted(one.dtype for one in counted) == sorted([*sass.DTYPES] * len(ARCHS))
    for one in counted:
        assert 100 < one.both <= 190, one


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.parent.name)
def test_registers_and_no_spills(file):
    with BUDGET.open() as rows:
        table = list(csv.DictReader(rows))
    budget = {row["kernel"]: int(row["registers"]) for row in table}
    made = compile_once(file)
    usage = usage_of(made.with_name("usage.txt").read_text())
    assert usage, f"{file} holds no kernel"
    for kernel, instances in usage.items():
        for said in instances:
            assert re.search(r"\b0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", said), (kernel, said)
            assert "bytes lmem" not in said, (kernel, said)
        most = max(int(re.search(r"Used (\d+) registers", said)[1]) for said in instances)
        assert kernel in budget, f"{kernel} uses {most} registers; add it to {BUDGET.name}"
        assert most <= budget[kernel], f"{kernel} uses {most} registers, {BUDGET.name} allows {budget[kernel]}"
    code = sass.disassembled(made)
    asked = {row["kernel"]: {"both": {"load", "store"}}.get(row["wide"], {row["wide"]}) for row in table if row["wide"]}
    if asked.keys() & usage.keys():
        for kernel, instances in wide_accesses(code).items():
            for found in instances:
                missing = asked.get(kernel, set()) - found
                assert not missing, f"{kernel}: an instance does no 128-bit {' or '.join(missing)}"
    allowed = {row["kernel"]: int(row["loop"]) for row in table if row["loop"]}
    if allowed.keys() & usage.keys():
        for kernel, found in longest_loops(code).items():
            assert found <= allowed.get(kernel, found), (
                f"{kernel}: a loop of {found} instructions, not {allowed[kernel]}"
            )
    if file.parent.name == "masked_linear_cross_entropy":
        check_passes(code)


def test_every_row_of_the_budget_is_a_kernel():
    sources = "".join(file.read_text() for file in FILES)
    with BUDGET.open() as rows:
        for row in csv.DictReader(rows):
            assert re.search(rf"\b{row['kernel']}\(", sources), f"{BUDGET.name}: no kernel {row['kernel']}"
