"""Whether a path exists: what the system cannot tell is an error on every Python."""

import errno
import os

import pytest

from reca import checkpoint
from reca.io.paths import exists, is_dir, is_file


def test_files_folders_and_what_is_absent(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "broken").symlink_to("missing")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "folder").mkdir()
    expected = {
        "a": (True, True, False), "link": (True, True, False), "folder": (True, False, True),
        "missing": (False, False, False), "a/b": (False, False, False), "broken": (False, False, False),
        "loop": (False, False, False), "nul\0": (False, False, False),
    }  # fmt: skip
    assert {name: tuple(ask(tmp_path / name) for ask in (exists, is_file, is_dir)) for name in expected} == expected


@pytest.mark.parametrize("ask", [exists, is_file, is_dir])
@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_what_the_system_cannot_tell_is_an_error(tmp_path, monkeypatch, ask, number):
    def fail(path, **_):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, "stat", fail)
    with pytest.raises(OSError, match=os.strerror(number)):
        ask(tmp_path)


def test_a_disk_that_does_not_answer_hides_no_checkpoint(tmp_path, monkeypatch):
    """The run would start from the first step."""
    folder, stat = tmp_path / "checkpoints" / "000004", os.stat
    folder.mkdir(parents=True)
    (folder / "COMPLETE").write_text("{}")

    def fail(path, **options):
        if str(path).endswith("COMPLETE"):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", fail)
    with pytest.raises(OSError, match="Input/output error"):
        checkpoint.latest(tmp_path)
