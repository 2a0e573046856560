"""Reading of benchmarks' text and JSON files. Errors name the file and what was expected."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reca.data.text import decode_text
from reca.eval.errors import EvaluationError


def read_text(path: Path, hint: str | None = "", errors: str = "strict") -> str:
    """Read a text file, with line ends as \\n. Raises EvaluationError on failure.

    hint: appended to messages. errors: as in bytes.decode; "replace" for result files, which an interrupted script can
    leave cut within a character.
    """
    try:
        return decode_text(path.read_bytes(), errors)
    except OSError as error:
        raise EvaluationError(f"{path} cannot be read ({error.strerror or error}). {hint or ''}".rstrip()) from error
    except ValueError as error:
        raise EvaluationError(f"{path}: {error}. {hint or ''}".rstrip()) from error


def read_lines(path: Path, hint: str | None = "", errors: str = "strict") -> list[str]:
    """Read the lines of a file. Split at line feeds only, since JSON can contain other line separators unescaped."""
    return read_text(path, hint, errors).removesuffix("\n").split("\n")


def read_answer_lines(path: Path, is_whole: Callable[[str], bool]) -> list[str]:
    """Read the lines of a result file, which an interrupted script can leave cut within the last line.

    is_whole: tells whether a last line without a line feed has a complete answer; otherwise it is omitted.
    """
    text = read_text(path, errors="replace")
    lines = text.removesuffix("\n").split("\n")
    return lines if text.endswith("\n") or is_whole(lines[-1]) else lines[:-1]


def read_json(path: Path, hint: str | None = "") -> Any:
    """Read a JSON file. Raises EvaluationError if it is not valid JSON."""
    try:
        return json.loads(read_text(path, hint))
    except RecursionError as error:
        raise EvaluationError(f"{path} is nested too deeply for JSON. {hint or ''}".rstrip()) from error
    except json.JSONDecodeError as error:
        raise EvaluationError(f"{path} is not valid JSON ({error}). {hint or ''}".rstrip()) from error
