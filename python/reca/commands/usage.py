"""Usage errors: what stands on the command line in another form than it should have."""

import argparse
import itertools
import re
import shlex
from collections.abc import Sequence
from dataclasses import fields

from reca.arguments import Listed
from reca.options.names import hint


def check(options: argparse.Namespace, arguments: Sequence[str], unknown: Sequence[str]) -> None:
    """Exit with a usage error, and how to write what was meant, for words that are neither options nor overrides.

    unknown: the words that the parser does not know. Overrides are those of the options.
    """
    overrides = getattr(options, "overrides", [])
    if not unknown:
        if split := _split_list(overrides):
            options.parser.error(f"a value with spaces needs quotes: write {shlex.quote(split)}")
        for text in overrides:
            _reject_option(options, text)
    unknown = [*unknown, *(text for text in overrides if "=" not in text)]
    if unknown:
        advice = _advice(options.parser, arguments, unknown, hasattr(options, "overrides"))
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}{advice and f'; {advice}'}")


def _advice(parser: argparse.ArgumentParser, arguments: Sequence[str], unknown: Sequence[str], overrides: bool) -> str:
    """Say how to write what unknown words may stand for; empty if nothing is known about that."""
    if keys := [text.lstrip("-") for text in unknown if re.match(r"--\w+(\.\w+)+(=|$)", text)]:
        return f"recipe keys are written without dashes, as {keys[0].partition('=')[0]}=VALUE"
    words = [text for text in unknown if not text.startswith("-")]
    flags = [text.partition("=")[0] for text in unknown if text.startswith("--")]
    if flags:
        return hint(flags[0], [name for action in parser._actions for name in action.option_strings])[2:]
    if not words or len(words) < len(unknown):
        return ""
    if overrides and _is_key(words[0]):
        return f"write {words[0]}=VALUE, without spaces"
    if form := _of_option(parser, arguments, words):
        return form
    return "recipe keys are overridden as key=value" if overrides else ""


def _is_key(text: str) -> bool:
    from reca.config.recipe import Recipe

    return re.fullmatch(r"\w+(\.\w+)+", text) is not None and text.split(".")[0] in (f.name for f in fields(Recipe))


def _of_option(parser: argparse.ArgumentParser, arguments: Sequence[str], unknown: Sequence[str]) -> str:
    """Say how to write several words behind an option that takes one value; empty if there is no such option."""
    actions = {name: action for action in parser._actions if action.nargs is None for name in action.option_strings}
    found: list[tuple[str, list[str]]] = []
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        values = [value, *arguments[i + 1 :]] if equals else arguments[i + 1 :]
        words = list(itertools.takewhile(lambda word: not word.startswith("-"), values))
        words = words[:1] + [word for word in words[1:] if "=" not in word]
        if name in actions and len(words) > 1:
            found.append((name, words[: 1 + len(unknown)]))
    if not found:
        return ""
    name, words = next((one for one in found if unknown[0] in one[1][1:]), found[0])
    action = actions[name]
    if isinstance(action.type, Listed):
        return f"{name} takes one list, separated by commas: {name} {','.join(word.strip(',') for word in words)}"
    if action.type in (int, float) or action.choices:
        return f"{name} takes one value"
    if isinstance(action, argparse._AppendAction):
        return f"write {name} before each value, and quotes around one with spaces"
    return f"a value with spaces needs quotes: {name} {shlex.quote(' '.join(words))}"


def _split_list(overrides: Sequence[str]) -> str | None:
    """Return the override whose value, a list or a group, was split at its spaces; None if there is none."""
    for i, text in enumerate(overrides):
        value = text.partition("=")[2]
        end = {"[": "]", "{": "}"}.get(value[:1])
        if end and not value.endswith(end):
            last = next((j for j in range(i + 1, len(overrides)) if overrides[j].endswith(end)), None)
            if last is not None:
                return " ".join(overrides[i : last + 1])
    return None


def _reject_option(options: argparse.Namespace, override: str) -> None:
    """Exit with advice if an override is an option of the command, such as `seed=1` for `--seed 1`."""
    name, equals, value = override.partition("=")
    if not equals or "." in name or ":" in name:  # a study's override VARIANT:KEY=VALUE is no option
        return
    from reca.config.recipe import Recipe

    if name in (f.name for f in fields(Recipe)):
        return
    own = options.parser.format_help().split()
    ways = []
    if (option := f"--{name.replace('_', '-')}") in own:
        ways.append(f"{option} {shlex.quote(value)}")
    if "--sampling" in own:
        ways.append(f"--sampling {shlex.quote(override)} for an option of the model's sampler")
    if ways:
        options.parser.error(f"{override} is not a recipe key: write {', or '.join(ways)}")
