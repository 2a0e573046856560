"""What the distribution says of itself is said once, and is true."""

import ast
import re
from pathlib import Path

import pytest

import reca
import reca_kernels

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text()
VERSION = re.search(r'^version = "(.+)"$', PROJECT, re.M)[1]


def test_one_version():
    assert reca.__version__ == reca_kernels.__version__ == VERSION
    assert re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.M)[1] == VERSION
    assert re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)[1] in (VERSION, "Unreleased")


def test_the_licence_and_types_come_with_the_packages():
    assert 'license = "Apache-2.0"' in PROJECT and 'license-files = ["LICENSE", "NOTICE"]' in PROJECT
    assert "Apache License\n                           Version 2.0, January 2004" in (ROOT / "LICENSE").read_text()
    assert (ROOT / "NOTICE").read_text().startswith("reca\nCopyright")
    packaged = (ROOT / "setup.py").read_text()
    for package in (reca, reca_kernels):
        assert (Path(package.__file__).parent / "py.typed").is_file()
        assert f'"{package.__name__}": ["py.typed"' in packaged


@pytest.mark.parametrize("package", [reca, reca_kernels])
def test_every_file_of_a_package_comes_with_it(package):
    """Modules by `find_packages`, which misses folders without __init__.py; all but what is compiled by patterns."""
    listed = re.search(rf'"{package.__name__}": (\[.*?\])', (ROOT / "setup.py").read_text())[1]
    folder = Path(package.__file__).parent
    packaged = {path for pattern in ast.literal_eval(listed) for path in folder.glob(pattern)}
    files = {p for p in folder.rglob("[!.]*") if p.is_file() and p.suffix not in (".py", ".pyc", ".so", ".pyd")}
    assert files - packaged == set()
    modules = {path.parent for path in folder.rglob("*.py")}
    assert {path for path in modules if not (path / "__init__.py").is_file()} == set()


def test_triton_is_asked_for_on_linux_alone():
    """It has no wheel for macOS, where `make demo` and `make test` install the extra `dev`, too."""
    extras = PROJECT.partition("[project.optional-dependencies]")[2].partition("[project.urls]")[0]
    asked = re.findall(r'"triton\b([^"]*)"', extras)
    assert asked and all(text.endswith("; sys_platform == 'linux'") for text in asked)


@pytest.mark.parametrize("tool", ["ruff"])
def test_one_pin_of_a_tool(tool):
    pins = re.findall(rf"{tool}==([\d.]+)", PROJECT)
    hook = re.search(rf"{tool}-pre-commit\n\s+rev: v([\d.]+)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert {*pins, hook[1]} == {pins[0]}


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_of_the_front_pages_lead_somewhere(page):
    text = (ROOT / page).read_text()
    links = re.findall(r"\]\(([^)#]+)", text)
    assert all(link.startswith("https://") or (ROOT / link).exists() for link in links), links


def test_the_readme_is_short():
    """Without its measured tables, which grow with every device."""
    text = re.sub(r"<!-- measured.*?<!-- /measured -->", "", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(text.splitlines()) < 150
