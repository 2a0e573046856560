"""Arguments that the subcommands of several folders have: types of values, and declarations."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reca.options.names import hint

OR_RUN = "recipe name or .yaml file, a run folder, or a checkpoint's RUN/checkpoints/STEP"


class Parser(argparse.ArgumentParser):
    """Parser whose errors about a command, or about one of an option's choices, name the nearest one."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += hint(value, action.choices or ())
            raise


class Listed:
    """Type of an option whose value is a list, separated by commas. read: converts the text of the value."""

    def __init__(self, read: Callable[[str], Any]):
        self.read = read

    def __call__(self, text: str) -> Any:
        return self.read(text)


def path_text(text: str) -> str:
    """Read the text of a path, with ~ expanded."""
    from reca.config.paths import expand_home

    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty")
    try:
        return expand_home(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def as_path(text: str) -> Path:
    return Path(path_text(text))


def takes_overrides(
    sub: argparse.ArgumentParser, words: str = "recipe keys to override", metavar: str = "key=value"
) -> None:
    """Declare the overrides of a recipe."""
    # Without a default, Python before 3.13 lists them as required arguments.
    sub.add_argument("overrides", nargs="*", default=[], metavar=metavar, help=words)


def takes_pairs(sub: argparse.ArgumentParser, name: str, words: str) -> None:
    """Declare an option with a value of the form key=value, which may be repeated."""
    sub.add_argument(name, action="append", default=[], metavar="key=value", help=f"{words}; may be repeated")
