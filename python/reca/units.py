"""Amounts in words."""

BYTES = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))


def size(count: float) -> str:
    """Write a number of bytes as a person reads it, such as 1.50 GiB."""
    unit, name = next((u for u in BYTES if count >= u[0]), BYTES[-1])
    return f"{count / unit:.{2 if unit > 1 else 0}f} {name}"
