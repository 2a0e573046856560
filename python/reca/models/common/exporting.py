"""Write exports to a temporary folder, and move them to their destination once all files are complete."""

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from reca import units

_FULL = ("no space left", "os error 28", "disk quota", "file too large", "errno 28", "os error 27")


class Export:
    """Writer of one export's files.

    Files are written to a temporary subfolder of the destination, so that a full disk or an interruption leaves
    existing files unchanged. `done` moves them. They get the mode set by the umask, whichever library wrote them.
    """

    def __init__(self, folder: Path, aside: Path):
        self.folder, self.aside = folder, aside

    def tensors(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Write a safetensors file."""
        whole = {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}
        self._write(name, _bytes(whole), lambda path: save_file(whole, path, {"format": "pt"}))

    def pickled(self, name: str, state: Mapping[str, Any]) -> None:
        """Write a torch.save file."""
        whole = _on_cpu(state)
        self._write(name, _bytes(whole), lambda path: torch.save(whole, path))

    def json(self, name: str, content: Mapping[str, Any]) -> None:
        text = json.dumps(content, indent=2) + "\n"
        self._write(name, len(text), lambda path: path.write_text(text))

    def tokenizer(self, name: str, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write the files of a tokenizer into the subfolder `name` ("." for the export's own folder)."""
        self._write(name, 0, tokenizer.save_pretrained)

    def done(self) -> list[str]:
        """Move the files into the folder and return their sorted names, relative to it."""
        plain = self.aside / "mode"
        plain.touch()
        mode = plain.stat().st_mode & 0o777
        plain.unlink()
        files = sorted(path for path in self.aside.rglob("*") if path.is_file())
        for path in files:
            path.chmod(mode)
            with path.open("rb") as file:
                os.fsync(file.fileno())
        names = [path.relative_to(self.aside) for path in files]
        for name in names:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(self.aside / name, self.folder / name)
        return [name.as_posix() for name in names]

    def _write(self, name: str, size: int, write: Callable[[Path], object]) -> None:
        free = shutil.disk_usage(self.aside).free
        if size > free:
            raise _failed(self.folder / name, f"it needs {units.size(size)} and {units.size(free)} are free")
        path = self.aside / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path)
        except Exception as error:  # torch, safetensors and tokenizers each raise their own types
            text, free = str(error).lower(), shutil.disk_usage(self.aside).free
            full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            # torch's writer reports a full disk only as an unexpected position.
            if full or any(sign in text for sign in _FULL) or "pytorchstreamwriter" in text or "unexpected pos" in text:
                needed = f"it needs {units.size(size)} and {units.size(free)}" if size else units.size(free)
                raise _failed(self.folder / name, f"the disk is full: {needed} are free") from error
            if isinstance(error, OSError):
                raise _failed(self.folder / name, error.strerror or str(error)) from error
            raise


def _failed(path: Path, reason: str) -> OSError:
    return OSError(f"{path} cannot be written: {reason}. Existing files are unchanged; free space or choose another "
                   "folder")  # fmt: skip


@contextlib.contextmanager
def export_to(folder: Path | str) -> Iterator[Export]:
    """Yield an Export that writes all files or, after an error, none.

    Raises OSError when files cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".export-", dir=folder))
    try:
        yield Export(folder, aside)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _bytes(state: Mapping[str, Any]) -> int:
    return sum(_bytes(v) if isinstance(v, Mapping) else v.nbytes for v in state.values())


def _on_cpu(state: Mapping[str, Any]) -> dict[str, Any]:
    return {n: _on_cpu(v) if isinstance(v, Mapping) else v.detach().cpu() for n, v in state.items()}
