"""Requests for remote files: which are made again, from where, and of how many bytes."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from reca.data.errors import BadSample, DataError, Outage
from reca.data.sources import remote
from reca.data.sources.remote import RemotePath

DATA = bytes(range(256)) * 10


class Files:
    """A file system. refused: status of the answers about b.png. away: hosts. asked: paths of all requests."""

    gone = ()

    def __init__(self, refused=None):
        self.refused, self.away, self.asked = refused, set(), []

    def unstrip_protocol(self, path):
        return path if "://" in path else f"host://{path}" if "/" in path else f"host://bucket/{path}"

    def cat_file(self, path, start=None, end=None):
        self._ask(path)
        return DATA[start:end]

    def info(self, path):
        self._ask(path)
        return {"size": len(DATA), "type": "file"}

    def _ask(self, path):
        self.asked.append(path)
        if path in self.gone:
            raise FileNotFoundError(path)
        if any(f"{host}/" in path for host in self.away):
            raise RuntimeError("connection reset")
        if path == "b.png" and self.refused:
            if self.refused == "timeout":
                raise ReadTimeoutError("refused")
            error = RuntimeError("refused")
            error.status = self.refused
            raise error


class ReadTimeoutError(OSError):
    """As that of botocore: not a TimeoutError."""


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(remote, "PAUSE", 0.0)


@pytest.mark.parametrize(
    "status, kind, requests",
    [(401, PermissionError, 1), (403, PermissionError, 1), (500, OSError, 3), ("timeout", TimeoutError, 1)],
)
def test_what_is_forbidden_is_asked_for_once(status, kind, requests):
    """Whether the storage answers about other files is asked once more, for the one that was read last."""
    files = Files(status)
    with pytest.raises(OSError, match="host://bucket/b.png: .*Error: refused") as error:
        RemotePath(files, "b.png").read_range(0, 9)
    assert type(error.value) is kind and files.asked == ["b.png"] * requests
    files.asked.clear()
    assert RemotePath(files, "a.png").read_range(0, 9) == DATA[:9]
    with pytest.raises(OSError, match="host://bucket/b.png: .*Error: refused") as error:
        RemotePath(files, "b.png").read_range(0, 9)
    again = [] if kind is PermissionError else ["b.png"]
    assert type(error.value) is kind and files.asked == ["a.png", *["b.png"] * requests, "a.png", *again]


def test_what_is_gone_is_asked_for_once():
    """Many images of a table of URLs are. A server says so by 410, or as of any missing file by 404."""
    files = Files(410)
    with pytest.raises(FileNotFoundError, match="host://bucket/b.png: RuntimeError: refused"):
        RemotePath(files, "b.png").read_range(0, 9)
    assert files.asked == ["b.png"] and not RemotePath(files, "b.png").exists()


def test_a_host_that_is_away_is_an_outage_though_others_answer():
    """Its samples would be counted as bad. A host that has never answered may as well be misspelt."""
    files = Files()
    one, two, new = (RemotePath(files, f"{host}/a.png") for host in ("one", "two", "new"))
    assert one.read_range(0, 9) == two.read_range(0, 9) == DATA[:9]
    files.away = {"one", "new"}
    with pytest.raises(Outage, match="host://one/a.png: RuntimeError: connection reset"):
        one.read_range(0, 9)
    with pytest.raises(OSError, match="host://new/a.png: RuntimeError: connection reset"):
        new.read_range(0, 9)
    assert two.read_range(0, 9) == DATA[:9]


def test_a_host_that_is_away_is_none_of_thousands():
    """Some images of a table of URLs are always gone. If no host answers, the network is at fault."""
    files = Files()
    paths = [RemotePath(files, f"https://{host}/a.png") for host in range(9)]
    assert all(path.read_range(0, 9) for path in paths)
    files.away, last = {"8"}, paths[-1]
    with pytest.raises(OSError, match="connection reset"):
        last.read_range(0, 9)
    files.away |= set("01234567")
    files.asked.clear()
    with pytest.raises(Outage):
        last.read_range(0, 9)
    assert files.asked == ["https://8/a.png"] * 3 + [f"https://{host}/a.png" for host in (8, 7, 6, 5)]
    assert len(remote._answered[files]) == remote.HOSTS + 1


@pytest.mark.parametrize(("scheme", "count"), [("https://", remote.HOSTS), ("", 9)])
def test_a_host_that_is_away_is_an_outage_if_few_are_needed(scheme, count):
    """And a bucket is, however many there are."""
    files = Files()
    paths = [RemotePath(files, f"{scheme}{host}/a.png") for host in range(count)]
    assert all(path.read_range(0, 9) for path in paths)
    files.away = {"0"}
    with pytest.raises(Outage):
        paths[0].read_range(0, 9)


def test_a_host_that_has_lost_a_file_answers():
    """It is asked for the file that was read last, which may be gone."""
    files = Files(500)
    assert RemotePath(files, "a.png").read_range(0, 9)
    files.gone = {"a.png"}
    with pytest.raises(OSError, match="refused"):
        RemotePath(files, "b.png").read_range(0, 9)


def test_a_server_has_time_to_recover_between_attempts(monkeypatch):
    waits = []
    monkeypatch.setattr(remote, "PAUSE", 0.5)
    monkeypatch.setattr(remote, "time", SimpleNamespace(sleep=waits.append))
    with pytest.raises(OSError, match="refused"):
        RemotePath(Files(500), "b.png").read_range(0, 9)
    assert waits == [0.5, 1.0]


@pytest.mark.parametrize(("status", "kind"), [(403, PermissionError), (500, OSError)])
def test_a_host_that_has_only_told_about_files_is_asked_for_them(status, kind):
    """As at the start of a run, whose first reads would make every sample bad, or wait for one file of many."""
    files = Files(status)
    assert RemotePath(files, "bucket/a.png").exists()
    with pytest.raises(kind, match="refused"):
        RemotePath(files, "b.png").read_range(0, 9)
    files.away = {"bucket"}
    with pytest.raises(Outage):
        RemotePath(files, "bucket/c.png").read_range(0, 9)


@pytest.mark.parametrize(("status", "kind"), [(403, PermissionError), (500, Outage)])
def test_a_host_of_which_no_file_is_known_is_away_unless_it_refuses(status, kind):
    files = Files(status)
    RemotePath(files, "bucket").note()  # by its listing
    with pytest.raises(kind, match="refused"):
        RemotePath(files, "b.png").read_range(0, 9)


def test_a_file_that_fails_after_it_was_read_is_at_fault_if_another_is_sent():
    files = Files()
    assert RemotePath(files, "a.tar").read_range(0, 9) and RemotePath(files, "b.png").read_range(0, 9)
    files.refused = 500
    files.asked.clear()
    with pytest.raises(OSError, match="refused"):
        RemotePath(files, "b.png").read_range(0, 9)
    assert files.asked == ["b.png"] * 3 + ["a.tar", "b.png"]


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

    read, files = Files.cat_file, Files()
    monkeypatch.setattr(Files, "cat_file", lambda fs, path, **part: read(fs, path, **part) if path == "a" else 1 / 0)
    assert RemotePath(files, "a").read_range(0, 9)
    with pytest.raises(DataError, match="^host://bucket/a.parquet cannot be read: ZeroDivisionError: division"):
        read_footer(RemotePath(files, "a.parquet"))
