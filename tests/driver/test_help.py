"""The help of every command: what it does, an example that can be entered, and each option with its default."""

import argparse
import re
import shlex

import pytest

from reca.cli import _parser
from reca.commands.examples import EXAMPLES
from reca.eval.judges import JUDGES


def parsers(parser, name=""):
    """Every command with its parser, `get weights` too."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, sub in action.choices.items():
                yield f"{name} {word}".strip(), sub
                yield from parsers(sub, f"{name} {word}".strip())


COMMANDS = {name: parser for name, parser in parsers(_parser()) if name != "bench"}  # its help is the benchmarks' own


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_described_with_an_example(name):
    parser = COMMANDS[name]
    assert re.fullmatch(r"[A-Z].*\.", parser.description), "a sentence"
    assert parser.epilog == f"example: {EXAMPLES[name]}" and len(parser.epilog) < 79  # one line of a terminal
    words = shlex.split(EXAMPLES[name])
    assert words[0] == "reca" and words[1 : 1 + len(name.split())] == name.split()
    options, rest = _parser().parse_known_args(words[1:])
    assert not [word for word in rest if "=" not in word] and callable(options.run)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_takes_and_its_default(name):
    for action in COMMANDS[name]._actions:
        if isinstance(action, argparse._HelpAction | argparse._SubParsersAction):
            continue
        said = action.help or ""
        assert said and not said.endswith("."), action.dest
        if action.option_strings and action.nargs is None:
            assert action.metavar or action.choices, f"{action.dest} of {name} has no placeholder"
            if action.default not in (None, []):
                assert "(default: " in said, f"{action.dest} of {name} names no default"
            if isinstance(action, argparse._AppendAction):
                assert "may be repeated" in said, action.dest


def test_examples_are_of_commands():
    assert set(EXAMPLES) == set(COMMANDS)


def test_the_help_of_eval_lists_the_judges():
    described = next(action.help for action in COMMANDS["eval"]._actions if "--judge" in action.option_strings)
    listed = {f"{name}:{argument}" for name, (_, _, argument, _) in JUDGES.items() if argument}
    assert set(re.findall(r"\w+:[A-Z]+", described)) == listed
