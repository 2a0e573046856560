"""Conversion between text and values, according to the declared type of a recipe key.

YAML 1.1 infers types from the text: 0010 is 8, 12:30 is 750, no is false. Here the key determines the type. A text key
accepts any text verbatim, a number key only decimal numbers. Files are parsed into untyped scalars (`read_yaml`), so
are overrides (`read_override`), and `convert` turns scalars into typed values.
"""

import functools
import math
import operator
import os
import re
from types import NoneType, UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin

import yaml

from reca.options.fields import RecipeError, format_value

NULLS = ("null", "Null", "NULL", "None", "~")
DEEPEST = 50  # maximum nesting of brackets in YAML
BLANK = " \t\r\n"  # whitespace that is stripped from values
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
SWITCHES = (*TRUE, *FALSE, "none")

_WHOLE = re.compile(r"[+-]?([0-9]{1,3}(_[0-9]{3})+|[0-9]+)")
_NUMBER = re.compile(rf"({_WHOLE.pattern}(\.[0-9]*)?|[+-]?\.[0-9]+)([eE][+-]?[0-9]+)?")
_LEADING_ZERO = re.compile(r"[+-]?0[0-9_]")
_DOUBLE_QUOTED = r'"(?:[^"\\]|\\.)*"'
_SINGLE_QUOTED = r"'(?:[^']|'')*'"
_QUOTED = re.compile(f"{_DOUBLE_QUOTED}|{_SINGLE_QUOTED}", re.DOTALL)
_ITEM = re.compile(rf"\s*(?:({_DOUBLE_QUOTED}|{_SINGLE_QUOTED})\s*(?=,|\Z)|([^,]*))(,|\Z)", re.DOTALL)
_NESTED = re.compile(r"[\[,]\s*(\{[^{}]*:|\[)")  # start of a list item that is {key: value} or a list
_ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.)", re.DOTALL)


class Scalar(NamedTuple):
    """An untyped scalar of a recipe. quoted: it was in quotes, so "null" is text and not null."""

    text: str
    quoted: bool = False


class Sources:
    """Type of a key whose value is a text or a list of {source: TEXT, weight: NUMBER}, which is converted to dicts."""


class _Loader(yaml.SafeLoader):
    """YAML loader without type inference: every plain scalar is text, except for the merge key <<."""

    yaml_implicit_resolvers = {"<": [("tag:yaml.org,2002:merge", re.compile("<<"))]}  # noqa: RUF012

    def fetch_flow_collection_start(self, token: type) -> None:
        """Limit the nesting of brackets, because the scanner's time grows quadratically with it."""
        if self.flow_level > DEEPEST:
            raise yaml.scanner.ScannerError(None, None, "brackets are nested too deeply", self.get_mark())
        super().fetch_flow_collection_start(token)


class _Dumper(yaml.SafeDumper):
    """YAML dumper that quotes texts which a YAML reader could interpret as another type."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    if not text.isprintable():  # only double quotes preserve control characters and all kinds of line breaks
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"')
    style = "'" if text in NULLS or text.lower() in SWITCHES or _NUMBER.match(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def read_yaml(data: bytes | str, source: str) -> Any:
    """Parse YAML into dicts, lists and `Scalar`s. Return None for an empty document.

    source: name of the document in messages.
    Raises RecipeError for invalid YAML, duplicate keys, tags, and recursive anchors.
    """
    try:
        node = yaml.compose(data, _Loader)
        return None if node is None else _raw(node, source, {})
    except (yaml.YAMLError, UnicodeError) as error:
        reason = re.sub(r' in "<\w+ string>",', " at", " ".join(str(error).split()))
        reason = "".join(c if c.isprintable() else "?" for c in reason)
        raise RecipeError(f"{source} is not YAML: {reason[:300]}") from error
    except (RecursionError, ValueError, OverflowError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"{source} is not YAML: its lists or escapes cannot be parsed") from error


def write_yaml(values: dict) -> str:
    """Write YAML that `read_yaml` and `convert` read back to the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 20)


