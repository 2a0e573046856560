"""Amounts with their units."""

BYTES = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "bytes"))
FLOPS = ((1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (1e3, "kFLOP"), (1, "FLOP"))


def largest(amount: float, units: tuple[tuple[float, str], ...]) -> tuple[float, str]:
    """Choose the largest unit that an amount has one of; the smallest if it has none. Returns its value and name."""
    return next((unit for unit in units if amount >= unit[0]), units[-1])


def size(count: float) -> str:
    """Write a number of bytes, such as 1.50 GiB or 132 bytes."""
    unit, name = largest(count, BYTES)
    return f"{count / unit:.{2 if unit > 1 else 0}f} {name}"
