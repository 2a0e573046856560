"""Output folders: none is filled with the files of two kinds."""

import json

import pytest

from reca.cli import main
from reca.comparison import build
from reca.config.recipe_files import load_recipe
from reca.eval import report, targets
from reca.eval.suite_files import File
from reca.io import folders
from reca.io.folders import BEST_OF, CHECKPOINTS, COMPARISON, EVALUATION, RUN, NotWritable, ensure_writable
from reca.runs import status

KINDS = [RUN, EVALUATION, COMPARISON, BEST_OF]


@pytest.fixture
def there(tmp_path):
    """A run, its evaluation, a comparison and a folder of best-of, by kind."""
    made = {RUN: "run", EVALUATION: "run/eval/000001/toy", COMPARISON: "comparison", BEST_OF: "kept"}
    for kind, name in made.items():
        (tmp_path / name).mkdir(parents=True)
        for mark in folders.MARKS[kind][0]:
            (tmp_path / name / mark).write_text("{}")
    (tmp_path / "run/recipe.yaml").write_text("umm: show_o\nrun_dir: run\n")
    (tmp_path / "run/checkpoints/000001").mkdir(parents=True)
    (tmp_path / "run/eval/000001/toy/images").mkdir()
    return {kind: tmp_path / name for kind, name in made.items()}


def test_the_marks_are_the_files_that_are_written():
    marks = {name for groups in folders.MARKS.values() for group in groups for name in group}
    assert {status.FILE, targets.GENERATION, report.RESULTS, build.PAGE} < marks


@pytest.mark.parametrize("kind", [*KINDS, None])
def test_a_folder_of_another_kind_is_refused(kind, there, tmp_path):
    for found, folder in there.items():
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(folder)
        for named in (folder, tmp_path / "link", folder / "sub/.."):
            if found == kind:
                assert ensure_writable(named, "--out", kind) == named
                continue
            with pytest.raises(NotWritable, match=f"--out {named} is the folder of {found}, with whose files"):
                ensure_writable(named, "--out", kind)
        assert ensure_writable(folder / "sub", "--out", kind).is_dir()  # beside its files, not among them


@pytest.mark.parametrize("kind", [*KINDS, None])
def test_checkpoints_and_the_images_of_an_evaluation_are_refused(kind, there, tmp_path):
    (tmp_path / "disk").mkdir()
    (there[RUN] / "checkpoints").rename(tmp_path / "disk/checkpoints")
    (there[RUN] / "checkpoints").symlink_to(tmp_path / "disk/checkpoints")
    for folder in (there[RUN] / "checkpoints", there[RUN] / "checkpoints/000001", there[RUN] / "checkpoints/x/y"):
        with pytest.raises(NotWritable, match="belongs to the checkpoints of a run, .*/run, with"):
            ensure_writable(folder, "--out", kind)
    for name in ("images", "images/00000"):
        with pytest.raises(NotWritable, match="belongs to the images of an evaluation, .*/toy, with"):
            ensure_writable(there[EVALUATION] / name, "--out", kind)
    assert ensure_writable(there[RUN] / "checkpoints", "folder", CHECKPOINTS).is_dir()  # the run itself


def test_folders_with_a_file_of_such_a_name_are_used(tmp_path):
    """A recipe or a table of the user's own makes no run, and no evaluation, of a folder."""
    for name in ("recipe.yaml", "results.json", "checkpoints/recipe.yaml", "images/x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for name in (".", "checkpoints", "images"):
        assert ensure_writable(tmp_path / name, "--out")


@pytest.mark.parametrize(
    "arguments",
    [
        "eval toy show_o_tiny", "generate show_o_tiny --prompt x", "export show_o_tiny", "best-of show_o_tiny prompts",
        "edit bagel_tiny --instruction x --image x.png", "compare base RUN", "data view show_o_tiny",
        "get suite dpg", "demo", "study seen",
    ],
)  # fmt: skip
def test_every_command_refuses_a_run_folder_before_it_begins(arguments, there, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts").write_text("a red circle\n")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("reca.eval.suite_files.list_files", lambda _: ("commit", [File("x", 1, "0")]))
    option = "--to" if arguments.startswith("get") else "--out"
    folder = there[RUN] if option == "--out" else there[RUN].parent
    if option == "--to":
        there[RUN].rename(tmp_path / "dpg")
        before = sorted(tmp_path.rglob("*"))
    words = [str(tmp_path / "run") if word == "RUN" else word for word in arguments.split()]
    assert main([*words, option, str(folder)]) == 4
    assert "is the folder of a run, with whose files others would mix; name another folder" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_in_the_folder_of_an_evaluation_is_refused(there, capsys):
    for folder, words in ((there[EVALUATION], "is the folder of an evaluation"), (there[RUN] / CHECKPOINTS, "belongs")):
        assert main(["train", "show_o_tiny", f"run_dir={folder}"]) == 4
        assert f"run_dir {folder} {words}" in capsys.readouterr().err
    assert load_recipe(there[RUN] / "recipe.yaml").umm == "show_o"


def test_an_evaluation_of_another_suite_is_kept(there, tmp_path, capsys):
    """Whatever is evaluated: images of the model, given images or given answers."""
    kept = {"suite": "wise", "protocol": "WISE_Verified"}
    (tmp_path / "pictures").mkdir()
    for name in (targets.GENERATION, report.RESULTS):
        there[EVALUATION].joinpath(targets.GENERATION).unlink(missing_ok=True)
        (there[EVALUATION] / name).write_text(json.dumps(kept))
        for given in ([], ["--images", str(tmp_path / "pictures")], ["--steps", "report"]):
            assert main(["eval", "toy", "show_o_tiny", "--out", str(there[EVALUATION]), *given]) == 4
            assert "an evaluation with other settings (suite 'wise' -> 'toy', protocol " in capsys.readouterr().err
        assert json.loads((there[EVALUATION] / name).read_text()) == kept
