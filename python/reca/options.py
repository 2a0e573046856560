"""How a recipe key is declared: a dataclass field that carries its own documentation."""

from dataclasses import MISSING, field, fields
from typing import Any


def option(default: Any = MISSING, doc: str = "", choices: tuple | None = None) -> Any:
    """A documented recipe key. Mutable defaults (lists, nested configs) are given as a callable."""
    metadata = {"doc": doc, "choices": choices}
    if default is MISSING:
        return field(metadata=metadata)
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def check_choices(config: Any) -> None:
    """Raise ValueError when a field of `config` is outside the choices it declared."""
    for f in fields(config):
        choices = f.metadata.get("choices")
        value = getattr(config, f.name)
        if choices and value not in choices:
            raise ValueError(f"{f.name}={value!r} is not one of {', '.join(map(repr, choices))}")
