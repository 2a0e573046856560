"""How a recipe key is declared: a dataclass field that carries its own documentation."""

from dataclasses import MISSING, field, fields
from typing import Any


def option(default: Any = MISSING, doc: str = "", choices: tuple | None = None, least: float | None = None) -> Any:
    """A documented recipe key. Mutable defaults (lists, nested configs) are given as a callable.

    choices: all values there are. least: the smallest that a number may be.
    """
    metadata = {"doc": doc, "choices": choices, "least": least}
    if default is MISSING:
        return field(metadata=metadata)
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def check_values(config: Any, prefix: str = "") -> None:
    """Raise ValueError when a field of `config` is outside what it declared. prefix: of the keys, in the message."""
    for f in fields(config):
        choices, least, value = f.metadata.get("choices"), f.metadata.get("least"), getattr(config, f.name)
        if choices and value not in choices:
            raise ValueError(f"{prefix}{f.name}={value!r} is not one of {', '.join(map(repr, choices))}")
        if least is not None and value is not None and not value >= least:
            raise ValueError(f"{prefix}{f.name}={value:g} must be at least {least:g}")
