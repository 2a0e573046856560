"""Template sentences: what stands beside h_v in a RECA prompt. One a line in templates.txt."""

from pathlib import Path

from reca.data.sources import DataError


def load_templates(path: str | None = None) -> list[str]:
    """The sentences of a text file, one a line; those of the embedded world for "world:"; without a path, those of this
    package. Raises DataError."""
    if path == "world:":
        from reca.world.captions import TEMPLATES

        return list(TEMPLATES)
    file = Path(path).expanduser() if path else Path(__file__).with_name("templates.txt")
    if not file.is_file():
        raise DataError(f"template file {file} does not exist; data.templates names a text file, one sentence a line")
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise DataError(f"template file {file} is empty; write one sentence a line")
    return lines
