"""Environment variables: temporary ones, and numbers that a launcher sets."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


def number(name: str, default: int) -> int:
    """Return a whole number that a launcher has set; `default` if the variable is not set or contains another text.

    A batch script may set it from a variable that is empty outside of a job, or from a list such as SLURM's 8(x2).
    """
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Set environment variables inside the context, also for processes that start in it, and restore them after."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
