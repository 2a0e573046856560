"""The rows of result files: columns, reading and writing."""

import csv
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

RESULTS = Path(__file__).parent / "results"
FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"
OURS = "ours"
CEILING = "ceiling"  # the op of rows with the measured rates of the device
ALONE = "products alone"  # the matmuls that an op requires: a lower bound, not a rival
BY_SIZE = "size "  # prefix of the names of shapes that are only for choosing a backend


@dataclass(kw_only=True)
class Made:
    """Where, when and with which versions a row was measured: the last columns of every file (`runner.facts`)."""

    device: str = ""
    driver: str = ""
    threads: int | str = ""
    torch: str = ""
    triton: str = ""
    commit: str = ""
    date: str = ""
    command: str = ""


@dataclass
class Row(Made):
    op: str
    shape: str
    provider: str
    mode: str
    dtype: str
    timing: str = ""  # clock, events or graph
    numel: int | str = ""
    ms_p50: float | str = ""
    ms_p20: float | str = ""
    ms_p80: float | str = ""
    bytes: int | str = ""
    gb_per_s: float | str = ""
    percent_copy: float | str = ""
    flops: int | str = ""
    tflop_per_s: float | str = ""
    percent_gemm: float | str = ""
    peak_mb: float | str = ""
    relative_error: float | str = ""
    note: str = ""

    @property
    def case(self) -> tuple[str, str, str, str]:
        """Return what rows of several providers have in common, under one clock."""
        return self.op, self.shape, self.dtype, self.timing


AnyRow = TypeVar("AnyRow", bound=Any)  # a dataclass whose fields are strings, or numbers that may be missing


def read(path: Path, kind: type[AnyRow] = Row) -> list[AnyRow]:
    """Read the rows of a result file; none if it does not exist. Raise ValueError for a file with other columns."""
    if not path.exists():
        return []
    expected = columns(kind)
    texts = {f.name for f in fields(kind) if f.type is str}
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != expected:
            raise ValueError(
                f"{path} has the columns {reader.fieldnames}, expected {expected}; move it away and measure again"
            )
        return [
            kind(**{name: text if name in texts else _number(text) for name, text in row.items()}) for row in reader
        ]


def columns(kind: type) -> list[str]:
    """Return the fields of a row: its own, then those of `Made`."""
    made = [f.name for f in fields(Made)]
    return [f.name for f in fields(kind) if f.name not in made] + made


def _number(text: str) -> str | int | float:
    if text == "":
        return text
    return int(text) if text.isdigit() else float(text)


def digits(x: float) -> str:
    """Format a number with three significant digits, without an exponent."""
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def rounded(x: float) -> float:
    """Keep four significant digits."""
    return float(f"{x:.4g}")


def write(path: Path, rows: list[AnyRow], kind: type[AnyRow] = Row) -> None:
    """Write a result file as a whole: a run that is interrupted here leaves the rows that the file had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = path.with_name(f"{path.stem}_unfinished")
    with made.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns(kind))
        writer.writeheader()
        writer.writerows(map(asdict, rows))
    made.replace(path)


def files(folder: Path) -> list[Path]:
    """Return the result files of a folder, the CPU's first."""
    return sorted(folder.glob("*.csv"), key=lambda path: (path.stem != "cpu", path.stem))


def all_results(device_type: str, folder: Path = RESULTS) -> list[list[Row]]:
    """Return the rows of every result file of a device type, oldest first.

    cpu.csv is for CPUs, all other files for GPUs.
    """
    paths = [path for path in files(folder) if (path.stem == "cpu") == (device_type == "cpu")]
    return sorted(filter(None, map(read, paths)), key=lambda rows: max(row.date for row in rows))


def complete(rows: list[Row]) -> list[Row]:
    """Return the timed rows of complete calls: forward and backward, or forward for an op without gradients."""
    both = {row.op for row in rows if row.mode == BOTH}
    return [row for row in rows if row.ms_p50 != "" and row.mode == (BOTH if row.op in both else FORWARD)]


def floor_ms(row: Row) -> float:
    """Return the lower bound for a complete call by the ceilings of the same run; 0 if unknown."""
    return row.ms_p50 * max((s for s in (row.percent_copy, row.percent_gemm) if s != ""), default=0.0) / 100
