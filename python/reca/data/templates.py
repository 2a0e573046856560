"""Template sentences: what stands beside h_v in a RECA prompt. One a line in templates.txt."""

from pathlib import Path

from reca.data.errors import DataError
from reca.data.text import decode_text


def load_templates(path: str | None = None, count: int | None = None) -> list[str]:
    """The sentences of a text file, one a line; those of the embedded world for "world:"; without a path, those of this
    package. count: so many of them, evenly spread. Raises DataError."""
    lines = _lines(path)
    if count is None:
        return lines
    if not 1 <= count <= len(lines):
        raise DataError(
            f"data.template_count={count}, but there are {len(lines)} templates; give 1 to {len(lines)}, or null"
        )
    return [lines[i * len(lines) // count] for i in range(count)]


def _lines(path: str | None) -> list[str]:
    if path == "world:":
        from reca.world.captions import TEMPLATES

        return list(TEMPLATES)
    file = Path(path).expanduser() if path else Path(__file__).with_name("templates.txt")
    if not file.is_file():
        raise DataError(f"template file {file} does not exist; data.templates names a text file, one sentence a line")
    try:
        text = decode_text(file.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"template file {file} cannot be read: {error}") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise DataError(f"template file {file} is empty; write one sentence a line")
    return lines
