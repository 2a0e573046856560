"""What a name may stand for that is none."""

import pytest

from reca.cli import main
from reca.models.base import ROLES
from reca.options.names import hint, nearest

NAMES = ["show_o_256", "show_o_512", "midjourney-v6-llava", "llava-665k", "GenEval", None, 2]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("show_o_521", "show_o_512"), ("SHOW_O_512", "show_o_512"), ("geneval", "GenEval"), ("show", "show_o_256"),
        ("llava", "llava-665k"), ("v6-l", "midjourney-v6-llava"), ("v6", None), ("", None), ("elsewhere", None),
        ("x" * 10**6, None),
    ],
)  # fmt: skip
def test_the_nearest_name(given, meant):
    """One that is spelt alike, in any case, or the one that begins with what is given, or contains it."""
    assert nearest(given, NAMES) == meant
    assert hint(given, NAMES) == (f"; did you mean {meant}?" if meant else "")


def test_what_is_no_text_has_no_nearest_name():
    assert hint(None, NAMES) == hint(256, NAMES) == hint("x", []) == ""


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        ("demo --umm showo", "show_o"), ("demo --dataset emojis", "emoji"),
        ("demo --umm harmn --dataset shapes", "harmon"),
        ("study seen RECAA:train.steps=1", "RECA"), ("study seen --task 0/longr", "0/longer"),
        ("train show_o_tiny train.roles=[embedd]", "embed"),
        ("train show_o_tiny eval.every=1 eval.suite=toys", "toy"),
        ("train show_o_tiny eval.every=1 eval.suite=toy eval.judge=toys", "toy"),
    ],
)  # fmt: skip
def test_names_on_the_command_line(arguments, meant, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "embed" in ROLES and main(arguments.split()) == 3
    assert f"did you mean {meant}?" in capsys.readouterr().err
