"""Files of an evaluation and of benchmarks. Errors name the file and what was expected."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reca.data.text import decode_text
from reca.eval.errors import EvaluationError
from reca.io.files import parse_json
from reca.io.folders import make_inside, write_atomically

DURING_TRAINING = Path("eval") / "training"  # in the run folder: SUITE/STEP


def encoded(text: str) -> bytes:
    """Encode text as UTF-8. Lone surrogates, which a truncated reply can contain, are written as their JSON escapes."""
    return text.encode("utf-8", "backslashreplace")


def is_of_training(folder: Path) -> bool:
    """Tell whether the folder of an evaluation is one that training has made, by its path."""
    return folder.absolute().parts[-4:-2] == DURING_TRAINING.parts


def write(path: Path, content: bytes | str, sync: bool = True, root: Path | None = None) -> None:
    """Write a file atomically. Raises EvaluationError if that fails; an existing file is then unchanged.

    root: existing folder below which missing parents of the file are created; None: its parent exists.
    """
    try:
        make_inside(root or path.parent, path.parent)
        write_atomically(path, encoded(content) if isinstance(content, str) else content, sync)
    except OSError as error:
        way = "free disk space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "remove the cause"
        raise EvaluationError(
            f"{path} cannot be written ({error.strerror or error}). Finished outputs are kept: {way}, then run the "
            "same command again to resume"
        ) from error


def read_text(path: Path, hint: str | None = None, errors: str = "strict") -> str:
    """Read a text file, with line ends as \\n. Raises EvaluationError on failure.

    hint: appended to messages. errors: as in bytes.decode; "replace" for result files, which an interrupted script can
    leave cut within a character.
    """
    try:
        return decode_text(path.read_bytes(), errors)
    except OSError as error:
        raise _error(f"{path} cannot be read ({error.strerror or error})", hint) from error
    except ValueError as error:
        raise _error(f"{path}: {error}", hint) from error


def read_lines(path: Path, hint: str | None = None, errors: str = "strict") -> list[str]:
    """Read the lines of a file. Split at line feeds only, since JSON can contain other line separators unescaped."""
    return read_text(path, hint, errors).removesuffix("\n").split("\n")


def read_answer_lines(path: Path, is_whole: Callable[[str], bool]) -> list[str]:
    """Read the lines of a result file, which an interrupted script can leave cut within the last line.

    is_whole: tells whether a last line without a line feed has a complete answer; otherwise it is omitted.
    """
    text = read_text(path, errors="replace")
    lines = text.removesuffix("\n").split("\n")
    return lines if text.endswith("\n") or is_whole(lines[-1]) else lines[:-1]


def read_json(path: Path, hint: str | None = None) -> Any:
    """Read a JSON file. Raises EvaluationError if it is not valid JSON."""
    text = read_text(path, hint)
    try:
        return parse_json(text)
    except ValueError as error:
        raise _error(f"{path} is not valid JSON ({error})", hint) from error


def _error(text: str, hint: str | None) -> EvaluationError:
    return EvaluationError(f"{text}. {hint or ''}".rstrip())