def read_override(key: str, text: str, wanted: Any, path: bool = False) -> Any:
    """Parse the value of an override into the form that `read_yaml` returns. Text needs no quotes.

    wanted: type of the key, or the dataclass of a group of keys, whose value is {key: value, ...}. path: the key names
    files, so it cannot be an empty text.
    """
    wanted, optional = _without_none(wanted)
    inside = text.strip(BLANK)
    if not inside:
        ways = [f"{key}=null for none"] * optional + [f"{key}='\"\"' for an empty text"] * (wanted is str and not path)
        raise RecipeError(f"{key}= has no value; write {' or '.join(ways) or 'one after the ='}")
    if get_origin(wanted) is list and inside[0] + inside[-1] == "[]":
        return _items(key, inside)
    if wanted is Sources:
        if inside[0] + inside[-1] == "{}" and ":" in inside:  # one source without the list's brackets: convert refuses
            return read_yaml(text, f"{key} in the overrides")
        if inside[0] + inside[-1] != "[]":
            return _scalar(key, text)
        return read_yaml(text, f"{key} in the overrides") if _NESTED.search(inside) else _items(key, inside)
    if hasattr(wanted, "__dataclass_fields__") and inside[0] == "{":
        return read_yaml(text, f"{key} in the overrides")
    return _scalar(key, text if wanted is str else inside)


def convert(raw: Any, wanted: Any, key: str, source: str) -> Any:
    """Convert parsed YAML or an override to a value of type `wanted`. Raises RecipeError for another type."""
    wanted, optional = _without_none(wanted)
    if isinstance(raw, Scalar) and not raw.quoted and raw.text in ("", *NULLS):
        if optional:
            return None
        quoted = '"' + raw.text + '"'
        text = f"; write '{quoted}' for this text" if wanted is str and raw.text else ""
        raise RecipeError(f"{key} in {source} cannot be null{text}")
    try:
        return _convert(raw, wanted, key, source)
    except _Wrong as wrong:
        found = (
            "a list"
            if isinstance(raw, list)
            else "a group of keys"
            if isinstance(raw, dict)
            else format_value(raw.text)
        )
        raise RecipeError(f"{key}={found} in {source}: expected {wrong}") from wrong


def reject_switch(raw: Any, wanted: Any, key: str, source: str, path: bool) -> None:
    """Raise RecipeError if a path or an optional text is `false`, `none` or the like without quotes.

    Where it is meant to switch something off, null does. run_dir, which cannot be null, may be 0 or 1.
    """
    wanted, optional = _without_none(wanted)
    if wanted not in (str, Sources) or not (path or optional) or not isinstance(raw, Scalar) or raw.quoted:
        return
    word = raw.text.strip(BLANK)
    if word.lower() in SWITCHES and word not in NULLS and (optional or not word.isdigit()):
        ways = ["null for none"] * optional + [f"'\"{word}\"' for this text"]
        raise RecipeError(
            f"{key}={word} in {source}: expected a {'path' if path else 'text'}; write {', or '.join(ways)}"
        )


def guess(text: str, key: str) -> Any:
    """Infer the value of a text without a declared type: null, a number, a boolean, a list or a string."""
    inside = text.strip(BLANK)
    if inside.startswith("[") and inside.endswith("]"):
        return [_guess(item) for item in _items(key, inside)]
    return _guess(_scalar(key, inside))


def override_text(value: Any) -> str:
    """Format a value as the right-hand side of an override."""
    if isinstance(value, list):
        groups = any(isinstance(item, dict) for item in value)  # parsed as YAML, where other items need quotes
        return f"[{', '.join(_quoted(item) if groups else _text(item, in_list=True) for item in value)}]"
    return _text(value)


