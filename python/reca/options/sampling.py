"""Options of a sampler or a judge, given as key=value and validated against the signature of the method or class."""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from reca.options.values import guess

# minimum and maximum of options by name, for all methods
LIMITS = dict.fromkeys(("steps", "batch", "height", "width", "diffusion_steps", "max_new_tokens"), (1, math.inf)) | {
    "timeout": (0.001, 86400), "tries": (1, 1000), "workers": (1, 1000), "requests_per_minute": (0.001, 1e6),
    "max_tokens": (1, 1e6), "price_in": (0, 1e6), "price_out": (0, 1e6), "threshold": (0, 1),
    "temperature": (0, math.inf),
}  # fmt: skip
TYPE_NAMES = {int: "a whole number", float: "a number", str: "a string", NoneType: "null"}


def read_pairs(texts: Iterable[str], name: str) -> dict[str, Any]:
    """Parse key=value options of the command line. name: the option they were passed with, such as --sampling.

    Raises ValueError for a text without = or without a value.
    """
    given = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not value.strip():
            raise ValueError(f"{name} {text!r} has no {'value' if equals else repr('=')}; write {name} key=value")
        given[key.strip()] = guess(value, f"{name} {key.strip()}")
    return given


def defaults(method: Callable) -> dict[str, Any]:
    """Return the defaults of a method's sampling options, which are its keyword-only parameters."""
    parameters = inspect.signature(method).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def check_sampling_options(method: Callable, given: Mapping[str, Any], what: str = "sampling option") -> dict[str, Any]:
    """Validate options against the keyword-only parameters of a method or class. Return them as keyword arguments.

    what: the word for an option in messages.
    Raises ValueError for an unknown name, and for a value of the wrong type or outside of LIMITS.
    """
    known = {p.name: p for p in inspect.signature(method).parameters.values() if p.kind is p.KEYWORD_ONLY}
    checked = {}
    for name, value in given.items():
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else "."
            usual = ", ".join(f"{p.name}={_format(p.default)}" for p in known.values()) or "there are none"
            raise ValueError(f"there is no {what} {name!r}{hint} Options and their defaults: {usual}")
        checked[name] = check_option(known[name], value, what)
    return checked


def check_option(option: inspect.Parameter, value: Any, what: str = "sampling option") -> Any:
    """Return the value as the option's method takes it: numbers of NumPy as those of Python, a list as a tuple.

    what: the word for an option in messages.
    Raises ValueError for a value of another type than the option is annotated with, or outside of LIMITS.
    """
    name, wanted, value = option.name, option.annotation, _plain(value)
    if wanted is not option.empty and not _fits(value, wanted):
        usual = _format(option.default)
        raise ValueError(f"{what} {name}={_format(value)}: expected {_describe(wanted)}, such as {usual}")
    least, most = LIMITS.get(name, (-math.inf, math.inf))
    if isinstance(value, Real) and not least <= float(value) <= most:
        within = f"at least {least:g}" if most == math.inf else f"{least:g} to {most:g}"
        raise ValueError(f"{what} {name}={value}: expected {within}")
    return tuple(value) if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    """Return a number of NumPy or the like as one of Python, and any other value as it is."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def _fits(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, UnionType):
        return any(_fits(value, kind) for kind in get_args(wanted))
    if get_origin(wanted) is tuple:
        kinds = get_args(wanted)
        return isinstance(value, list | tuple) and len(value) == len(kinds) and all(map(_fits, value, kinds))
    if wanted is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf
    return isinstance(value, wanted) and (wanted is NoneType or not isinstance(value, bool))


def _describe(wanted: Any) -> str:
    if isinstance(wanted, UnionType):
        return " or ".join(map(_describe, get_args(wanted)))
    if get_origin(wanted) is tuple:
        return f"[{', '.join(map(_describe, get_args(wanted)))}]"
    return TYPE_NAMES[wanted]


def _format(value: Any) -> str:
    return "null" if value is None else str(list(value) if isinstance(value, tuple) else value)
