"""Columns of tables (parquet, Hugging Face datasets): choosing those of image and text, and reading their cells."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

from reca.data.config import ColumnsConfig
from reca.data.errors import BadSample, DataError, LeftOut
from reca.data.sample import MAX_CAPTION_BYTES, MAX_IMAGE_BYTES, Sample, checked_size, decode_caption
from reca.data.sources.chat_rows import LONGEST_NAME, BadRow, absolute, name_below, turns
from reca.data.sources.remote import AnyPath, is_address, lists_by_links, local_name, read_whole, to_path
from reca.data.sources.skipped import Skipped
from reca.data.tasks import Captions
from reca.io.files import parse_json

# Forms of a column. Writers such as pandas derive the type from the values, so a column without any may be of any form.
IMAGE, BYTES, TEXT, LIST, NULL, OTHER = "image", "bytes", "text", "list", "null", "other"
# Column names that are recognised if no recipe key names the column.
IMAGE_NAMES = ("image", "img", "jpg", "png", "webp", "image_bytes", "image_path", "path", "file_name", "url")
CAPTION_NAMES = ("caption", "captions", "text", "txt", "prompt", "llava")
CONVERSATION_NAMES = ("conversations", "messages")
SYSTEM = "system"  # column of the system prompts of conversations, as the key of a JSON row


class Columns(NamedTuple):
    """Names of the columns that one task reads."""

    image: str
    text: str | None = None
    system: str | None = None

    @property
    def names(self) -> list[str]:
        """Return the names of the columns that exist."""
        return [name for name in self if name is not None]


def choose(forms: Mapping[str, str], task: str, config: ColumnsConfig, where: str) -> Columns:
    """Choose the columns of a task. forms: name -> IMAGE, BYTES, TEXT, LIST, NULL or OTHER.

    Raises DataError, with the list of columns, if a named column is missing or the choice is ambiguous.
    """
    image = _named(forms, config.image, (IMAGE, BYTES, TEXT), "data.columns.image", where)
    if image is None:
        image = _only([n for n, form in forms.items() if form == IMAGE]) or _known(
            forms, IMAGE_NAMES, (IMAGE, BYTES, TEXT), "images", "image", where
        )
    if task == "t2i":
        text = _named(forms, config.caption, (LIST, TEXT), "data.columns.caption", where)
        return Columns(image, text or _known(forms, CAPTION_NAMES, (LIST, TEXT), "captions", "caption", where))
    if task == "i2t":
        text = _named(forms, config.conversations, (LIST, TEXT), "data.columns.conversations", where)
        text = text or _known(forms, CONVERSATION_NAMES, (LIST, TEXT), "conversations", "conversations", where)
        return Columns(image, text, SYSTEM if SYSTEM in forms else None)
    return Columns(image)


def _only(names: list[str]) -> str | None:
    return names[0] if len(names) == 1 else None


def _named(forms: Mapping[str, str], name: str | None, wanted: tuple, key: str, where: str) -> str | None:
    if name is None:
        return None
    if name not in forms:
        near = get_close_matches(name, list(forms), 1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise DataError(f"{key}={name}: {where} has no such column{hint} Its columns are {_list(forms)}")
    if forms[name] not in (*wanted, NULL):
        raise DataError(f"{key}={name}: this column of {where} has type {forms[name]}. Its columns are {_list(forms)}")
    return name


def _known(forms: Mapping[str, str], names: tuple, wanted: tuple, what: str, key: str, where: str) -> str:
    found = [name for name in names if forms.get(name) in wanted] or [name for name in names if forms.get(name) == NULL]
    if len(found) != 1:
        fault = f"{' and '.join(found)} may be" if found else "no column name is recognised as"
        raise DataError(f"{where}: {fault} the {what}; name one in data.columns.{key}. Its columns are {_list(forms)}")
    return found[0]


def _list(forms: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({form})" for name, form in forms.items())


def make_sample(key: str, table: Any, row: int, columns: Columns, task: str, root: AnyPath) -> Sample:
    """Return the sample of a row of an Arrow table. root: folder that paths in cells are relative to.

    An image is bytes, a path or URL, or {"bytes": ..., "path": ...} as in Hugging Face datasets.
    Raises LeftOut for a row without an image, BadSample for an invalid image, caption or conversation, and OSError.
    """
    image, text, system = (name and cell_of(table.column(name), row, name) for name in columns)
    data = image_bytes(image, root)
    if task == "t2i":
        return Sample(key, data, caption(text))
    return Sample(key, data, conversation(text, system) if task == "i2t" else None)


def cell_of(column: Any, row: int, name: str) -> Any:
    """Return a cell of an Arrow column as a Python object. Raises BadSample if it is damaged, not UTF-8 or not JSON."""
    try:
        cell = column[row].as_py()
    except UnicodeDecodeError as error:
        raise BadSample(f"the column {name} is not UTF-8") from error
    except IndexError as error:  # of a dictionary
        raise BadSample(f"the column {name} is damaged: {error}") from error
    try:
        return _decoded(cell, column.type)
    except ValueError as error:
        raise BadSample(f"the column {name} is not JSON: {error}") from error


def _decoded(cell: Any, kind: Any) -> Any:
    """Parse the JSON in a cell of an Arrow type: the cell itself, or items and fields of it. Raises ValueError."""
    if is_json(kind) and isinstance(cell, str):
        return parse_json(cell)
    if isinstance(cell, list) and hasattr(kind, "value_type"):
        return [_decoded(item, kind.value_type) for item in cell]
    if isinstance(cell, dict) and hasattr(kind, "field"):
        return {name: _decoded(value, kind.field(name).type) for name, value in cell.items()}
    return cell


def is_json(kind: Any) -> bool:
    """Tell whether an Arrow type is that of JSON, which `datasets` gives to values of several types."""
    return getattr(kind, "extension_name", None) == "arrow.json"


def image_bytes(cell: Any, root: AnyPath) -> bytes:
    """Return the bytes of an image cell. Raises LeftOut, BadSample and OSError like `make_sample`."""
    if isinstance(cell, Mapping):
        cell = cell.get("bytes") or cell.get("path")
    if not cell:
        raise LeftOut("rows without an image")
    if isinstance(cell, list):
        if len(cell) > 1:
            raise BadSample(f"the image column has {len(cell)} images in this row; expected one")
        return image_bytes(cell[0], root)
    if isinstance(cell, bytes):
        checked_size(len(cell), MAX_IMAGE_BYTES, "image")
        return cell
    if not isinstance(cell, str) or "\0" in cell:
        raise BadSample("the image column has neither bytes nor a path in this row")
    return read_whole(_path_of(cell, root), MAX_IMAGE_BYTES, "image")


def _path_of(cell: str, root: AnyPath) -> AnyPath:
    """Return the path that a cell names: a URL, or a file below the root. Raises BadSample."""
    if len(cell) > LONGEST_NAME:
        raise BadSample(
            f"the image is a text of more than {LONGEST_NAME} characters, neither a path nor a URL: store the bytes of "
            "its file (base64 is not read)"
        )
    if "::" in cell and is_address(cell) and not lists_by_links(cell):
        raise BadSample(f"the image {cell!r} is a chain of file systems, which may end in a local file: name one file")
    if is_address(cell):
        try:
            return to_path(cell)
        except DataError as error:
            raise BadSample(str(error)) from error
    name = name_below(absolute(root), local_name(cell))
    if name is None:
        raise BadSample(f"the image {cell!r} is outside {root}: set data.image_root to a folder that contains it")
    return root / name


def caption(cell: Any) -> str | Captions:
    """Return the caption of a cell, or several: a list of texts, or JSON of such a list or of an object of texts.

    BAGEL's files have an object. Of several, those that are empty or null are left out. Raises BadSample.
    """
    if isinstance(cell, str):
        checked_size(len(cell), MAX_CAPTION_BYTES, "caption")
        cell = _parsed(cell)
    if isinstance(cell, dict):
        cell = list(cell.values())
    if isinstance(cell, list) and any(cell):
        return Captions(_caption(text) for text in cell if text)
    return _caption(cell)


def _parsed(text: str) -> str | list:
    """Return the captions that a text is JSON of; the text itself if it is not."""
    if text.lstrip()[:1] not in ("{", "["):
        return text
    try:
        found = parse_json(text)
    except ValueError:
        return text
    texts = list(found.values() if isinstance(found, dict) else found)
    return texts if any(texts) and all(isinstance(text, str | None) for text in texts) else text


def _caption(cell: Any) -> str:
    if not isinstance(cell, str):
        raise BadSample("the caption is missing or not text")
    return decode_caption(cell.encode("utf-8", "surrogatepass"))


def conversation(cell: Any, system: Any) -> list:
    """Return the turns of a conversations cell: a list, or one encoded as JSON. Raises BadSample.

    system: system prompt of the row, or None.
    """
    if isinstance(cell, str):
        try:
            cell = parse_json(cell)
        except ValueError as error:
            raise BadSample(f"the conversation is not JSON: {error}") from error
    try:
        return list(turns({"conversations": cell, "system": system}, 0, Skipped()))
    except BadRow as error:
        raise BadSample(f"the turns {error}") from error
