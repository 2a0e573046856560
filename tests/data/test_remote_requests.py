"""Requests for remote files: which are made again, from where, and of how many bytes."""

import io
from pathlib import Path

import pytest

from reca.data.errors import BadSample, DataError
from reca.data.sources import remote
from reca.data.sources.remote import RemotePath

DATA = bytes(range(256)) * 10


class Files:
    """A file system of one host. refused: status of the answers about b.png. asked: paths of all requests."""

    def __init__(self, refused=None):
        self.refused, self.asked = refused, []

    def unstrip_protocol(self, path):
        return f"host://bucket/{path}"

    def cat_file(self, path, start=None, end=None):
        self.asked.append(path)
        if path == "b.png" and self.refused:
            error = RuntimeError("refused")
            error.status = self.refused
            raise error
        return DATA[start:end]

    def open(self, path, mode, block_size):
        return Torn(DATA)


class Torn(io.BytesIO):
    """A file whose second read fails when it has already moved on."""

    reads = 0

    def read(self, size=-1):
        data, self.reads = super().read(size), self.reads + 1
        if self.reads == 2:
            raise RuntimeError("connection reset")
        return data


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(remote, "PAUSE", 0.0)


@pytest.mark.parametrize(
    "status, kind, requests", [(401, PermissionError, 1), (403, PermissionError, 1), (500, OSError, 3)]
)
def test_what_is_forbidden_is_asked_for_once(status, kind, requests):
    """Whether the storage answers about other files is asked once more, for the one that was read last."""
    files = Files(status)
    with pytest.raises(OSError, match="host://bucket/b.png: RuntimeError: refused") as error:
        RemotePath(files, "b.png").read_range(0, 9)
    assert type(error.value) is kind and files.asked == ["b.png"] * requests
    files.asked.clear()
    assert RemotePath(files, "a.png").read_range(0, 9) == DATA[:9]
    with pytest.raises(OSError, match="host://bucket/b.png: RuntimeError: refused") as error:
        RemotePath(files, "b.png").read_range(0, 9)
    again = [] if kind is PermissionError else ["b.png"]
    assert type(error.value) is kind and files.asked == ["a.png", *["b.png"] * requests, "a.png", *again]


def test_a_read_that_fails_half_way_is_made_from_where_it_began():
    with RemotePath(Files(), "a.parquet").open() as file:
        assert [file.read(100), file.read(100), file.read(50)] == [DATA[:100], DATA[100:200], DATA[200:250]]


def test_a_file_above_the_limit_is_refused_and_never_cut(tmp_path):
    (tmp_path / "a.png").write_bytes(DATA)
    for path in (tmp_path / "a.png", RemotePath(Files(), "a.png")):
        assert remote.read_whole(path, len(DATA), "image") == DATA
        with pytest.raises(BadSample):
            remote.read_whole(path, len(DATA) - 1, "image")


def test_an_address_of_a_local_file_is_its_path():
    assert remote.to_path("file:///a/b.tar") == Path("/a/b.tar") and not remote.is_address("file:///a/b.tar")
    assert remote.is_address("s3://a/b.tar") and not remote.is_address("/a/b.tar")


def test_a_table_that_cannot_be_read_is_not_called_damaged(monkeypatch):
    """Nor is its address named twice."""
    pytest.importorskip("pyarrow")
    from reca.data.sources.parquet import read_footer

    monkeypatch.setattr(Torn, "read", lambda self, size: 1 / 0)
    monkeypatch.setattr(remote, "_answered", {})
    with pytest.raises(DataError, match="^host://bucket/a.parquet cannot be read: ZeroDivisionError: division"):
        read_footer(RemotePath(Files(), "a.parquet"))
