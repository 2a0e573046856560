"""What tests compile is compiled once for a state of its sources."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests import compiled


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Asks for a library that is made of one file, and a list that grows by each compilation."""
    monkeypatch.setattr(compiled, "FOLDER", tmp_path / "build")
    source, made = tmp_path / "source.txt", []

    def compile_to(path):
        made.append(path)
        path.write_text(source.read_text())

    def ask(text, *options, compile_to=compile_to):
        source.write_text(text)
        return compiled.once("a.so", [source, *options], compile_to)

    return ask, made


def test_a_library_is_compiled_again_where_a_file_or_an_option_changed(library):
    ask, made = library
    assert ask("one").read_text() == "one" and ask("one").read_text() == "one" and len(made) == 1
    assert ask("two").read_text() == "two" and len(made) == 2
    last = ask("two", "-O2")
    assert last.read_text() == "two" and len(made) == 3
    assert [path.name for path in last.parents[1].iterdir() if path.is_dir()] == [last.parent.name]  # earlier ones went


def test_a_compilation_that_failed_is_tried_again(library):
    ask, made = library

    def failing(path):
        path.write_text("half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        ask("one", compile_to=failing)
    assert ask("one").read_text() == "one" and len(made) == 1


def test_of_two_that_ask_one_compiles(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "FOLDER", tmp_path / "build")
    made, source = [], tmp_path / "source.txt"
    source.write_text("one")

    def slow(path):
        made.append(path)
        time.sleep(0.2)
        path.touch()

    with ThreadPoolExecutor(2) as pool:
        found = set(pool.map(lambda _: compiled.once("a.so", [source], slow), range(2)))
    assert len(found) == 1 and len(made) == 1
