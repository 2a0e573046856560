"""Recipe files: read YAML and overrides into the dataclasses of recipe.py, validate, explain and write them."""

import copy
import functools
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from difflib import get_close_matches
from numbers import Real
from pathlib import Path
from types import NoneType
from typing import Any, get_type_hints

import numpy as np

from reca.config.paths import each_path, expand_home, make_absolute
from reca.config.recipe import Recipe
from reca.io.folders import write_atomically
from reca.models import umm_package
from reca.options.fields import RecipeError, check_heads, check_values, format_value
from reca.options.names import nearest
from reca.options.values import BLANK, convert, override_text, read_override, read_yaml, reject_switch, write_yaml

_types = functools.cache(get_type_hints)

RECIPES = Path(__file__).parents[1] / "recipes"
OVERRIDES = "the overrides"
PLAIN = (str, Real, os.PathLike, np.generic, NoneType)  # values that a recipe can hold as text


class UnknownRecipe(RecipeError):
    """There is no recipe of this name."""


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name: str | Path, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Recipe:
    """Read a recipe by name (see `recipe_names`) or path.

    Args:
        overrides: Keys to change, as ["key.sub=value", ...] or {"key.sub": value, ...}.

    Raises:
        RecipeError: An unknown recipe, key or value.
    """
    path = folder = Path(expand_home(str(name)))
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / f"{name}.yaml"
    try:
        written = read_yaml(path.read_bytes(), format_value(str(path))[1:-1])
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError) as error:
        if isinstance(error, RecipeError):
            raise
        if os.path.isfile(of_run := folder / "recipe.yaml"):
            raise RecipeError(f"{format_value(str(name))} is a run folder; its recipe is {of_run}") from error
        near = nearest(str(name), recipe_names())
        way = f"did you mean {near}? Give" if near else "give"
        raise UnknownRecipe(
            f"no recipe {format_value(str(name))}: {way} a .yaml file, or one of {', '.join(recipe_names())}"
        ) from error
    except OSError as error:
        raise RecipeError(f"recipe {format_value(str(path))} cannot be read ({error.strerror})") from error
    source = format_value(str(path))[1:-1]
    if not isinstance(written, dict):
        raise RecipeError(f"{source} has no keys; a recipe is a YAML file of key: value lines")

    given = _given(overrides)
    umm = convert(written.pop("umm"), str, "umm", source) if "umm" in written else Recipe.umm
    for key, text in given:
        if key == "umm":
            umm = convert(read_override(key, text, str), str, key, OVERRIDES)
    recipe = Recipe(umm=umm, model=umm_package(umm).Config())
    _Layer(recipe, source).put(recipe, written)
    layer = _Layer(recipe, OVERRIDES)
    for key, text in given:
        layer.override(key, text)
    _check(recipe)
    return recipe


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe as YAML that `load_recipe` reads back to the same values. The file is replaced atomically."""
    write_atomically(path, write_yaml(asdict(recipe)))


def reread(recipe: Recipe) -> Recipe:
    """Return a copy of a recipe that was changed in Python: its values converted and checked as overrides are.

    Raises:
        RecipeError: An unknown key or value.
    """
    source = "the recipe"
    _check_parts("umm", recipe.umm, source)
    umm = convert(read_override("umm", override_text(recipe.umm), str), str, "umm", source)
    read = Recipe(umm=umm, model=umm_package(umm).Config())
    layer = _Layer(read, source)
    for key, value in _attributes(recipe):
        _check_parts(key, value, source)
        layer.override(key, override_text(list(value) if isinstance(value, tuple) else value))
    _check(read)
    return read


def _attributes(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (full key, value) of everything that was set on a recipe and its groups, declared or not."""
    for name, value in vars(config).items():
        if is_dataclass(value):
            yield from _attributes(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def absolute_paths(recipe: Recipe) -> Recipe:
    """Return a copy of the recipe with relative paths made absolute.

    Importable specs, URLs and hub names are unchanged.
    """
    recipe = copy.deepcopy(recipe)
    for config, f, _ in walk(recipe):
        value, kind = getattr(config, f.name), f.metadata.get("path")
        if kind and value:
            setattr(config, f.name, each_path(value, functools.partial(make_absolute, kind=kind)))
    return recipe


def walk(config: Any, prefix: str = "") -> Iterator[tuple[Any, Any, str]]:
    """Yield (group, field, full key) for every key that is not a group."""
    for f in fields(config):
        value, key = getattr(config, f.name), f"{prefix}{f.name}"
        if is_dataclass(value):
            yield from walk(value, f"{key}.")
        else:
            yield config, f, key


def by_key(recipe: Recipe) -> dict[str, Any]:
    """Return the values of a recipe by full key, without groups."""
    return {key: getattr(config, f.name) for config, f, key in walk(recipe)}


def explain(recipe: Recipe) -> str:
    """Return one line per key: the override that sets its current value, and its documentation."""
    lines = []
    for config, f, key in walk(recipe):
        choices = f.metadata.get("choices")
        among = f" [{', '.join(map(override_text, choices))}]" if choices else ""
        lines.append((f"{key}={override_text(getattr(config, f.name))}", f"{f.metadata.get('doc', '')}{among}"))
    width = min(48, max(len(left) for left, _ in lines))
    return "\n".join(f"{left:<{width}}  {doc}" for left, doc in lines)


def _given(overrides: Sequence[str] | Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return overrides as pairs of key and text of the value."""
    listed = isinstance(overrides, Collection) and not isinstance(overrides, str)
    if not listed or not all(isinstance(item, str) for item in overrides):
        raise RecipeError(
            f"overrides={format_value(overrides)} must be a list of key=value, or a dict {{key: value}}; keys are texts"
        )
    if not isinstance(overrides, Mapping):
        return [_split(text) for text in overrides]
    pairs: list[tuple[str, str]] = []
    for key, value in overrides.items():
        if isinstance(value, Mapping):
            pairs += [(f"{key}.{name}", text) for name, text in _given(value)]
        else:
            _check_parts(key, value, OVERRIDES)
            pairs.append((key, override_text(list(value) if isinstance(value, tuple) else value)))
    return pairs


def _check_parts(key: str, value: Any, source: str) -> None:
    """Raise RecipeError if a value is more than a text, a number, or a list of these or of {name: one of these}."""
    for item in value if isinstance(value, list | tuple) else [value]:
        for part in item.values() if isinstance(item, Mapping) else [item]:
            if isinstance(part, Collection) and not isinstance(part, str):
                raise RecipeError(
                    f"{key}={format_value(value)} in {source} has {format_value(part)} where a text or a number is "
                    "expected; lists cannot be nested"
                )
            if not isinstance(part, PLAIN):
                raise RecipeError(
                    f"{key} in {source} has an object of type {type(part).__name__} where a text or a number is "
                    "expected: a recipe is a file; name an object that Python makes as package.module:FUNCTION, where "
                    "the key takes one"
                )


def _split(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise RecipeError(f"override {format_value(text)} has no {'key' if equals else repr('=')}; write key.sub=value")
    return key, value


class _Layer:
    """Writes values from one source, a file or the overrides, into a recipe."""

    def __init__(self, recipe: Recipe, source: str):
        self.recipe, self.source = recipe, source

    def put(self, group: Any, raw: dict, prefix: str = "") -> None:
        for name, value in raw.items():
            self.put_key(group, name, value, f"{prefix}{name}")

    def put_key(self, group: Any, name: str, raw: Any, key: str) -> None:
        wanted, f = self._declared(group, name, key)
        if is_dataclass(wanted):
            if not isinstance(raw, dict):
                way = f"{key}.sub=value" if self.source == OVERRIDES else f"{name}: {{sub: value}}"
                raise RecipeError(
                    f"{format_value(key)[1:-1]} in {self.source} is a group of keys; set its keys, as {way}"
                )
            self.put(getattr(group, name), raw, f"{key}.")
            return
        if not f.metadata.get("choices"):
            reject_switch(raw, wanted, key, self.source, path=f.metadata.get("path") is not None)
        value = convert(raw, wanted, key, self.source)
        if f.metadata.get("path") and value is not None:
            value = each_path(value, functools.partial(self.path, key=key))
        elif any(
            "\ud800" <= c <= "\udfff" for item in (value if isinstance(value, list) else [value]) for c in str(item)
        ):
            raise RecipeError(f"{key} in {self.source} is not UTF-8 text")
        setattr(group, name, value)

    def path(self, text: str, key: str) -> str:
        if not text.strip(BLANK):
            raise RecipeError(f"{key} in {self.source} is empty; write a path")
        try:
            return expand_home(text)
        except RecipeError as error:
            raise RecipeError(f"{key} in {self.source}: {error}") from error

    def override(self, key: str, text: str) -> None:
        *groups, name = key.split(".")
        group = self.recipe
        for part in groups:
            wanted, _ = self._declared(group, part, key)
            if not is_dataclass(wanted):
                raise self._unknown(key)
            group = getattr(group, part)
        wanted, f = self._declared(group, name, key)
        self.put_key(group, name, read_override(key, text, wanted, path=bool(f.metadata.get("path"))), key)

    def _declared(self, group: Any, name: str, key: str) -> tuple[Any, Any]:
        """Return the type and the field of a key; the type of a group is its dataclass."""
        for f in fields(group):
            if f.name == name:
                value = getattr(group, name)
                return (type(value), f) if is_dataclass(value) else (_types(group.__class__)[name], f)
        raise self._unknown(key)

    def _unknown(self, key: str) -> RecipeError:
        known = [full for _, _, full in walk(self.recipe)]
        groups = {full[: m.start()] for full in known for m in re.finditer(r"\.", full)}
        if key in {*known, *groups}:
            nested = ": {".join(key.split(".")) + ": ..." + "}" * key.count(".")
            return RecipeError(f"{format_value(key)} in {self.source} has a dot; write nested groups, as {nested}")
        lists = [full for full in known if re.match(rf"{re.escape(full)}[.\[]", key)]
        if lists:
            return RecipeError(f"{format_value(key)} in {self.source}: {lists[0]} has no sub-keys; set its whole value")
        parent, dot, last = key.rpartition(".")
        given = key[:200]
        names = [*known, *(group for group in groups if not key.startswith(f"{group}."))]
        namesakes = [full for full in known if full.rsplit(".", 1)[-1] == last]
        near = get_close_matches(given, names, 1, 0.92) or get_close_matches(given, namesakes, 4, 0)
        near = near or get_close_matches(given, names, 1, 0.75)
        here = [full.removeprefix(parent + dot).split(".")[0] for full in known if full.startswith(parent + dot)]
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        if here and not near:
            hint = f"; {parent or 'a recipe'} has {', '.join(dict.fromkeys(here))}"
        model = f" for umm={self.recipe.umm}" if key.startswith("model.") else ""
        return RecipeError(
            f"unknown key {format_value(key)} in {self.source}{model}{hint} "
            "(reca train RECIPE --explain lists all keys)"
        )


def _check(config: Any, prefix: str = "") -> None:
    """Check the values of every group before what a group requires of them together. Raise RecipeError."""
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            _check(value, f"{prefix}{f.name}.")
    check_values(config, prefix)
    check_heads(config, prefix)
    if hasattr(config, "check"):
        config.check(prefix)
