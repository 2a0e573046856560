"""Files of an evaluation."""

from pathlib import Path

from reca.eval.errors import EvaluationError
from reca.io.folders import write_atomically

# Encoding error handler: lone surrogates, which a truncated reply can contain, are written as their JSON escapes.
HALVES = "backslashreplace"


def write(path: Path, content: bytes | str, sync: bool = True) -> None:
    """Write a file atomically. Raises EvaluationError if that fails; an existing file is then unchanged."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content.encode("utf-8", HALVES) if isinstance(content, str) else content, sync)
    except OSError as error:
        raise EvaluationError(
            f"{path} cannot be written ({error.strerror or error}). Finished outputs are kept: free disk space or set "
            "another --out, then run the same command again to resume"
        ) from error
