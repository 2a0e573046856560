"""Formatting of quantities, lists and tables as text, and parsing of sizes."""

import re
from collections.abc import Sequence

BYTES = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes"))
FLOPS = ((1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (1e3, "kFLOP"), (1, "FLOP"))


def largest(amount: float, units: tuple[tuple[float, str], ...]) -> tuple[float, str]:
    """Return the value and name of the largest unit that is at most `amount`; of the smallest unit if none is."""
    return next((unit for unit in units if amount >= unit[0]), units[-1])


def counted(number: int, thing: str) -> str:
    """Format a count with its noun, such as 1 GPU or 2 GPUs."""
    return f"{number} {thing}{'s' * (number != 1)}"


def some(names: Sequence[str]) -> str:
    """List the first three names and the number of others."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align the columns of a table. Return its lines."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def size(count: float) -> str:
    """Format a number of bytes, such as 1.50 GiB or 132 bytes."""
    unit, name = largest(count, BYTES)
    return f"{count / unit:.{2 if unit > 1 else 0}f} {name}"


def parse_size(text: str) -> int:
    """Parse a memory size, such as 80GiB (2^30 bytes each) or 141GB (10^9). Return bytes. Raises ValueError."""
    match = re.fullmatch(r"\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*(GiB|GB)\s*", text)
    if not match or not float(match[1]):
        raise ValueError(f"{text[:40]!r} is not a memory size: write it as 80GiB or 141GB")
    return int(float(match[1]) * (2**30 if match[2] == "GiB" else 10**9))
