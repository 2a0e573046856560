"""Files of benchmarks that a user has, read as text or JSON: an error names the file and what was expected."""

import json
from pathlib import Path
from typing import Any

from reca.data.text import decode_text
from reca.eval.errors import EvaluationError


def read_text(path: Path, hint: str | None = "") -> str:
    """Read a text file, whose lines end in \\n. hint: what belongs there. Raises EvaluationError."""
    try:
        return decode_text(path.read_bytes())
    except OSError as error:
        raise EvaluationError(f"{path} cannot be read ({error.strerror or error}). {hint or ''}".rstrip()) from error
    except ValueError as error:
        raise EvaluationError(f"{path}: {error}. {hint or ''}".rstrip()) from error


def read_lines(path: Path, hint: str | None = "") -> list[str]:
    """Read the lines of a file. They end at line feeds alone: JSON may hold other separators of lines as they are."""
    return read_text(path, hint).removesuffix("\n").split("\n")


def read_json(path: Path, hint: str | None = "") -> Any:
    """Read a JSON file. Raises EvaluationError."""
    try:
        return json.loads(read_text(path, hint))
    except RecursionError as error:
        raise EvaluationError(f"{path} is nested too deeply for JSON. {hint or ''}".rstrip()) from error
    except json.JSONDecodeError as error:
        raise EvaluationError(f"{path} holds no JSON ({error}). {hint or ''}".rstrip()) from error
