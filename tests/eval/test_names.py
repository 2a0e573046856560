"""Options in messages are written as their reader writes them."""

import pytest

import reca
from reca import cli
from reca.config.recipe_files import load_recipe
from reca.eval import training
from reca.options import names
from reca.options.fields import RecipeError


@pytest.mark.parametrize(
    ("name", "value", "forms"),
    [
        ("out", None, ["out", "--out", "out"]),
        ("partial", True, ["partial=True", "--partial", "partial=True"]),
        ("data", "PATH", ["data='PATH'", "--data PATH", "eval.suite_data=PATH"]),
        ("judge", None, ["judge", "--judge", "eval.judge"]),
        ("images_per_item", 2, ["images_per_item=2", "--images-per-item 2", "eval.images_per_prompt=2"]),
        ("steps", ["judge", "score"], ["steps=['judge', 'score']", "--steps judge,score", "steps=['judge', 'score']"]),
        (
            "judge_options",
            {"clip": "F"},
            ["judge_options={'clip': 'F'}", "--judge-option clip=F", "eval.judge_options=[clip=F]"],
        ),
    ],
)
def test_an_option_has_three_forms(name, value, forms):
    written = []
    for form in (names.argument, names.flag, training.key):
        with names.written_as(form):
            written.append(names.option(name, value))
    assert written == forms and names.option(name, value) == forms[0]


def test_a_missing_judge_in_python_in_a_shell_and_in_a_recipe(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="geneval needs a judge: set judge to one of "):
        reca.evaluate("geneval", "show_o_tiny")
    assert cli.main(["eval", "geneval", "show_o_tiny"]) == 3
    assert "geneval needs a judge: set --judge to one of " in capsys.readouterr().err
    recipe = load_recipe("show_o_tiny", {"eval.every": 1, "eval.suite": "geneval"})
    with pytest.raises(RecipeError, match="eval.suite='geneval': geneval needs a judge: set eval.judge to one of "):
        training.TrainingSuite(recipe, tmp_path)
