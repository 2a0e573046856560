"""What a launcher of processes, such as torchrun, sets in environment variables. Imports no torch."""

import os


def number(name: str, default: int) -> int:
    """Return a whole number that a launcher has set; `default` if the variable is not set or contains another text.

    A batch script may set it from a variable that is empty outside of a job, or from a list such as SLURM's 8(x2).
    """
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


def is_launched() -> bool:
    """Tell whether a launcher has started this process as one of several ranks."""
    return bool(os.environ.get("RANK"))


def is_main_process() -> bool:
    """Tell whether this is rank 0, which prints for the user; also before the process group exists."""
    return number("RANK", 0) == 0
