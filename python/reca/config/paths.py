"""Paths in recipes and on the command line: ~ expanded, relative ones made absolute."""

import glob
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reca.data.spec import parse_spec
from reca.options.fields import GLOB, HUB, JUDGE, SPEC, RecipeError, format_value

_FILES = re.compile(r"\.(tar|parquet|pq)", re.IGNORECASE)  # in names that are patterns


def make_absolute(text: str, kind: str) -> str:
    """Make a relative path absolute. kind: kind of path key (reca/options/fields.py).

    Importable specs, URLs and hub names are returned unchanged.
    """
    if kind == JUDGE:
        name, colon, argument = text.partition(":")
        return f"{name}{colon}{make_absolute(argument, HUB)}" if argument else text
    if _is_no_path(text, kind):
        return text
    here = os.getcwd()
    if kind == GLOB and _FILES.search(Path(text).name) and not os.path.exists(text):
        here = glob.escape(here)
    return os.path.join(here, re.sub(r"\A(\./+)+", "", text))


def each_path(value: Any, change: Callable[[str], str]) -> Any:
    """Apply `change` to the value of a path key, or to the source of every item of a list."""
    if isinstance(value, list):
        return [item | {"source": change(item["source"])} for item in value]
    return change(value)


def expand_home(text: str) -> str:
    """Expand ~ in a path. Raises RecipeError for an unknown user and for shell variables, which are not supported."""
    if text.startswith("~"):
        full = os.path.expanduser(text)
        if full.startswith("~"):
            raise RecipeError(
                f"{format_value(text)}: there is no such user; write ./~ for a file whose name begins with ~"
            )
        return full
    if re.search(r"(^|/)\$[A-Za-z_]", text) or "${" in text:
        raise RecipeError(
            f"{format_value(text)}: variables are not expanded; write the path itself, or ~ for the home folder"
        )
    return text


def _is_no_path(text: str, kind: str) -> bool:
    if kind == HUB and not os.path.exists(text):
        return True
    if kind == GLOB and text.startswith("hf:"):
        return True
    return "://" in text or (kind in (GLOB, SPEC) and parse_spec(text) is not None)
