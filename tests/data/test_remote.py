"""Data at addresses, in fsspec's memory."""

import itertools
import json
import threading

import pytest

from reca.data import outage
from reca.data.audit import audit
from reca.data.config import DataConfig
from reca.data.errors import BadSample, DataError, Outage
from reca.data.loader import open_loader
from reca.data.sources import columns, index_files, json_rows, remote, tar_index
from reca.data.sources.factory import open_source
from reca.data.sources.file_systems import own_file_system
from reca.data.sources.patterns import expand
from reca.data.sources.remote import RemotePath
from reca.data.views import View, Views
from tests.data.files import conversations, fill, image_bytes, row, said, tar

fsspec = pytest.importorskip("fsspec")
AbstractBufferedFile = pytest.importorskip("fsspec.spec").AbstractBufferedFile


@pytest.fixture
def memory(monkeypatch):
    monkeypatch.setattr(remote, "PAUSE", 0.0)
    fs = fsspec.filesystem("memory")
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def put(memory, root):
    """Copy a folder to memory://data/."""
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        memory.pipe(f"/data/{path.relative_to(root).as_posix()}", path.read_bytes())


FILES = {
    "a.png": image_bytes((1, 0, 0)), "a.txt": b"one",
    "more/b.JPG": image_bytes((2, 0, 0), format="JPEG"), "more/b.txt": b"two",
    ".c.png": image_bytes(), "d.heic": b"x", "notes.md": b"", "e.tar": b"x",
}  # fmt: skip


def test_a_folder_is_what_it_is_here(memory, tmp_path):
    put(memory, fill(tmp_path, FILES))
    for task in ("reca", "t2i"):
        there, here = open_source("memory://data", task), open_source(str(tmp_path), task)
        assert [there[i] for i in range(2)] == [here[i] for i in range(2)] and len(there) == len(here) == 2
        assert there.identity() == here.identity() and there.skipped.counts == here.skipped.counts
        assert [there.size(i) for i in range(2)] == [here.size(i) for i in range(2)]
    with pytest.raises(DataError, match=r"memory://.*nowhere does not exist, or is empty"):
        open_source("memory://nowhere", "reca")
    memory.pipe("/text/a.md", b"x")
    with pytest.raises(DataError, match=r"memory://.*text has no images .*only 1 x \.md"):
        open_source("memory://text", "reca")
    memory.pipe({"/shards/0.tar": b"x", "/shards/0.parquet": b"x"})
    with pytest.raises(DataError, match=r"only 1 x \.parquet, 1 x \.tar: name its tars .* or its tables"):
        open_source("memory://shards", "reca")
    memory.pipe({"/table/0.parquet": b"x", "/table/_delta_log/0.json": b"{}"})
    for task in ("reca", "i2t"):
        with pytest.raises(DataError, match="memory://.*table is a table of Delta or Iceberg"):
            open_source("memory://table", task)
    memory.rm("/data/a.txt")
    with pytest.raises(DataError, match=r"1 of 2 images have no caption; memory://.*a.txt is missing"):
        open_source("memory://data", "t2i")


def test_an_image_is_not_a_folder(memory):
    """Its name would be appended to itself."""
    memory.pipe("/data/a.png", image_bytes())
    for end in ("", "/"):
        with pytest.raises(DataError, match=r"memory://.*data/a.png is a single file; name its folder"):
            open_source(f"memory://data/a.png{end}", "reca")
    memory.pipe("/data/b.png/c.png", image_bytes())
    assert open_source("memory://data/b.png", "reca").key(0) == "c.png"


def test_the_listing_of_a_folder_of_tables_is_kept(memory, tmp_path, monkeypatch):
    """Each opening of a file takes its size from there: another request otherwise, for every row group."""
    pytest.importorskip("pyarrow")
    from tests.data.test_parquet import midjourney

    midjourney(tmp_path / "a.parquet", 0, 1)
    put(memory, tmp_path)
    calls, find = [], type(memory).find
    monkeypatch.setattr(type(memory), "find", lambda *args, **options: calls.append("find") or find(*args, **options))
    monkeypatch.setattr(type(memory), "invalidate_cache", lambda fs, path=None: calls.append("drop"))
    open_source("memory://data", "reca")
    assert calls == ["drop", "find"]


