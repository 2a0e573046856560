"""Exports into folders that exist: kills and errors while files are moved, files of others."""

import errno
import json
import os
import signal
from pathlib import Path

import pytest
import torch

from reca.models.common.exporting import export_to
from tests.driver.forks import exit_codes, fork_ranks

NAMES = ["a.json", "b.json", "sub/c.json"]


def files(folder) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def write(folder, content: int, names=NAMES) -> None:
    with export_to(folder) as out:
        for name in names:
            out.json(name, {"export": content})
        out.done()


def contents(folder) -> list[int]:
    return [json.loads((folder / name).read_text())["export"] for name in NAMES if (folder / name).exists()]


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("moves", range(7))
def test_a_kill_while_files_are_moved_mixes_no_exports(moves, tmp_path, monkeypatch):
    """The next export completes the folder and removes what the killed one left."""
    write(tmp_path, 1)
    (tmp_path / "foreign").touch()
    left = iter(range(moves))

    def export(_) -> None:
        for name in ("rename", "replace"):
            move = getattr(os, name)
            monkeypatch.setattr(
                os, name, lambda *given, move=move: kill() if next(left, None) is None else move(*given)
            )
        write(tmp_path, 2)

    codes = exit_codes(fork_ranks(1, export))
    found = contents(tmp_path)
    assert codes == [-signal.SIGKILL if moves < 6 else 0] and len(set(found)) < 2
    assert len(found) == abs(3 - moves)
    write(tmp_path, 3)
    assert contents(tmp_path) == [3, 3, 3] and files(tmp_path) == [*NAMES[:2], "foreign", NAMES[2]]


@pytest.mark.parametrize("blocked", NAMES)
def test_an_error_while_files_are_moved_restores_the_export_before(blocked, tmp_path, monkeypatch):
    write(tmp_path, 1)
    faults = iter([OSError(errno.EIO, os.strerror(errno.EIO), blocked)])

    def faulty(move):
        def moved(source, target):
            if Path(target) == tmp_path / blocked and (fault := next(faults, None)):
                raise fault
            return move(source, target)

        return moved

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, faulty(getattr(os, name)))
    with pytest.raises(OSError, match=f"{blocked} cannot be written"):
        write(tmp_path, 2)
    assert contents(tmp_path) == [1, 1, 1] and files(tmp_path) == NAMES


def test_a_folder_in_place_of_a_file_is_kept(tmp_path):
    (tmp_path / "b.json").mkdir()
    (tmp_path / "b.json" / "mine").touch()
    with pytest.raises(OSError, match="b.json cannot be written"):
        write(tmp_path, 1)
    assert files(tmp_path) == ["b.json/mine"]


def test_a_file_in_place_of_a_subfolder_is_kept(tmp_path):
    write(tmp_path, 1, NAMES[:2])
    (tmp_path / "sub").touch()
    with pytest.raises(OSError, match="sub cannot be written"):
        write(tmp_path, 2)
    assert contents(tmp_path) == [1, 1] and files(tmp_path) == [*NAMES[:2], "sub"]


def test_links_are_replaced_and_their_targets_kept(tmp_path):
    """A folder of the hub's cache contains links to blobs."""
    (tmp_path / "blob").write_text("blob")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.json").symlink_to("../blob")
    (tmp_path / "out" / "b.json").symlink_to("missing")
    write(tmp_path / "out", 1)
    assert contents(tmp_path / "out") == [1, 1, 1] and (tmp_path / "blob").read_text() == "blob"
    assert not any((tmp_path / "out" / name).is_symlink() for name in NAMES)


def test_two_exports_into_one_folder_keep_each_others_files(tmp_path):
    with export_to(tmp_path) as first:
        first.json("a.json", {"export": 1})
        write(tmp_path, 2)
        assert first.done() == ["a.json"]
    assert contents(tmp_path) == [1, 2, 2]


@pytest.mark.parametrize(
    "foreign", ["model.safetensors.index.json", "pytorch_model.bin", "sub/old.pth", "lora/old.bin"]
)
def test_weights_that_an_export_would_leave_beside_its_own_are_refused(foreign, tmp_path):
    """Such files would be loaded in place of the export's, or mixed with them."""
    write(tmp_path, 1)
    (tmp_path / foreign).parent.mkdir(exist_ok=True)
    (tmp_path / foreign).touch()
    with pytest.raises(OSError, match=foreign), export_to(tmp_path) as out:
        for name in NAMES:
            out.json(name, {"export": 2})
        out.tensors("model.safetensors", {"w": torch.zeros(2)})
        out.done()
    assert contents(tmp_path) == [1, 1, 1] and files(tmp_path) == sorted([*NAMES, foreign])


def test_an_export_within_another_names_the_folder_of_the_outer_one(tmp_path):
    def failing(path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    def merged(folder) -> None:
        with export_to(folder) as out:
            out._write("model.bin", 0, failing)

    with (
        pytest.raises(OSError, match=f"^{tmp_path}/model.bin cannot be written: Input/output"),
        export_to(tmp_path) as out,
    ):
        out.include(merged)
    assert files(tmp_path) == []
