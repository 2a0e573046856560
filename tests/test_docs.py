"""The commands of the documentation exist, and its list of weights is that of the recipes."""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from reca import catalog
from reca.cli import _parse
from reca.config.recipe_files import load_recipe, recipe_names
from reca.hub.downloads import data_of, weights_of

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md"]
WEIGHTS_PAGE = ROOT / "docs/weights_and_data.md"
COMMAND = re.compile(r"^    (?:torchrun .* -m )?(reca .*)$", re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """The indented lines that call reca, without those with "..." or a word in capitals (`reca check RECIPE`)."""
    found = [shlex.split(line, comments=True) for line in COMMAND.findall(page.read_text(encoding="utf-8"))]
    return [words for words in found if not any(w.strip(";") == "..." or w.isupper() for w in words)]


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.stem)
def test_commands_of_the_documentation_are_commands(page):
    """Options are those of the command, recipes and their keys exist, data and models have these names."""
    for words in commands(page):
        end = next((i for i, word in enumerate(words) if word.endswith(";")), len(words))
        options = _parse([word.rstrip(";") for word in words[1 : end + 1]])
        name = getattr(options, "recipe", None)
        name = name or getattr(options, "spec", None)
        if name in recipe_names():
            load_recipe(name, options.overrides)
        if words[1:3] == ["get", "weights"]:
            assert weights_of(options.name, options.overrides)
        if words[1:3] == ["get", "data"]:
            assert data_of(options.name)


def features() -> list[list[str]]:
    """The rows of docs/features.md: number, name, what shows it, what is there."""
    lines = (ROOT / "docs/features.md").read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if re.match(r"\| \d", line)]


def test_each_feature_has_a_command_or_keys():
    """They are commands, and keys with values that a recipe takes."""
    rows = features()
    assert [row[0] for row in rows] == [str(i) for i in range(1, 33)] and all(len(row) == 4 for row in rows)
    for number, name, shown, _ in rows:
        words = shlex.split(re.fullmatch("`([^`]+)`", shown)[1])
        if "reca" in words:
            options = _parse(words[words.index("reca") + 1 :])
            if getattr(options, "recipe", None) in recipe_names():
                load_recipe(options.recipe, options.overrides)
        else:
            assert all("=" in word for word in words), (number, name)
            load_recipe("show_o_tiny", words)


def headings(page: Path) -> set[str]:
    """The anchors of a page: its headings in lower case, without punctuation, with hyphens for spaces."""
    lines = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", line).strip().lower()) for line in lines}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    """Pages that other pages include are read from two folders, so they have no relative links."""
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r'^--8<-- "([^":]+)', text, re.MULTILINE):
        assert not re.findall(r"\]\((?!https?:)([^)]+)\)", (ROOT / name).read_text(encoding="utf-8")), name
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in headings(target), link


def test_a_wrong_command_is_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("    reca check show_o_512 --no-such\n    reca train RECIPE\n    reca train show_o_512 ...\n")
    assert commands(page) == [["reca", "check", "show_o_512", "--no-such"]]
    with pytest.raises(SystemExit):
        test_commands_of_the_documentation_are_commands(page)


def test_the_grid_of_the_tutorial(tmp_path, monkeypatch):
    """Its Python, with the tiny model in place of both."""
    page = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    for source in ("open_uni_b_512", "runs/photos"):
        assert f'"{source}"' in code
        code = code.replace(source, "open_uni_tiny")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    with Image.open("before_after.png") as grid:
        assert grid.size == (42, 42)  # two rows of two images of 20 px, and gaps


@pytest.mark.parametrize("recipe", [name for name in recipe_names() if not name.endswith("_tiny")])
def test_the_page_of_weights_has_every_file_of_a_recipe(recipe):
    page = WEIGHTS_PAGE.read_text(encoding="utf-8")
    assert f"`{recipe}`" in page
    for download in weights_of(recipe):
        name = f"{download.repository}/{download.file}" if download.file else download.repository
        (row,) = (line for line in page.splitlines() if line.startswith("|") and f"`{name}`" in line)
        if download.facts.size:
            assert f"{download.facts.size / 1e9:.2f} GB" in row
        if download.facts.licence:
            assert download.facts.licence.split()[0] in row


def test_the_page_of_weights_has_every_dataset():
    page = WEIGHTS_PAGE.read_text(encoding="utf-8")
    for name, dataset in catalog.DATASETS.items():
        assert f"| `{name}` | `{dataset.repository}`" in page
    for one in catalog.LLAVA_IMAGES:
        assert one.folder.rpartition("/")[2] in page and one.url.split(",")[0].removeprefix("by its ") in page