def _weighted(raw: Any, key: str, source: str) -> dict[str, Any]:
    """Convert an item of a list of sources to {"source": ..., "weight": ...}."""
    if not isinstance(raw, dict):
        return {"source": convert(raw, str, key, source), "weight": 1.0}
    if not {"source"} <= raw.keys() <= {"source", "weight"}:
        raise RecipeError(
            f"{key} in {source} has the keys {format_value(', '.join(raw))}: "
            "expected {source: TEXT, weight: NUMBER}, weight optional"
        )
    weight = convert(raw["weight"], float, f"{key}.weight", source) if "weight" in raw else 1.0
    if weight <= 0:
        raise RecipeError(f"{key}.weight={weight:g} in {source} must be above 0")
    return {"source": convert(raw["source"], str, f"{key}.source", source), "weight": weight}


class _Wrong(Exception):
    """The value has the wrong type; the message says what was expected."""


def _convert(raw: Any, wanted: Any, key: str, source: str) -> Any:
    if wanted is Sources:
        if isinstance(raw, Scalar):
            return _convert(raw, str, key, source)
        if isinstance(raw, dict) or not raw:
            raise _Wrong("a text or a list of at least one {source: TEXT, weight: NUMBER}")
        return [_weighted(part, f"{key}[{i}]", source) for i, part in enumerate(raw)]
    if get_origin(wanted) is list:
        if not isinstance(raw, list):
            raise _Wrong("a list, such as [a, b]")
        (item,) = get_args(wanted)
        return [convert(part, item, f"{key}[{i}]", source) for i, part in enumerate(raw)]
    if get_origin(wanted) is Union:
        *kinds, words = get_args(wanted)  # such as bool | int | Literal["selective"]
        if isinstance(raw, Scalar) and raw.text in get_args(words):
            return raw.text
        reasons = []
        for kind in kinds:
            try:
                return _convert(raw, kind, key, source)
            except _Wrong as wrong:
                reasons.append(str(wrong))
        raise _Wrong(f"{', '.join(reasons)}, or {' or '.join(get_args(words))}")
    if not isinstance(raw, Scalar):
        raise _Wrong({str: "a text; put it in quotes", bool: "true or false"}.get(wanted, "a number"))
    if wanted is str:
        if "\0" in raw.text:
            raise _Wrong("a text without NUL characters")
        return raw.text
    return {int: _whole, float: _real, bool: _truth}[wanted](raw.text)


def _whole(text: str) -> int:
    if not _WHOLE.fullmatch(text):
        near = ""
        if _NUMBER.fullmatch(text) and len(text) < 30 and math.isfinite(float(text)) and float(text).is_integer():
            near = f", such as {int(float(text))}"
        raise _Wrong(f"a whole number{near}")
    if _LEADING_ZERO.match(text):
        raise _Wrong(f"a number without leading zeros, such as {text.lstrip('+-0_') or '0'}")
    if len(text) > 40:
        raise _Wrong("a number that fits 64 bits")
    return int(text)


def _real(text: str) -> float:
    if not _NUMBER.fullmatch(text):
        finite = text.lower().lstrip("+-.") in ("inf", "infinity", "nan")
        raise _Wrong("a finite number" if finite else "a number")
    if _LEADING_ZERO.match(text):
        raise _Wrong("a number without leading zeros")
    value = float(text)
    if not math.isfinite(value) or (value == 0 and re.search("[1-9]", re.split("[eE]", text)[0])):
        raise _Wrong("a number that fits a float")
    return value


def _truth(text: str) -> bool:
    if text in (text.lower(), text.upper(), text.capitalize()) and text.lower() in TRUE + FALSE:
        return text.lower() in TRUE
    raise _Wrong("true or false")


def _guess(scalar: Scalar) -> Any:
    text, quoted = scalar
    if quoted:
        return text
    if text in NULLS:
        return None
    for read in (_whole, _real):
        try:
            return read(text)
        except _Wrong:
            pass
    return _truth(text) if text.lower() in ("true", "false") else text


def _without_none(wanted: Any) -> tuple[Any, bool]:
    """Remove None from a union type. Return the type and whether None was part of it."""
    if get_origin(wanted) not in (Union, UnionType):
        return wanted, False
    kinds = get_args(wanted)
    rest = [kind for kind in kinds if kind is not NoneType]
    return functools.reduce(operator.or_, rest), len(rest) < len(kinds)