def test_tars_are_what_they_are_here(memory, tmp_path):
    for n in range(3):
        tar(tmp_path / f"{n}.tar", (f"{n}.png", image_bytes((n, 0, 0))), (f"{n}.txt", b"text %d" % n))
    put(memory, tmp_path)
    here = open_source(f"{tmp_path}/{{0..2}}.tar", "t2i")
    for text in ("memory://data/{0..2}.tar", "memory://data/*.tar"):
        there = open_source(text, "t2i")
        assert [there[i] for i in range(3)] == [here[i] for i in range(3)] and there.identity() == here.identity()
    assert open_source("memory://data/1.tar", "reca")[0].image == image_bytes((1, 0, 0))
    with pytest.raises(DataError, match=r"1 of the range are missing: memory://data/3.tar"):
        open_source("memory://data/{0..3}.tar", "reca")
    with pytest.raises(DataError, match=r"no tar file matches 'memory://data/x\*.tar'"):
        open_source("memory://data/x*.tar", "reca")
    memory.pipe("/data/cut.tar", (tmp_path / "0.tar").read_bytes()[:700])
    with pytest.raises(DataError, match=r"memory://.*cut.tar is cut off at byte 700"):
        open_source("memory://data/cut.tar", "reca")
    memory.pipe("/data/1.tar", b"")
    with pytest.raises(BadSample, match="is shorter than when the run began"):
        there[1]


NAMES = ["a[1].tar", "a1.tar", "b*.tar", "bx.tar", "c?.tar", "cx.tar", "d[1]/e.tar", "d1/e.tar", "._a1.tar", ".f/g.tar"]
PATTERNS = ["a[1].tar", "a[[]1].tar", "a[12].tar", "a*.tar", "b*.tar", "b[*].tar", "c?.tar", "c[?].tar", "c??tar",
            "d[1]/e.tar", "d[[]1]/*.tar", "d[1]/*.tar", "*.tar", "**/*.tar", "._*.tar", ".f/*.tar"]  # fmt: skip


def test_patterns_match_what_they_match_here(memory, tmp_path):
    """A name that exists is none, though it has [, * or ?; a pattern matches no hidden file that it does not name."""
    put(memory, fill(tmp_path, dict.fromkeys(NAMES, b"")))
    for pattern in PATTERNS:
        here, there = expand(f"{tmp_path}/{pattern}"), expand(f"memory://data/{pattern}")
        names = [path.path.removeprefix("/data/") for path in there]
        assert sorted(names) == sorted(path.relative_to(tmp_path).as_posix() for path in here), pattern


def test_a_folder_of_tables_may_have_any_name(memory, tmp_path):
    """It was a pattern if conversations were wanted."""
    pytest.importorskip("pyarrow")
    from tests.data.test_parquet import table

    columns = {"image": ["a.png"], "conversations": [said("human", "Q", "gpt", "A")]}
    data = table(tmp_path / "t.parquet", columns).read_bytes()
    put(memory, fill(tmp_path / "x", {"t[1]/t.PARQUET": data, "t[1]/._t.parquet": b"x", "t[1]/a.png": image_bytes()}))
    for folder in (f"{tmp_path}/x/t[1]", "memory://data/t[1]"):
        assert open_source(folder, "i2t")[0].text == [("Q", "A")]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_folder_is_listed_again_when_it_is_opened_again(memory, tmp_path, monkeypatch, ranges):
    """File systems of buckets keep their listings, and a notebook outlives a data set. A listing is as large as one.

    ranges: they read a range without asking for the size of the file.
    """
    monkeypatch.setattr(type(memory), "async_impl", ranges)
    kept, find = {}, type(memory).find

    def find_once(fs, path, *args, **options):
        if path not in kept:
            kept[path] = find(fs, path, *args, **options)
        return kept[path]

    monkeypatch.setattr(type(memory), "find", find_once)
    monkeypatch.setattr(type(memory), "invalidate_cache", lambda fs, path=None: kept.clear())
    for number in (1, 2):
        put(memory, fill(tmp_path, {f"{number}.png": image_bytes()}))
        assert len(open_source("memory://data", "reca")) == number and bool(kept) is not ranges


