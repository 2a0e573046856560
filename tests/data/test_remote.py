"""Data at addresses: fsspec's memory, and a server on this machine. Nothing leaves it."""

import http.server
import itertools
import json
import re
import threading

import pytest

from reca.data import conversations as conversations_module
from reca.data import index_files, remote, tar_index
from reca.data.config import DataConfig
from reca.data.errors import BadSample, DataError
from reca.data.loader import open_loader
from reca.data.sources import open_source
from reca.data.views import View, Views
from tests.data.files import conversations, fill, image_bytes, row, said, tar

fsspec = pytest.importorskip("fsspec")


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
    with pytest.raises(DataError, match=r"memory://.*text holds no images .*only 1 x \.md"):
        open_source("memory://text", "reca")
    memory.rm("/data/a.txt")
    with pytest.raises(DataError, match=r"1 of 2 images have no caption; memory://.*a.txt is missing"):
        open_source("memory://data", "t2i")


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


def test_parquet_is_what_it_is_here(memory, tmp_path):
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


def test_conversations_are_what_they_are_here(memory, tmp_path, monkeypatch):
    """With images beside them, at another address, or here; read as a stream, from an index the second time."""
    monkeypatch.setenv("RECA_CACHE", str(tmp_path / "cache"))
    rows = [row("human", f"Q{i}", "gpt", "é" * i, image=f"{'ab'[i % 2]}.png") for i in range(1, 9)]
    path = conversations(tmp_path / "here", *rows, {"image": "a.png"})
    lines = path.with_suffix(".jsonl")
    lines.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows))
    put(memory, tmp_path / "here")
    reads, read = [], conversations_module.stream_rows
    monkeypatch.setattr(conversations_module, "stream_rows", lambda *args: reads.append(1) or read(*args))
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
        r"ends at byte 2000 and not at \d+": lambda data, start, end: data[start : min(end, 2000)],
        "does not send parts of files": lambda data, start, end: data if start else data[:end],
    }
    data = (tmp_path / "here/rows.json").read_bytes()
    for message, answer in answers.items():
        monkeypatch.setattr(type(memory), "cat_file", lambda self, path, start, end, a=answer: a(data, start, end))
        with pytest.raises(DataError, match=f"rows.json cannot be read: .*{message}"):
            open_source("memory://data/rows.json", "i2t")


