"""The repository is as ruff, with the settings of pyproject.toml, would have it, and its imports point one way."""

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.conftest import SLOWEST

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(importlib.util.find_spec("ruff") is None, reason="needs ruff (pip install ruff)")
@pytest.mark.parametrize("command", [("check",), ("format", "--check")], ids=" ".join)
def test_ruff_finds_nothing(command):
    done = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_files_that_runners_begin_with_are_there():
    assert [name for name in SLOWEST if not (ROOT / "tests" / name).is_file()] == []
    assert len(set(SLOWEST)) == len(SLOWEST)


# What mypy finds depends on the types that these say they have.
TYPED = {"torch": "2.13.", "numpy": "2.4."}
OTHERS = [f"{name} {version(name)}" for name, begin in TYPED.items() if not version(name).startswith(begin)]


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="needs mypy (pip install mypy)")
@pytest.mark.skipif(bool(OTHERS), reason=f"types are those of torch 2.13 and NumPy 2.4; here is {', '.join(OTHERS)}")
def test_mypy_finds_nothing():
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# How no docstring of a function begins: what it returns comes behind "Return".
NO_VERBS = set("A An All As Every For How In It No None Of One The Those What Where Whether Which".split())


@pytest.mark.parametrize("folder", ["python/reca", "reca_kernels", "benchmarks", "examples"])
def test_docstrings_of_functions_begin_with_a_verb(folder):
    wrong = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            text = ast.get_docstring(node) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else None
            if text and text.split(maxsplit=1)[0].rstrip(".,:") in NO_VERBS:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {text.splitlines()[0]}")
    assert not wrong, "\n".join(wrong)


# ---- imports ----

NATIVE = "reca_kernels._native"  # the compiled module, which imports nothing


def modules() -> dict[str, Path]:
    """Name of a module -> its file, for both packages."""
    found = {}
    for base, package in ((ROOT / "python", "reca"), (ROOT, "reca_kernels")):
        for path in (base / package).rglob("*.py"):
            parts = path.relative_to(base).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(source: str, known: Collection[str]) -> set[str]:
    """Names of the known modules that a file imports: anywhere in it, in functions and under TYPE_CHECKING too."""
    named = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            named += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not followed here"
            named += [f"{node.module}.{alias.name}" for alias in node.names]
    found = set()
    for name in named:
        while name and name not in known:
            name = name.rpartition(".")[0]
        found.add(name)
    return found - {""}


def circles(graph: Mapping[str, Collection[str]]) -> list[list[str]]:
    """The strongly connected components with more than one node (Tarjan 1972)."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        number[node] = low[node] = len(number)
        stack.append(node)
        for after in graph.get(node, ()):
            if after not in number:
                visit(after)
            if after in stack:
                low[node] = min(low[node], low[after])
        if low[node] == number[node]:
            place = stack.index(node)
            if len(stack) - place > 1:
                found.append(sorted(stack[place:]))
            del stack[place:]

    for node in graph:
        if node not in number:
            visit(node)
    return found


def import_graph() -> dict[str, set[str]]:
    """Module -> modules of ours that it imports."""
    files = modules()
    known = {*files, NATIVE}
    return {name: imports(path.read_text(encoding="utf-8"), known) - {name, NATIVE} for name, path in files.items()}


def folder_graph(graph: Mapping[str, Collection[str]]) -> dict[str, set[str]]:
    """The same between folders. A file in a folder that has folders below it stands for itself."""
    files = modules()
    inner = {path.parent for path in files.values() for other in files.values() if path.parent in other.parents[1:]}

    def node(name: str) -> str:
        path = files[name]
        return name if path.parent in inner else str(path.parent.relative_to(ROOT))

    folders: dict[str, set[str]] = {}
    for name, after in graph.items():
        folders.setdefault(node(name), set()).update(node(other) for other in after)
    return {name: after - {name} for name, after in folders.items()}


# Files of python/reca that know of no data, no model and no run: everything may import them.
FOUNDATION = {
    f"reca.{name}"
    for name in (
        *("catalog", "data.micro_batches", "errors", "exits"),
        *("io.files", "io.folders", "io.html", "io.image_grid", "io.paths", "launcher"),
        *("options.fields", "options.names", "options.sampling", "options.values", "precision", "rng", "units"),
    )
}


def test_what_a_path_is_asks_the_system():
    """Path's own methods hide the system's errors from Python 3.14 on; those of os.DirEntry do not."""
    asked = re.compile(r"^(?!.*\bentry\.).*\.(exists|is_file|is_dir)\(\)")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sorted((ROOT / "python/reca").rglob("*.py"))
        if path.relative_to(ROOT / "python/reca").as_posix() not in ("io/paths.py", "data/sources/remote.py")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if asked.match(line)
    ]
    assert found == [], "use the functions of reca.io.paths"


def test_no_file_imports_itself_over_others():
    assert circles(import_graph()) == []


def test_no_folder_imports_itself_over_others():
    assert circles(folder_graph(import_graph())) == []


@pytest.mark.parametrize(("part", "below"), [("data", ()), ("models", ("reca.data",))])
def test_imports_point_one_way(part, below):
    """recipes -> driver -> models -> data -> ops."""
    allowed = ("reca_kernels", f"reca.{part}", *below)
    for name, after in import_graph().items():
        if name in FOUNDATION:
            assert {other for other in after if other.split(".")[0] == "reca"} <= FOUNDATION, name
        elif f"{name}.".startswith(f"reca.{part}."):
            above = {other for other in after if not f"{other}.".startswith(tuple(f"{a}." for a in allowed))}
            assert above <= FOUNDATION, name


def test_circles_are_found():
    """Inside of functions and under TYPE_CHECKING too; of three files; a file that imports its own package is none."""
    known = {"p", "p.a", "p.b", "p.c.d"}
    source = "if TYPE_CHECKING:\n    from p.b import X\n\ndef f():\n    import p.c.d, os\n    from p import a, Y\n"
    assert imports(source, known) == {"p.b", "p.c.d", "p.a", "p"}
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
