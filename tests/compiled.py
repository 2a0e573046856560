"""What tests compile, each once for a state of its sources: of two processes that ask, one waits."""

import fcntl
import hashlib
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "build" / "tests"


def version(compiler: str) -> str:
    """Return what a compiler says of itself."""
    return subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout


def once(name: str, parts: Sequence[str | Path], compile_to: Callable[[Path], None]) -> Path:
    """Return the file `name`, compiled now if it is not there for these parts.

    Args:
        name: File name.
        parts: What the file is made from: sources, and texts such as options and versions.
        compile_to: Compiles to a path. Its folder, and what else it writes there, is kept until a part changes.

    Raises the errors of compile_to, and again at the next call.
    """
    data = [part.read_bytes() if isinstance(part, Path) else part.encode() for part in parts]
    state = hashlib.sha256(b"".join(hashlib.sha256(each).digest() for each in data)).hexdigest()[:16]
    (own := FOLDER / name).mkdir(parents=True, exist_ok=True)
    made = own / state / name
    with (own / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            for before in own.iterdir():
                if before.is_dir():
                    shutil.rmtree(before)
            made.parent.mkdir()
            partial = made.with_name(f"partial_{name}")
            compile_to(partial)
            partial.rename(made)
    return made
