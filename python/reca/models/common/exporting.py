"""Write exports to a temporary folder, and move them to their destination once all files are complete."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from reca import units
from reca.io.folders import sync_to_disk
from reca.io.paths import is_dir, is_file
from reca.models.common.weight_files import INDEX, SUFFIXES

ASIDE = ".export-"  # beginning of the name of a folder of temporary files
LORA = "lora"  # subfolder: next to the merged weights, transformers would apply the adapter again
LOCK = "lock"  # file in it that is locked while the export is being written
WEIGHTS = (*SUFFIXES, INDEX)  # ends of the names of weight files
_FULL = ("no space left", "os error 28", "disk quota", "file too large", "errno 28", "os error 27")


class Export:
    """Writer of one export's files.

    Files are written to a temporary subfolder of the destination, so that a full disk or an interruption leaves
    existing files unchanged. `done` moves them. They get the mode set by the umask, whichever library wrote them.
    """

    def __init__(self, folder: Path, aside: Path, mode: int):
        self.folder, self.new, self.replaced, self.mode = folder, aside / "new", aside / "replaced", mode
        self.new.mkdir()

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

    def include(self, export: Callable[[Path], object]) -> None:
        """Write the files of another export, given as a function of its folder, as files of this one."""
        try:
            export(self.new)
        except OSError as error:
            raise OSError(str(error).replace(str(self.new), str(self.folder))) from error

    def done(self) -> list[str]:
        """Move the files into the folder and return their sorted names, relative to it.

        The files that they replace are moved away first and deleted last. An error moves them back. A process killed
        in between leaves a folder that lacks files, never one with files of two exports.
        """
        files = sorted(path for path in self.new.rglob("*") if is_file(path))
        for path in files:
            path.chmod(self.mode)
            sync_to_disk(path)
        names = [path.relative_to(self.new) for path in files]
        if folders := [name for name in names if is_dir(self.folder / name)]:
            raise _failed(self.folder / folders[0], "a folder has its name")
        parents = {name.parent for name in names} | {Path(LORA)}
        beside = {path.relative_to(self.folder) for parent in parents for path in (self.folder / parent).glob("*")}
        if foreign := sorted(str(name) for name in beside - set(names) if name.name.endswith(WEIGHTS)):
            more = f" and {len(foreign) - 8} more" if len(foreign) > 8 else ""
            raise OSError(
                f"{self.folder} contains weights that this export does not replace ({', '.join(foreign[:8])}{more}): "
                "they might be loaded in place of the exported ones. Remove them, or choose another folder"
            )
        there = [name for name in names if os.path.lexists(self.folder / name)]
        moved: list[tuple[Path, Path]] = []
        try:
            _move(there, self.folder, self.replaced, moved)
            _move(names, self.new, self.folder, moved)
        except BaseException as error:
            for source, target in reversed(moved):
                target.rename(source)
            if isinstance(error, OSError):
                path = Path(error.filename2 or error.filename or self.folder)
                raise _failed(path, error.strerror or str(error)) from error
            raise
        return [name.as_posix() for name in names]

    def _write(self, name: str, size: int, write: Callable[[Path], object]) -> None:
        free = shutil.disk_usage(self.new).free
        if size > free:
            raise _failed(self.folder / name, f"it needs {units.size(size)} and {units.size(free)} are free")
        path = self.new / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path)
        except Exception as error:  # torch, safetensors and tokenizers each raise their own types
            text, free = str(error).lower(), shutil.disk_usage(self.new).free
            full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            # torch's writer reports a full disk only as an unexpected position.
            if full or any(sign in text for sign in _FULL) or "pytorchstreamwriter" in text or "unexpected pos" in text:
                needed = f"it needs {units.size(size)} and {units.size(free)}" if size else units.size(free)
                raise _failed(self.folder / name, f"the disk is full: {needed} are free") from error
            if isinstance(error, OSError):
                raise _failed(self.folder / name, error.strerror or str(error)) from error
            raise


def _move(names: Iterable[Path], source: Path, target: Path, moved: list[tuple[Path, Path]]) -> None:
    """Move files between two folders of a file system, on disk when it returns, and append them to `moved`."""
    parents = set()
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).rename(target / name)
        moved.append((source / name, target / name))
        parents |= {(source / name).parent, (target / name).parent}
    for parent in parents:
        sync_to_disk(parent)


def _failed(path: Path, reason: str) -> OSError:
    return OSError(f"{path} cannot be written: {reason}. Existing files are unchanged; free space or choose another "
                   "folder")  # fmt: skip


@contextlib.contextmanager
def export_to(folder: Path | str) -> Iterator[Export]:
    """Yield an Export that writes all files or, after an error, none.

    Temporary files of killed exports are removed. Raises OSError when files cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{ASIDE}*/{LOCK}"):
        with contextlib.suppress(OSError), left.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left.parent, ignore_errors=True)
    aside = Path(tempfile.mkdtemp(prefix=ASIDE, dir=folder))
    try:
        with (aside / LOCK).open("w") as lock:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield Export(folder, aside, os.fstat(lock.fileno()).st_mode & 0o777)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _bytes(state: Mapping[str, Any]) -> int:
    return sum(_bytes(v) if isinstance(v, Mapping) else v.nbytes for v in state.values())


def _on_cpu(state: Mapping[str, Any]) -> dict[str, Any]:
    return {n: _on_cpu(v) if isinstance(v, Mapping) else v.detach().cpu() for n, v in state.items()}