def _raw(node: yaml.Node, source: str, done: dict[int, Any]) -> Any:
    if id(node) in done:
        if done[id(node)] is node:
            raise RecipeError(f"{source}: an anchor at {_place(node)} contains itself")
        return done[id(node)]
    done[id(node)] = node
    if node.tag not in (f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map", "merge")):
        raise RecipeError(f"{source}: the tag at {_place(node)} is not supported; remove it")
    if isinstance(node, yaml.ScalarNode):
        raw: Any = Scalar(node.value, node.style is not None)
    elif isinstance(node, yaml.SequenceNode):
        raw = [_raw(part, source, done) for part in node.value]
    else:
        raw = _mapping(node, source, done)
    done[id(node)] = raw
    return raw


def _mapping(node: yaml.MappingNode, source: str, done: dict[int, Any]) -> dict[str, Any]:
    own: dict[str, Any] = {}
    merged: dict[str, Any] = {}
    for key, value in node.value:
        if key.tag.endswith(":merge"):
            groups = _raw(value, source, done)
            groups = groups if isinstance(groups, list) else [groups]
            if not all(isinstance(group, dict) for group in groups):
                raise RecipeError(f"{source}: << at {_place(key)} must have a group of keys, or a list of them")
            for group in groups:
                merged = group | merged  # the first definition wins
            continue
        name = _raw(key, source, done)
        if not isinstance(name, Scalar):
            raise RecipeError(f"{source}: the key at {_place(key)} is not a text")
        if name.text in own:
            raise RecipeError(f"{source}: duplicate key {format_value(name.text)} at {_place(key)}")
        own[name.text] = _raw(value, source, done)
    return merged | own


def _place(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"


def _items(key: str, text: str) -> list[Scalar]:
    """Split a [list] in an override at commas outside of quotes."""
    inside, position = text[1:-1], 0
    items: list[Scalar] = []
    while position < len(inside):
        match = _ITEM.match(inside, position)
        assert match, "_ITEM matches the empty string"
        quoted, plain, _ = match.groups()
        if quoted is None and not plain.strip(BLANK):
            if match.end() == len(inside) and (not match[3] or not items):
                break  # an empty list, or a trailing comma
            raise RecipeError(f"{key}={format_value(text)}: an item is empty; write '' for an empty text")
        items.append(_scalar(key, quoted or plain.strip(BLANK)))
        position = match.end()
    return items


def _scalar(key: str, text: str) -> Scalar:
    stripped = text.strip(BLANK)
    if not _QUOTED.fullmatch(stripped):
        return Scalar(text)
    if stripped[0] == "'":
        return Scalar(stripped[1:-1].replace("''", "'"), True)
    try:
        return Scalar(_ESCAPE.sub(_unescaped, stripped[1:-1]), True)
    except (KeyError, ValueError, OverflowError) as error:
        raise RecipeError(
            f"{key}={format_value(text)}: invalid escape in double quotes; use single quotes for a literal backslash"
        ) from error


def _unescaped(match: re.Match) -> str:
    code = match[1]
    if code[0] in "xuU":
        return chr(int(code[1:], 16))
    return "\n" if code == "n" else yaml.scanner.Scanner.ESCAPE_REPLACEMENTS[code]


def _text(value: Any, in_list: bool = False) -> str:
    if value is None:
        return "null"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {_quoted(item)}' for name, item in value.items())}}}"
    if isinstance(value, bool):
        return str(value).lower()
    text = isinstance(value, str | os.PathLike)
    value = str(value)  # possibly a number of NumPy's
    bare = value.isprintable() and value == value.strip(BLANK) and value not in ("", *NULLS) and value[0] not in "\"'"
    if bare and not ("," in value or value[0] in "[{" if in_list else text and value.lower() in SWITCHES):
        return value
    return _quoted(value)


def _quoted(value: Any) -> str:
    if value is None or isinstance(value, bool | int | float | dict):
        return _text(value)
    escapes = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t"}
    return '"' + "".join(escapes.get(c) or (c if c.isprintable() else f"\\U{ord(c):08x}") for c in str(value)) + '"'