@pytest.mark.parametrize("spec", ["memory://data/*/*.tar", "memory://data/**/*.tar", "memory://data"])
def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(memory, tmp_path, monkeypatch, spec):
    """Its images would be missing in the data of a run, which would train on the others."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        tar(tmp_path / name / f"{name}.tar", (f"{name}.png", image_bytes()))
        fill(tmp_path, {f"{name}/{name}.png": image_bytes()})
    put(memory, tmp_path)
    assert len(open_source(spec, "reca")) == 2
    listed = type(memory).ls

    def ls(fs, path, *args, **options):
        if path.rstrip("/").endswith("/b"):
            raise PermissionError(f"no access to {path}")
        return listed(fs, path, *args, **options)

    monkeypatch.setattr(type(memory), "ls", ls)
    monkeypatch.setattr(type(memory), "find", fsspec.AbstractFileSystem.find)  # the usual one, folder by folder
    with pytest.raises(DataError, match="no access to /data/b"):
        open_source(spec, "reca")


def test_a_tar_that_is_packed_again_is_not_read_at_the_old_places(memory, tmp_path):
    put(memory, fill(tmp_path / "x", {"a.tar": tar(tmp_path / "one.tar", ("a.png", image_bytes())).read_bytes()}))
    source = open_source("memory://data/a.tar", "reca")
    memory.pipe("/data/a.tar", tar(tmp_path / "two.tar", ("b.png", image_bytes())).read_bytes())
    with pytest.raises(DataError, match=r"memory://.*a\.tar has other members than when the run began"):
        source[0]


def test_the_index_of_a_tar_is_one_of_its_version(memory, tmp_path, monkeypatch):
    monkeypatch.setenv("RECA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(index_files, "LARGE", 0)
    put(memory, fill(tmp_path / "x", {"a.tar": tar(tmp_path / "one.tar", ("a.png", image_bytes())).read_bytes()}))
    scans, scan = [], tar_index.read_index
    monkeypatch.setattr(tar_index, "read_index", lambda *args: scans.append(1) or scan(*args))
    assert [open_source("memory://data/a.tar", "reca").key(0) for _ in range(2)] == ["a.tar/a.png"] * 2
    assert len(scans) == 1
    memory.pipe("/data/a.tar", tar(tmp_path / "two.tar", ("b.png", image_bytes())).read_bytes())
    assert open_source("memory://data/a.tar", "reca").key(0) == "a.tar/b.png" and len(scans) == 2
    monkeypatch.setattr(remote, "CHANGES", ())  # a server that tells no versions
    for _ in range(2):
        open_source("memory://data/a.tar", "reca")
    assert len(scans) == 4


def test_a_start_asks_once_about_a_file(memory, tmp_path, monkeypatch):
    """Whether it exists, and whether it is the one of which there is an index. A request takes some 100 ms."""
    monkeypatch.setenv("RECA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(index_files, "LARGE", 0)
    shards = {f"{n}.tar": tar(tmp_path / f"{n}.tar", (f"{n}.png", image_bytes())).read_bytes() for n in range(3)}
    put(memory, fill(tmp_path / "x", shards))
    asked, info = [], memory.info
    monkeypatch.setattr(type(memory), "info", lambda fs, path, **more: asked.append(path) or info(path, **more))
    for times in (3, 1):  # the first start asks again before it keeps the index of a tar, and of all
        asked.clear()
        assert len(open_source("memory://data/{0..2}.tar", "reca")) == 3
        assert sorted(asked) == [f"/data/{n}.tar" for n in range(3) for _ in range(times)]


TAGS = ["ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created", "md5Hash", "blob_id"]


@pytest.mark.parametrize("tag", TAGS)
def test_versions_by_what_file_systems_tell_of_a_file(tag):
    """s3fs, HTTP and the hub, adlfs, sftp, gcsfs and others each name it in their own way."""

    class Files:
        def __init__(self, **facts):
            self.facts = facts

        def unstrip_protocol(self, path):
            return f"host://bucket/{path}"

        def info(self, path):
            return {"name": path, "size": 7, "type": "file"} | self.facts

    (size, one), (_, two) = (RemotePath(Files(**{tag: value}), "a").version() for value in ("1", "2"))
    assert size == 7 and one and two and one != two and RemotePath(Files(**{tag: None}), "a").version() == (7, None)


def test_a_stream_of_ranges_may_be_read_from_any_place(memory, monkeypatch):
    monkeypatch.setattr(remote, "BLOCK", 4)
    memory.pipe("/data/a", bytes(range(40)))
    with remote.open_stream(remote.remote_path("memory://data/a")) as file:
        assert file.read(10) == bytes(range(10)) and file.tell() == 10
        for place, whence, start in ((3, 0, 3), (-5, 2, 35), (-2, 1, 38), (0, 2, 40), (0, 0, 0)):
            assert file.seek(place, whence) == start and file.read(5) == bytes(range(start, min(start + 5, 40)))
            file.seek(min(start + 5, 40))


def test_parquet_is_what_it_is_here(memory, tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    from tests.data.test_parquet import midjourney, table

    for n in range(2):
        midjourney(tmp_path / "data" / f"train-{n}.parquet", 10 * n, 10)
    put(memory, tmp_path)
    here = open_source(str(tmp_path / "data"), "reca")
    for text in ("memory://data/data", "memory://data/data/train-{0..1}.parquet", "memory://data/data/*.parquet"):
        there = open_source(text, "reca")
        assert [there[i] for i in range(20)] == [here[i] for i in range(20)] and there.identity() == here.identity()
        assert there.size(3) == here.size(3)
    talk = said("human", "Q", "gpt", "A")
    memory.pipe(
        "/talk/t.parquet", table(tmp_path / "t.parquet", {"image": ["a.png"], "conversations": [talk]}).read_bytes()
    )
    memory.pipe("/talk/a.png", image_bytes())
    assert open_source("memory://talk", "i2t")[0].text == [("Q", "A")]
    addresses = table(tmp_path / "addresses.parquet", {"url": ["memory://talk/a.png", "memory://talk/b.png"]})
    source = open_source(str(addresses), "reca")
    assert source[0].image == image_bytes()
    with pytest.raises(FileNotFoundError):
        source[1]
    monkeypatch.setattr(columns, "MAX_IMAGE_BYTES", 10)
    with pytest.raises(BadSample, match="has 11 bytes; at most 10 are read"):  # of a file of unknown size
        source[0]


def test_conversations_are_what_they_are_here(memory, tmp_path, monkeypatch):
    """With images beside them, at another address, or here; read as a stream, from an index the second time."""
    monkeypatch.setenv("RECA_CACHE", str(tmp_path / "cache"))
    rows = [row("human", f"Q{i}", "gpt", "é" * i, image=f"{'ab'[i % 2]}.png") for i in range(1, 9)]
    path = conversations(tmp_path / "here", *rows, {"image": "a.png"})
    lines = path.with_suffix(".jsonl")
    lines.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows))
    put(memory, tmp_path / "here")
    reads, read = [], json_rows.stream_rows
    monkeypatch.setattr(json_rows, "stream_rows", lambda *args: reads.append(1) or read(*args))
    monkeypatch.setattr(remote, "BLOCK", 64)
    for name in ("rows.json", "rows.jsonl"):
        here = open_source(str(tmp_path / "here" / name), "i2t")
        for root in (None, "memory://data", str(tmp_path / "here")):
            there = open_source(f"memory://data/{name}", "i2t", root)
            assert [there[i] for i in range(8)] == [here[i] for i in range(8)] and len(there) == len(here) == 8
            assert [there.key(i) for i in range(8)] == [here.key(i) for i in range(8)]
            assert there.skipped.counts == here.skipped.counts
        remote_images = open_source(str(tmp_path / "here" / name), "i2t", "memory://data")
        assert remote_images[3] == here[3] and remote_images.size(3) == 0
    assert len(reads) == 2 * 2  # of each file one for the root at an address, and one for the root here
    first = there.identity()
    memory.pipe("/data/rows.jsonl", lines.read_bytes().replace(b"Q3", b"X3"))
    assert open_source("memory://data/rows.jsonl", "i2t", str(tmp_path / "here"))[2].text == [("X3", "é" * 3)]
    assert open_source("memory://data/rows.jsonl", "i2t", str(tmp_path / "here")).identity() != first
    monkeypatch.setattr(remote, "CHANGES", ())  # a server that tells no versions
    for _ in range(2):
        assert len(open_source("memory://data/rows.jsonl", "i2t")) == 8
    assert len(reads) == 2 * 2 + 1 + 2
    memory.pipe("/data/rows.json", b'[{"image": "a.png"}, ')
    with pytest.raises(DataError, match="rows.json is not JSON"):
        open_source("memory://data/rows.json", "i2t")


def test_a_stream_whose_requests_fail_goes_on(memory, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "BLOCK", 1000)
    monkeypatch.setattr(remote, "CHANGES", ())
    rows = [row("human", f"Q{i}", "gpt", "A" * 99) for i in range(99)]
    put(memory, conversations(tmp_path / "here", *rows).parent)
    calls, cat = [], type(memory).cat_file

    def flaky(self, *args, **options):
        calls.append(args)
        if len(calls) % 3:
            raise RuntimeError("connection reset")
        return cat(self, *args, **options)

    monkeypatch.setattr(type(memory), "cat_file", flaky)
    source = open_source("memory://data/rows.json", "i2t", str(tmp_path / "here"))
    assert [source[i].text[0].question for i in range(99)] == [f"Q{i}" for i in range(99)] and len(calls) > 6
    answers = {
        r"ends at byte 2000; expected \d+ bytes": lambda data, start, end: data[start : min(end, 2000)],
        "does not support partial requests": lambda data, start, end: data if start else data[:end],
    }
    data = (tmp_path / "here/rows.json").read_bytes()
    for message, answer in answers.items():
        monkeypatch.setattr(type(memory), "cat_file", lambda self, path, start, end, a=answer: a(data, start, end))
        with pytest.raises(DataError, match=f"rows.json cannot be read: .*{message}"):
            open_source("memory://data/rows.json", "i2t")


def test_addresses_that_cannot_be_read(memory):
    with pytest.raises(DataError, match=r"zzz://a cannot be opened: ValueError: Protocol not known: zzz"):
        open_source("zzz://a", "reca")
    with pytest.raises(DataError, match=r"memory://.*talk does not exist, or is empty"):
        open_source("memory://talk", "i2t")
    memory.pipe("/talk/a.md", b"x")
    with pytest.raises(DataError, match="for conversations in JSON, name the .json or .jsonl file"):
        open_source("memory://talk", "i2t")
    with pytest.raises(DataError, match=r"conversations file memory://.*talk.json does not exist"):
        open_source("memory://talk.json", "i2t")
    try:
        import s3fs  # noqa: F401
    except ImportError:
        with pytest.raises(DataError, match=r"s3://b/x.tar needs a package .*s3fs.*reca\[remote\]"):
            open_source("s3://b/x.tar", "reca")


def test_a_request_that_fails_is_made_again(memory, monkeypatch):
    memory.pipe("/data/a.png", image_bytes())
    source, calls, cat = open_source("memory://data", "reca"), [], type(memory).cat_file

    def flaky(self, *args, **options):
        calls.append(args)
        if len(calls) < 3:
            raise RuntimeError("connection reset")
        return cat(self, *args, **options)

    monkeypatch.setattr(type(memory), "cat_file", flaky)
    assert source[0].image == image_bytes() and len(calls) == 3
    memory.pipe("/data/b.png", b"")

    def broken(self, path, *args, **options):
        return 1 / 0 if path.endswith("b.png") else cat(self, path, *args, **options)

    monkeypatch.setattr(type(memory), "cat_file", broken)
    with pytest.raises(OSError, match="b.png: ZeroDivisionError") as error:
        remote.remote_path("memory://data/b.png").read_range(0, 9)
    assert not isinstance(error.value, Outage)
    monkeypatch.setattr(type(memory), "cat_file", lambda *args, **options: calls.append(1) or 1 / 0)
    with pytest.raises(Outage, match="a.png: ZeroDivisionError"):
        source[0]
    assert len(calls) == 3 + 3 + 1


@pytest.mark.parametrize("kind", ["folder", "tar", "parquet"])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_outage_changes_nothing_and_counts_nothing(memory, tmp_path, monkeypatch, caplog, kind, workers):
    """The samples are sound, and others in their place would change the data of the run."""
    images = {f"{n}.png": image_bytes((n, 0, 0)) for n in range(8)}
    if kind == "parquet":
        pytest.importorskip("pyarrow")
        from tests.data.test_parquet import midjourney

        midjourney(tmp_path / "x" / "a.parquet", 0, 8, rows=1)
    elif kind == "tar":
        tar(tmp_path / "x" / "a.tar", *images.items())
    else:
        fill(tmp_path / "x", images)
    put(memory, tmp_path / "x")
    config = DataConfig(images="memory://data" + f"/a.{kind}" * (kind != "folder"), decoder="pillow", workers=workers)

    def opened(path):
        return open_loader(config, "reca", Views(View(4), None), seed=0, micro_batch=1, bad_samples=path)

    def reds(stream):
        return [int(batch.gen[0][0, 0, 0]) for batch in itertools.islice(stream, 8)]

    sound, path = opened(None), tmp_path / "bad.jsonl"
    expected = reds(sound)
    sound.close()
    stream, requests, last = opened(path), itertools.count(), 40
    error = PermissionError("the token has expired") if kind == "folder" else RuntimeError("connection reset")
    assert stream.source[0].image
    for name in ("_open", "cat_file"):
        real = getattr(type(memory), name)

        def away(self, *args, real=real, **options):
            if next(requests) < last:
                raise error
            return real(self, *args, **options)

        monkeypatch.setattr(type(memory), name, away)
    monkeypatch.setattr(outage, "PAUSE", 0.001)
    monkeypatch.setattr(outage, "LONGEST", 0.001)
    monkeypatch.setattr(outage, "_announced", -outage.PATIENCE)
    assert reds(stream) == expected and stream.bad == 0 and not path.exists()
    assert next(requests) > last and caplog.text.count("Remote storage cannot be read; waiting") == 1
    monkeypatch.setattr(outage, "PATIENCE", 0.02)
    last = 10**9
    if kind == "parquet":
        stream.source.tables.kept.clear()
    with pytest.raises(DataError, match=f"storage could not be read for .*{error}.* No sample was"):
        stream.named_sample(8)
    assert stream.bad == 0 and not path.exists()
    with pytest.raises(DataError, match=f"storage could not be read for .*{error}"):
        audit(stream.source)
    last = 0
    assert not audit(stream.source).bad
    stream.close()


def test_an_error_that_quotes_what_a_server_sent_is_one_short_line(memory, monkeypatch):
    memory.pipe("/data/a.png", image_bytes())
    source = open_source("memory://data", "reca")

    def refuse(self, *args, **options):
        raise RuntimeError("Bad status line:\n\n" + "\n<html>" * 10_000)

    monkeypatch.setattr(type(memory), "cat_file", refuse)
    with pytest.raises(Outage, match="a.png: RuntimeError: Bad status line: <html> <html>") as error:
        source[0]
    assert len(str(error.value)) < 500 and "\n" not in str(error.value)


def test_an_empty_member_is_asked_for_no_bytes(memory, tmp_path, monkeypatch):
    """A range without bytes is invalid, and object stores answer it with the whole file."""
    memory.pipe("/data/a.tar", tar(tmp_path / "a.tar", ("a.png", image_bytes()), ("b.png", b"")).read_bytes())
    source, cat = open_source("memory://data/a.tar", "reca"), type(memory).cat_file

    def strict(self, path, start=None, end=None, **options):
        return cat(self, path, **options) if start == end else cat(self, path, start, end, **options)

    monkeypatch.setattr(type(memory), "cat_file", strict)
    assert [source[n].image for n in range(2)] == [image_bytes(), b""]


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_files_are_opened_side_by_side(memory, tmp_path, monkeypatch, kind):
    """Thousands of shards with a few requests each would take an hour one after the other."""
    for n in range(4):
        if kind == "tar":
            tar(tmp_path / f"{n}.tar", (f"{n}.png", image_bytes((n, 0, 0))))
        else:
            pytest.importorskip("pyarrow")
            from tests.data.test_parquet import midjourney

            midjourney(tmp_path / f"{n}.parquet", n, 1)
    put(memory, tmp_path)
    for name in ("info", "open"):
        real, four = getattr(type(memory), name), threading.Barrier(4)

        def together(self, path, *args, real=real, four=four, **options):
            if path.endswith(kind):
                four.wait(20)
            return real(self, path, *args, **options)

        monkeypatch.setattr(type(memory), name, together)
    source = open_source(f"memory://data/{{0..3}}.{kind}", "reca")
    monkeypatch.undo()
    assert [source[n].image for n in range(4)] == [image_bytes((n, 0, 0)) for n in range(4)]


def test_file_systems_that_other_code_shares_keep_their_settings(memory, monkeypatch):
    """Ours repeats no request: the attempts of both would multiply."""
    monkeypatch.setattr(type(memory), "retries", 5, raising=False)
    own_file_system.cache_clear()
    one, two = (remote.remote_path(f"memory://data/{name}").fs for name in "ab")
    assert one is two and one.retries == 1 and memory.retries == 5
    assert "walk" in vars(one) and not {"walk", "_walk", "retries"} & set(vars(fsspec.filesystem("memory")))


@pytest.mark.parametrize("given", [None, {"max_pool_connections": 7}, {"retries": {"max_attempts": 9}}])
def test_attempts_of_botocore_are_few_and_connections_many_unless_the_user_sets_them(given):
    """Its five of 15 s each would make one read of a silent network last as long as the patience with an outage.

    With its ten connections, 64 threads read no faster than ten.
    """

    class Bucket(fsspec.AbstractFileSystem):
        protocol = "bucket"

        def __init__(self, config_kwargs=None, **options):
            super().__init__(**options)
            self.config_kwargs = config_kwargs or {}

    shared = Bucket(config_kwargs=given)
    own = own_file_system(shared)
    assert own is not shared and shared.config_kwargs == (given or {})
    ours = {"retries": {"total_max_attempts": 2}, "max_pool_connections": 100}
    assert own.config_kwargs == ours | (given or {})


@pytest.mark.parametrize(("name", "found"), [("HTTPS_PROXY", True), ("https_proxy", True), ("NO_PROXY", False)])
def test_google_is_reached_by_the_proxy_of_the_environment(monkeypatch, name, found):
    """Every other request for its data is: those for tokens, and of other storage."""

    class Google(fsspec.AbstractFileSystem):
        protocol = "google"

        def __init__(self, session_kwargs=None, **options):
            super().__init__(**options)
            self.session_kwargs = session_kwargs or {}

    for one in ("http", "https", "no", "all"):
        monkeypatch.delenv(f"{one}_proxy", raising=False)
        monkeypatch.delenv(f"{one.upper()}_PROXY", raising=False)
    monkeypatch.setenv(name, "http://127.0.0.1:9")
    for given in ({}, {"timeout": 7}, {"trust_env": "as it is"}):
        own_file_system.cache_clear()
        assert own_file_system(Google(session_kwargs=given)).session_kwargs == {"trust_env": found} | given


def test_the_hub_is_not_asked_for_more_than_a_range():
    """Its file system would read five megabytes ahead of each member of a tar."""
    fetched = []

    class File(AbstractBufferedFile):
        def _fetch_range(self, start, end):
            fetched.append(end - start)
            return bytes(end - start)

    class Hub(fsspec.AbstractFileSystem):
        protocol, block_size = "hub", None

        def info(self, path, **options):
            return {"name": path, "size": 10**8, "type": "file"}

        def _open(self, path, mode="rb", block_size=None, **options):
            return File(self, path, mode, block_size or self.block_size, **options)

    assert len(RemotePath(own_file_system(Hub()), "a.tar").read_range(1000, 100)) == 100
    assert 100 <= sum(fetched) < 200 and Hub().block_size is None
