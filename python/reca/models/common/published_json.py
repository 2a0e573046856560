"""Check that the JSON files of published weights fit the recipe."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from reca.io.files import read_json
from reca.io.paths import is_file


def check_json(path: Path, rows: Iterable[tuple[str, Any, str]]) -> None:
    """Raise ValueError if a JSON file contradicts the recipe. Keys that it lacks are not checked; it may not exist.

    rows: (dotted path in the file, value by the recipe, recipe keys that determine it).
    """
    found, wrong = read_json(path) if is_file(path) else {}, []
    for place, value, keys in rows:
        given: Any = found
        for part in place.split("."):
            given = given.get(part) if isinstance(given, Mapping) else None
        if given is not None and given != value:
            wrong.append(f"{place} is {given}, but the recipe makes it {value} ({keys})")
    if wrong:
        raise ValueError(f"{path} does not fit the recipe: {'; '.join(wrong)}")
