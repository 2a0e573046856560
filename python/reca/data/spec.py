"""Sources and templates of any installed package: `package.module:NAME`, or `package.module:NAME?key=value&key=value`.

Opening such a spec runs the code of that module.
"""

import importlib
import inspect
import re
from difflib import get_close_matches
from typing import Any, NamedTuple
from urllib.parse import unquote_plus

from reca.data.errors import DataError
from reca.data.sample import Source
from reca.options.values import guess

_SPEC = re.compile(r"([^\W\d]\w*(?:\.[^\W\d]\w*)*):([^\W\d]\w*)(?:\?(.*))?", re.DOTALL)


class Spec(NamedTuple):
    """The parts of package.module:NAME?key=value."""

    module: str
    name: str
    query: str | None

    def __str__(self) -> str:
        return f"{self.module}:{self.name}" + ("" if self.query is None else f"?{self.query}")


def parse_spec(text: str) -> Spec | None:
    """Parse an importable spec. Return None for any other text, such as a path or a URL."""
    match = _SPEC.fullmatch(text)
    return match and Spec(*match.groups())


def load_object(spec: Spec, key: str) -> Any:
    """Import the object that a spec names. Raises DataError if the module or the name does not exist.

    key: recipe key, for messages.
    """
    try:
        module = importlib.import_module(spec.module)
    except ImportError as error:
        raise DataError(
            f"{key}={spec}: module {spec.module} cannot be imported ({error}). Install its package, or put its "
            f"folder on PYTHONPATH; for a file of this name write ./{spec}"
        ) from error
    if not hasattr(module, spec.name):
        public = [name for name in dir(module) if not name.startswith("_")]
        near = get_close_matches(spec.name, public, 1)
        raise DataError(
            f"{key}={spec}: module {spec.module} has no {spec.name!r}" + (f"; did you mean {near[0]}?" if near else "")
        )
    return getattr(module, spec.name)


def call_source(spec: Spec, task: str, key: str) -> Source:
    """Call the function that a spec names as function(task=task, **arguments) and return its source.

    Arguments are parsed as numbers, true, false, null or text.
    Raises DataError if it is not a function, has other parameters, or does not return a source with samples.
    """
    function, arguments = load_object(spec, key), _arguments(spec, key)
    if not callable(function):
        raise DataError(f"{key}={spec} names a {type(function).__name__}, not a function that returns a source")
    try:
        inspect.signature(function).bind(task=task, **arguments)
    except TypeError as error:
        raise DataError(
            f"{key}={spec}: {error}; the function is called with task={task!r} and the arguments after the ?; its "
            f"signature is {inspect.signature(function)}"
        ) from error
    except ValueError as error:  # a built-in function without a signature
        raise DataError(f"{key}={spec} names a function without a signature; name one written in Python") from error
    source = function(task=task, **arguments)
    if missing := [name for name in ("__len__", "__getitem__", "key", "size", "identity") if not hasattr(source, name)]:
        raise DataError(
            f"{key}={spec} returned a {type(source).__name__} without {', '.join(missing)}; a source needs all "
            "methods of reca.data.sample.Source"
        )
    if not len(source):
        raise DataError(f"{key}={spec} returned a source without samples")
    return source


def _arguments(spec: Spec, key: str) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    for part in spec.query.split("&") if spec.query else ():
        name, equals, value = part.partition("=")
        if not equals or not name or name in arguments:
            fault = "is given twice" if name in arguments else "is not of the form name=value"
            raise DataError(f"{key}={spec}: {part!r} {fault}; write ?name=value&name=value")
        arguments[name] = guess(unquote_plus(value), f"{key}: {name}")
    return arguments