def test_addresses_that_cannot_be_read(memory):
    with pytest.raises(DataError, match=r"zzz://a cannot be opened: ValueError: Protocol not known: zzz"):
        open_source("zzz://a", "reca")
    with pytest.raises(DataError, match="of conversations in JSON, name the .json or .jsonl itself"):
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
    monkeypatch.setattr(type(memory), "cat_file", lambda *args, **options: calls.append(1) or 1 / 0)
    with pytest.raises(OSError, match="a.png: ZeroDivisionError"):
        source[0]
    assert len(calls) == 6


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves files and, as object stores do, parts of them."""

    ranges, accepts = True, "bytes"

    def log_message(self, *_):
        pass

    def send_head(self):
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted or not self.ranges:
            return super().send_head()
        with open(self.translate_path(self.path), "rb") as file:
            data = file.read()
        start, end = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{end}/{len(data)}")
        self.send_header("Content-Length", str(end + 1 - start))
        self.end_headers()
        file = open(self.translate_path(self.path), "rb")  # noqa: SIM115 (its caller closes it)
        file.seek(start)
        self.left = end + 1 - start
        return file

    def copyfile(self, source, out):
        out.write(source.read(self.__dict__.pop("left", -1)))

    def end_headers(self):
        if self.accepts:
            self.send_header("Accept-Ranges", self.accepts)
        super().end_headers()


@pytest.fixture
def serve(tmp_path, monkeypatch):
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(remote, "PAUSE", 0.0)
    handler = type("Handler", (Server,), {})
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *args: handler(*args, directory=str(tmp_path / "www"))
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    thread.join()


def test_tars_and_parquet_over_http(serve, tmp_path):
    address, handler = serve
    for n in range(2):
        tar(tmp_path / "www" / f"{n}.tar", *((f"{i}.png", image_bytes((10 * n + i, 0, 0))) for i in range(6)))
    config = DataConfig(images=f"{address}/{{0..1}}.tar", decoder="pillow", workers=2)
    stream = open_loader(config, "reca", Views(View(4), None), seed=0, micro_batch=4)
    reds = [int(view[0, 0, 0]) for batch in itertools.islice(stream, 3) for view in batch.gen]
    stream.close()
    assert sorted(reds) == [*range(6), *range(10, 16)]
    with pytest.raises(DataError, match=r"1 of the range are missing: http://127.0.0.1:\d+/2.tar"):
        open_source(f"{address}/{{0..2}}.tar", "reca")
    if pytest.importorskip("pyarrow"):
        from tests.data.test_parquet import midjourney

        midjourney(tmp_path / "www" / "train-0.parquet", 0, 10)
        assert open_source(f"{address}/train-{{0..0}}.parquet", "reca")[7].image == image_bytes((7, 0, 0))
    assert len(open_source(f"{address}/*.tar", "reca")) == 12  # of a server that lists its files
    conversations(tmp_path / "www" / "talk", row("human", "Q", "gpt", "A"))
    assert open_source(f"{address}/talk/rows.json", "i2t")[0].text == [("Q", "A")]
    handler.list_directory = lambda self, path: self.send_error(404)
    with pytest.raises(DataError, match=r"no tar file matches .*page of links, and this one has none there. Write a r"):
        open_source(f"{address}/*.tar", "reca")
    handler.ranges, handler.accepts = False, "none"
    with pytest.raises(DataError, match=r"0.tar"):
        open_source(f"{address}/0.tar", "reca")
    handler.accepts = None  # Python's own server says nothing
    with pytest.raises(OSError, match=r"0.tar: the server does not send parts of files"):
        open_source(f"{address}/0.tar", "reca")[0]


def test_files_whose_requests_fail_are_read_on(serve, tmp_path, monkeypatch):
    """Headers of a tar, and footer and row groups of a table: of requests for a part every other one fails."""
    pytest.importorskip("pyarrow")
    from tests.data.test_parquet import midjourney

    address, handler = serve
    monkeypatch.setattr(remote, "BLOCK", 1000)
    members = [(f"{n}.png", image_bytes((n, 0, 0))) for n in range(12)]
    tar(tmp_path / "www" / "a.tar", *members)
    midjourney(tmp_path / "www" / "b.parquet", 0, 12)
    asked, send_head = [], handler.send_head

    def flaky(self):
        asked.append("Range" in self.headers)
        return self.send_error(503) if asked[-1] and sum(asked) % 2 else send_head(self)

    handler.send_head = flaky
    for name in ("a.tar", "b.parquet"):
        source = open_source(f"{address}/{name}", "reca")
        assert [source[n].image for n in range(12)] == [data for _, data in members]
    assert sum(asked) > 40
    monkeypatch.setattr(
        handler, "send_head", lambda self: self.send_error(503) if "Range" in self.headers else send_head(self)
    )
    with pytest.raises(DataError, match=r"a.tar cannot be read: .*a.tar: ClientResponseError: 503"):
        open_source(f"{address}/a.tar", "reca")
    with pytest.raises(DataError, match=r"b.parquet: ClientResponseError: 503"):
        open_source(f"{address}/b.parquet", "reca")
    source.tables.kept.clear()
    with pytest.raises(BadSample, match=r"row group 0 cannot be read: .*b.parquet: ClientResponseError: 503"):
        source[0]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_folder_over_http_whose_list_has_no_sizes(serve, tmp_path, ranges):
    address, handler = serve
    fill(tmp_path / "www", {"a.png": image_bytes(), "b c/d#1.png": image_bytes((1, 2, 3)), "b c/d#1.txt": b"one"})
    handler.ranges, handler.accepts = ranges, None
    source = open_source(address, "reca")
    assert [source[i].image for i in range(len(source))] == [image_bytes(), image_bytes((1, 2, 3))]
    assert source.size(0) == 0 and open_source(f"{address}/b%20c", "t2i")[0].text == "one"
