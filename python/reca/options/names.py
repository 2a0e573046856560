"""Names in messages: options as the reader writes them, and what a misspelt name may stand for."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from typing import Any

Form = Callable[[str, Any], str]


FEWEST = 4  # letters of a part of a name that may stand for the whole


def nearest(name: str, names: Iterable[Any]) -> str | None:
    """Return the one of `names` that a misspelt name may stand for, or one that begins with it or contains it.

    Letters may be of either case. Return None if none is near.
    """
    name = name[:200].lower()
    known = {str(one).lower(): str(one) for one in names}
    near = get_close_matches(name, known, 1, 0.75)
    if not near and len(name) >= FEWEST:
        near = sorted((one for one in known if name in one), key=lambda one: not one.startswith(name))
    return known[near[0]] if near else None


def hint(name: Any, names: Iterable[Any]) -> str:
    """Return the end of a message about a wrong name, such as "; did you mean geneval?"; empty if none is near."""
    near = nearest(name, names) if isinstance(name, str) else None
    return f"; did you mean {near}?" if near else ""


def argument(name: str, value: Any) -> str:
    """Write an argument of a function, such as data='PATH'."""
    return name if value is None else f"{name}={value!r}"


def flag(name: str, value: Any) -> str:
    """Write an option of the command line, such as --data PATH. An item of a dict is an option by itself."""
    if isinstance(value, dict):
        return " ".join(f"--{name.removesuffix('s').replace('_', '-')} {key}={item}" for key, item in value.items())
    text = ",".join(value) if isinstance(value, list) else str(value)
    return f"--{name.replace('_', '-')}" + ("" if value in (None, True) else f" {text}")


_form: Form = argument


def option(name: str, value: Any = None) -> str:
    """Name an option, with a value if one is given. name: that of the argument in Python."""
    return _form(name, value)


@contextlib.contextmanager
def written_as(form: Form) -> Iterator[None]:
    """Write options in this form inside the context, also those in messages of threads."""
    global _form
    before, _form = _form, form
    try:
        yield
    finally:
        _form = before
