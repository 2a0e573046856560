"""Sources and templates of other packages, named by package.module:NAME."""

import sys

import pytest

from reca.config.recipe_files import load_recipe
from reca.data.errors import DataError
from reca.data.sources.factory import open_source
from reca.data.spec import parse_spec
from reca.data.templates import load_templates

MODULE = """
from reca.data.sample import Sample

NUMBER = 3
SENTENCES = ["Look.", "Say what you see."]


class Squares:
    def __init__(self, task, size):
        self.task, self.length = task, size

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return Sample(self.key(index), b"", self.task)

    def key(self, index):
        return str(index)

    def size(self, index):
        return 0

    def identity(self):
        return "squares"


def squares(task, *, size=4, name=""):
    made = Squares(task, size)
    made.name = name
    return made


def plain(task):
    return ["a"]


def broken(task):
    return 1 / 0
"""


@pytest.fixture(autouse=True)
def package(tmp_path, monkeypatch):
    """An installed package that this project does not know: its module is outside_of_reca.squares."""
    folder = tmp_path / "outside_of_reca"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "squares.py").write_text(MODULE)
    (folder / "unfinished.py").write_text("import a_library_that_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.startswith("outside_of_reca")]:
        del sys.modules[name]


def test_a_source_of_another_package():
    source = open_source("outside_of_reca.squares:squares?size=7&name=a+b%26c", "t2i")
    assert (len(source), source[0].text, source.name) == (7, "t2i", "a b&c")
    assert len(open_source("outside_of_reca.squares:squares", "reca")) == 4


def test_templates_of_another_package():
    assert load_templates("outside_of_reca.squares:SENTENCES") == ["Look.", "Say what you see."]
    assert (
        load_templates("reca.toy_datasets.shapes:TEMPLATES", 2)
        == load_templates("reca.toy_datasets.shapes:TEMPLATES")[::4]
    )
    for name in ("NUMBER", "squares"):
        with pytest.raises(DataError, match=f"data.templates=outside_of_reca.squares:{name} names a .*list of sentenc"):
            load_templates(f"outside_of_reca.squares:{name}")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (
            "nowhere.at.all:squares",
            r"data.images=.*module nowhere.at.all cannot be imported \(No module named 'nowhere'",
        ),
        ("nowhere:x", "Install its package, or put its folder on PYTHONPATH; .* write ./nowhere:x"),
        ("outside_of_reca.circles:x", "No module named 'outside_of_reca.circles'"),
        ("outside_of_reca.unfinished:x", "No module named 'a_library_that_nobody_has'"),
        ("outside_of_reca.squares:square", "has no 'square'; did you mean squares"),
        ("outside_of_reca.squares:NUMBER", "names a int, not a function"),
        ("outside_of_reca.squares:squares?colour=red", "unexpected keyword argument 'colour'.*size=4"),
        ("outside_of_reca.squares:squares?size", "'size' is not of the form name=value"),
        ("outside_of_reca.squares:squares?size=1&size=2", "'size=2' is given twice"),
        ("outside_of_reca.squares:squares?size=0", "without samples"),
        ("outside_of_reca.squares:plain", "returned a list without key, size, identity"),
        ("os:system?command=true", "the function is called with task='reca'"),
        ("time:sleep", "its signature is|without a signature"),
    ],
)
def test_mistakes_are_named(spec, words):
    with pytest.raises(DataError, match=words):
        open_source(spec, "reca")


def test_an_error_inside_of_the_function_keeps_its_kind():
    with pytest.raises(ZeroDivisionError):
        open_source("outside_of_reca.squares:broken", "reca")


def test_paths_and_addresses_are_no_specs(tmp_path):
    for text in ("images", "./a:b", "/data/a.tar", "s3://bucket", "a-{000..009}.tar", "c:\\images", "a.b", "a:b/c", ""):
        assert parse_spec(text) is None
    assert parse_spec("a.b:c?d=1") == ("a.b", "c", "d=1")
    (tmp_path / "odd:name").mkdir()
    with pytest.raises(DataError, match="odd:name has no images"):
        open_source(str(tmp_path / "odd:name"), "reca")


def test_a_recipe_takes_them():
    recipe = load_recipe("show_o_tiny", ["data.images=outside_of_reca.squares:squares?size=2"])
    assert len(open_source(recipe.data.images, "reca")) == 2
