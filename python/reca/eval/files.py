"""Files of an evaluation."""

from pathlib import Path

from reca.eval.errors import EvaluationError
from reca.folders import write_atomically

# How a half of a surrogate pair is written, which no UTF-8 holds and a cut reply can: as its escape in JSON.
HALVES = "backslashreplace"


def write(path: Path, content: bytes | str, sync: bool = True) -> None:
    """Write a file of an evaluation. Raises EvaluationError when the disk does not take it; an old one stays."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content.encode("utf-8", HALVES) if isinstance(content, str) else content, sync)
    except OSError as error:
        raise EvaluationError(
            f"{path} cannot be written ({error.strerror or error}). All that was made before is kept: make room, or "
            "give another --out, and give the same command again, which goes on from there"
        ) from error
