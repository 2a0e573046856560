"""Template sentences, the text next to h_v in a RECA prompt."""

from pathlib import Path

from reca.data.errors import DataError
from reca.data.sources.chat_rows import IMAGE
from reca.data.spec import load_object, parse_spec
from reca.data.text import decode_text
from reca.io.files import parse_json
from reca.io.paths import is_file


def load_templates(source: str | None = None, count: int | None = None) -> list[str]:
    """Return template sentences. Raises DataError.

    source: a text file with one sentence per line, or the importable spec of a list; None: the package's 360 templates.
    count: number of them to use, evenly spread; None: all.
    """
    lines = _lines(source)
    if marked := [line for line in lines if IMAGE in line]:
        raise DataError(
            f"data.templates={source}: {IMAGE} in {marked[0]!r} would be read as text; remove it from the "
            f"{len(marked)} templates that contain it. The image always comes before the sentence"
        )
    if count is None:
        return lines
    if not 1 <= count <= len(lines):
        raise DataError(
            f"data.template_count={count}, but there are {len(lines)} templates; give 1 to {len(lines)}, or null"
        )
    return [lines[i * len(lines) // count] for i in range(count)]


def _lines(source: str | None) -> list[str]:
    if source and (spec := parse_spec(source)):
        found = load_object(spec, "data.templates")
        if not isinstance(found, list | tuple) or not found or not all(isinstance(line, str) for line in found):
            raise DataError(
                f"data.templates={source} names a {type(found).__name__}; it must be a list of sentences, with at "
                "least one"
            )
        return list(found)
    file = Path(source) if source else Path(__file__).with_name("templates.txt")
    if not is_file(file):
        raise DataError(
            f"template file {file} does not exist; set data.templates to a text file with one sentence per line, or "
            "package.module:LIST"
        )
    try:
        text = decode_text(file.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"template file {file} cannot be read: {error}") from error
    if _is_json(text):
        raise DataError(
            f"template file {file} is JSON; write its sentences one per line, or name a list as package.module:LIST"
        )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise DataError(f"template file {file} is empty; write one sentence per line")
    return lines


def _is_json(text: str) -> bool:
    try:
        return isinstance(parse_json(text), list | dict)
    except ValueError:
        return False
