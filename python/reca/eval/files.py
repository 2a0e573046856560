"""Files of an evaluation."""

from pathlib import Path

from reca.eval.errors import EvaluationError
from reca.io.folders import make_inside, write_atomically

# Encoding error handler: lone surrogates, which a truncated reply can contain, are written as their JSON escapes.
HALVES = "backslashreplace"


def write(path: Path, content: bytes | str, sync: bool = True, root: Path | None = None) -> None:
    """Write a file atomically. Raises EvaluationError if that fails; an existing file is then unchanged.

    root: existing folder below which missing parents of the file are created; None: its parent exists.
    """
    try:
        make_inside(root or path.parent, path.parent)
        write_atomically(path, content.encode("utf-8", HALVES) if isinstance(content, str) else content, sync)
    except OSError as error:
        raise EvaluationError(
            f"{path} cannot be written ({error.strerror or error}). Finished outputs are kept: free disk space, "
            "then run the same command again to resume"
        ) from error
