"""Interop data made by running the public code at tiny sizes, and how a test finds its own.

A golden folder holds config.json, cases.json and .safetensors files. A test module says with

    def matches(config: dict) -> bool

which folders it can read, by the content of their config.json. A test that takes the fixture `golden` runs once for
each of them: those under tests/golden/data, or those under the folders given by `pytest tests/golden --golden DIR`
(DIR is a golden folder, or any parent of some; the option may be repeated).

Cases of the evaluation lie in single files, such as dpg.json. A test module under tests/golden/eval says

    RECORDED = {"fixture": "name of its file"}

and a test that takes such a fixture gets the path, once for every file of that name under the same folders.
"""

import functools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

DATA = Path(__file__).parent / "data"
EVAL = Path(__file__).parent / "eval"  # its data folder has the cases of the evaluation, its modules read them


class Golden:
    """One golden folder, read when asked.

    config, cases  the two JSON files
    tensors(name)  {key: tensor} of NAME.safetensors, such as "weights" or "cases"
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = json.loads((folder / "config.json").read_text())
        self.cases = json.loads((folder / "cases.json").read_text())

    @functools.cached_property
    def weights(self) -> dict[str, Tensor]:
        return self.tensors("weights")

    @functools.cached_property
    def data(self) -> dict[str, Tensor]:
        return self.tensors("cases")

    def tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{name}.safetensors")

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The weights under `prefix`, without it."""
        return {key.removeprefix(prefix): value for key, value in self.weights.items() if key.startswith(prefix)}


def folders(roots: list[Path]) -> list[Path]:
    """Every golden folder of a model at or below the roots."""
    return [
        path.parent
        for root in roots
        for path in sorted(root.rglob("config.json"))
        if (path.parent / "cases.json").is_file()
    ]


def recorded_files(name: str, roots: list[Path]) -> list[Path]:
    """Every file of recorded cases with this name at or below the roots."""
    return [path for root in roots for path in sorted(root.rglob(name)) if path.is_file()]


def check_roots(roots: list[Path]) -> None:
    """Raises UsageError for a root that holds nothing of either form."""
    known = {path.name for path in (EVAL / "data").rglob("*.json")}
    for root in roots:
        if not folders([root]) and not any(recorded_files(name, [root]) for name in known):
            raise pytest.UsageError(
                f"--golden {root}: no folder there holds config.json and cases.json, nor a file of recorded cases"
            )


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", action="append", type=Path, metavar="DIR", help="golden folders to test against")


def pytest_configure(config: pytest.Config) -> None:
    check_roots(config.getoption("golden", default=None) or [])  # a wrong --golden ends the run here


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for fixture, name in getattr(metafunc.module, "RECORDED", {}).items():
        if fixture in metafunc.fixturenames:
            files = recorded_files(name, metafunc.config.getoption("golden", default=None) or [EVAL / "data"])
            metafunc.parametrize(fixture, files, ids=[file.parent.name for file in files])
    if "golden" not in metafunc.fixturenames:
        return
    mine = [f for f in _asked(metafunc.config) if metafunc.module.matches(json.loads((f / "config.json").read_text()))]
    metafunc.parametrize("golden", mine, ids=[folder.name for folder in mine], indirect=True, scope="module")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A run over given folders that no test can read must not pass for a success."""
    asked = config.getoption("golden", default=None)
    given = [value for item in items if hasattr(item, "callspec") for value in item.callspec.params.values()]
    if asked and not any(isinstance(value, Path) for value in given):
        raise pytest.UsageError(f"no collected test reads what lies under {', '.join(map(str, asked))}")


def _asked(config: pytest.Config) -> list[Path]:
    """The golden folders of models of this run."""
    return folders(config.getoption("golden", default=None) or [DATA])


@functools.cache
def _read(folder: Path) -> Golden:
    return Golden(folder)


@pytest.fixture(scope="module")
def golden(request: pytest.FixtureRequest) -> Golden:
    return _read(request.param)


@pytest.fixture(autouse=True)
def one_thread():
    """The reference numbers were made on one thread; the order of sums depends on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
