"""What a crash of the machine may lose: no file gets its name before its contents are on disk."""

import errno
import os
import stat
from pathlib import Path

import pytest
import torch

from reca import checkpoint
from reca.io.folders import write_atomically
from reca.models.common.exporting import export_to
from tests.driver.toy import ToyAdapter


class Disk:
    """Records which files and folders have been flushed to disk, and which had not when they were renamed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.flushed: dict[int, int] = {}  # time of the last change that is on disk, by inode
        self.lost: list[str] = []
        for name in ("rename", "replace"):
            monkeypatch.setattr(Path, name, self._checking(getattr(Path, name)))
        self.fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self._flush)

    def holds(self, path: Path) -> bool:
        """Tell whether the contents of a file, or the entries of a folder, are on disk."""
        found = path.stat()
        return self.flushed.get(found.st_ino) == found.st_mtime_ns

    def _flush(self, handle: int) -> None:
        self.fsync(handle)
        found = os.fstat(handle)
        self.flushed[found.st_ino] = found.st_mtime_ns

    def _checking(self, move):
        def moved(source: Path, target: Path):
            self.lost += [path.name for path in (source, *source.rglob("*")) if not self.holds(path)]
            return move(source, target)

        return moved


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


def test_a_checkpoint_is_on_disk_before_it_has_its_name(tmp_path, disk):
    adapter = ToyAdapter()
    optimizer = torch.optim.AdamW(adapter.layers.parameters())
    folder = checkpoint.save(tmp_path / "run", {"step": 1}, adapter, optimizer, checkpoint.Keep(1))
    assert checkpoint.latest_valid(tmp_path / "run") == folder and disk.lost == []
    assert disk.holds(tmp_path / "run/checkpoints") and disk.holds(tmp_path / "run")  # the names


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EIO])
@pytest.mark.parametrize("kind", ["folders", "files"])
def test_only_folders_may_be_on_a_file_system_that_cannot_flush_them(kind, code, tmp_path, monkeypatch):
    """As NFS, SMB and FUSE mounts may be. A disk error is one, whatever it is about."""
    real = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode) == (kind == "folders"):
            raise OSError(code, os.strerror(code))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    adapter = ToyAdapter()
    optimizer = torch.optim.AdamW(adapter.layers.parameters())
    saved = checkpoint.save(tmp_path / "run", {"step": 1}, adapter, optimizer, checkpoint.Keep(1))
    assert (saved is not None) == (kind == "folders" and code != errno.EIO)
    assert checkpoint.latest_valid(tmp_path / "run") == saved


def test_an_export_is_on_disk_before_it_has_its_name(tmp_path, disk):
    for number in range(2):  # the second one replaces the files of the first
        with export_to(tmp_path) as out:
            out.tensors("sub/b.safetensors", {"a": torch.full((2,), float(number))})
            out.json("a.json", {"export": number})
            assert out.done() == ["a.json", "sub/b.safetensors"]
            assert disk.holds(tmp_path) and disk.holds(tmp_path / "sub")
    assert disk.lost == []


@pytest.mark.parametrize("sync", [True, False])
def test_a_file_that_is_replaced(tmp_path, disk, sync):
    for content in ("before", "after"):
        write_atomically(tmp_path / "status.json", content, sync)
    assert bool(disk.lost) != sync
