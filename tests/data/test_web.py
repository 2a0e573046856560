"""Data at a web server, which runs on this machine. Nothing leaves it."""

import contextlib
import errno
import http.server
import itertools
import json
import re
import socket
import threading
import time

import pytest

from reca.data import outage
from reca.data.config import DataConfig
from reca.data.errors import BadSample, DataError, Outage
from reca.data.loader import open_loader
from reca.data.sources import remote, web
from reca.data.sources.factory import open_source
from reca.data.views import View, Views
from tests.data.files import conversations, fill, image_bytes, row, tar

aiohttp = pytest.importorskip("aiohttp")
fsspec = pytest.importorskip("fsspec")


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
    monkeypatch.setattr(remote, "PAUSE", 0.0)
    monkeypatch.setattr(remote, "_answered", {})
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    web.web_files.cache_clear()
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
    talk = conversations(tmp_path / "www" / "talk", row("human", "Q", "gpt", "A"))
    talk.with_suffix(".jsonl").write_text(json.dumps(row("human", "Q", "gpt", "A")) + "\n")
    for name in ("rows.json", "rows.json?download=true", "rows.jsonl?download=true"):  # the hub's links end so
        assert open_source(f"{address}/talk/{name}", "i2t")[0].text == [("Q", "A")]
    handler.list_directory = lambda self, path: self.send_error(404)
    with pytest.raises(DataError, match=r"no tar file matches .*page of links .* has none there. Write a r"):
        open_source(f"{address}/*.tar", "reca")
    handler.ranges, handler.accepts = False, None  # Python's own server says nothing
    with pytest.raises(OSError, match=r"0.tar: the server does not support partial requests"):
        open_source(f"{address}/0.tar", "reca")[0]


@pytest.mark.parametrize("name", ["a.tar", "b.parquet"])
def test_a_server_that_sends_whole_files_only(serve, tmp_path, name):
    pytest.importorskip("pyarrow")
    from tests.data.test_parquet import midjourney

    address, handler = serve
    tar(tmp_path / "www" / "a.tar", ("0.png", image_bytes()))
    midjourney(tmp_path / "www" / "b.parquet", 0, 1)
    handler.ranges, handler.accepts = False, "none"
    with pytest.raises(DataError, match=f"{name}.* does not support partial requests"):
        open_source(f"{address}/{name}", "reca")
    send_header = handler.send_header
    handler.send_header = lambda self, key, value: key == "Content-Length" or send_header(self, key, value)
    with pytest.raises(DataError, match=f"{name}.* does not report the size of the file"):
        open_source(f"{address}/{name}", "reca")


def test_requests_for_a_table(serve, tmp_path):
    """When it is opened, none for its images; for a row group one, of the bytes of its columns."""
    pytest.importorskip("pyarrow")
    from tests.data.test_parquet import table

    address, handler = serve
    (tmp_path / "www").mkdir()
    images = [bytes([n]) * 2**18 for n in range(6)]
    rows = {"image": images, "caption": ["one"] * 6, "other": ["x" * 50_000] * 6}
    table(tmp_path / "www" / "t.parquet", rows, rows=2, compression="none", use_dictionary=False)
    asked, copied, copyfile = [], [], handler.copyfile
    handler.do_HEAD = lambda self: asked.append("HEAD") or Server.do_HEAD(self)
    handler.do_GET = lambda self: asked.append("GET") or Server.do_GET(self)
    handler.copyfile = lambda self, file, out: copied.append(self.left) or copyfile(self, file, out)
    source = open_source(f"{address}/t.parquet", "t2i")
    assert asked == ["HEAD", "GET", "GET", "GET"] and sum(copied) < 10_000
    asked.clear()
    assert [source[n].image for n in range(2)] == images[:2] and asked == ["HEAD", *["GET"] * 4]  # the footer again
    asked.clear(), copied.clear()
    assert [source[n].image for n in range(2, 6)] == images[2:] and asked == ["GET"] * 2
    assert 2**20 < sum(copied) < 2**20 + 2000


def test_a_table_that_has_grown_is_said_to_have_other_rows(serve, tmp_path):
    pytest.importorskip("pyarrow")
    from tests.data.test_parquet import midjourney

    address, _ = serve
    midjourney(tmp_path / "www" / "t.parquet", 0, 10)
    source = open_source(f"{address}/t.parquet", "reca")
    midjourney(tmp_path / "www" / "t.parquet", 0, 20)
    with pytest.raises(BadSample, match=r"t.parquet has other rows than when the run began"):
        source[0]


def test_a_file_of_which_no_part_is_sent_is_not_read(serve, tmp_path, monkeypatch):
    """It may have any size. Its server answers: another file that cannot be read is the fault of that file."""
    address, handler = serve
    fill(tmp_path / "www", {"a.png": b"x" * 100, "b.png": b"x" * 10**6})
    handler.ranges, handler.accepts = False, None
    bodies, read = [], aiohttp.ClientResponse.read
    monkeypatch.setattr(aiohttp.ClientResponse, "read", lambda answer: bodies.append(answer.url.name) or read(answer))
    small, large, missing = (remote.remote_path(f"{address}/{name}") for name in ("a.png", "b.png", "c.png"))
    assert small.read_range(0, 100) == b"x" * 100
    for path, start, end in ((large, 0, 1000), (large, 5, 10**7), (small, 5, 1000)):
        with pytest.raises(OSError, match=f"^{path}: the server does not support partial requests"):
            path.read_range(start, end)
    assert bodies == ["a.png"]
    handler.send_head = lambda self: self.send_error(500) if "c.png" in self.path else Server.send_head(self)
    with pytest.raises(OSError, match=r"c.png: .*500"):
        missing.read_range(0, 1000)


@pytest.mark.parametrize("name", ["", "talk/rows.json", "a.tar"])
def test_no_file_may_be_compressed_on_its_way(serve, tmp_path, name):
    """Its parts could not be asked for: some servers send all of it then, and others parts of what is compressed."""
    address, handler = serve
    tar(tmp_path / "www" / "a.tar", ("a.png", image_bytes()))
    conversations(tmp_path / "www" / "talk", row("human", "Q", "gpt", "A"))
    accepted, send_head = [], handler.send_head
    handler.send_head = lambda self: accepted.append(self.headers["Accept-Encoding"]) or send_head(self)
    assert open_source(f"{address}/{name}", "i2t" if "json" in name else "reca")[0].image
    assert set(accepted) == {"identity"}


def test_a_proxy_is_that_of_the_environment(serve, tmp_path, monkeypatch):
    address, _ = serve
    monkeypatch.setenv("HTTP_PROXY", address)
    tar(tmp_path / "www" / "http:" / "elsewhere.test" / "a.tar", ("a.png", image_bytes()))
    assert open_source("http://elsewhere.test/a.tar", "reca")[0].image == image_bytes()


def test_the_settings_of_fsspec_for_web_servers_hold(serve, tmp_path, monkeypatch):
    monkeypatch.setattr("fsspec.implementations.http.HTTPFileSystem.protocol", "abstract")  # as before 2025.10
    address, handler = serve
    monkeypatch.setitem(fsspec.config.conf, "https", {"client_kwargs": {"headers": {"Authorization": "Bearer 7"}}})
    tar(tmp_path / "www" / "a.tar", ("a.png", image_bytes()))
    asked, send_head = [], handler.send_head
    handler.send_head = lambda self: asked.append(self.headers) or send_head(self)
    assert open_source(f"{address}/a.tar", "reca")[0].image
    assert {(one["Authorization"], one["Accept-Encoding"]) for one in asked} == {("Bearer 7", "identity")}
    assert web.web_files().client_kwargs["timeout"].sock_read == web.STALLED


def test_the_headers_of_a_tar_are_read_once(serve, tmp_path, monkeypatch):
    """Each is checked a second time, a few bytes before it was read: fsspec's usual cache of web files drops them."""
    monkeypatch.setattr(remote, "BLOCK", 10_000)
    address, handler = serve
    path = tar(tmp_path / "www" / "a.tar", *((f"{n}.png", bytes(1000)) for n in range(50)))
    copied, copyfile = [], handler.copyfile
    handler.copyfile = lambda self, file, out: copied.append(self.left) or copyfile(self, file, out)
    assert len(open_source(f"{address}/a.tar", "reca")) == 50 and sum(copied) < 1.1 * path.stat().st_size


def test_a_part_that_was_not_asked_for_is_an_error(serve, tmp_path):
    address, handler = serve
    tar(tmp_path / "www" / "a.tar", ("0.png", image_bytes()), ("1.png", image_bytes((9, 9, 9))))
    source, send_header = open_source(f"{address}/a.tar", "reca"), handler.send_header

    def moved(self, key, value):
        send_header(self, key, re.sub(r"\d+-", "7-", value) if key == "Content-Range" else value)

    handler.send_header = moved
    with pytest.raises(Outage, match=r"a.tar: .*the server sent 'bytes 7-.* when asked for 'bytes=1-"):
        source[0]
    with pytest.raises(Outage, match=r"storage cannot be read: .*a.tar: .*the server sent 'bytes 7-"):
        open_source(f"{address}/a.tar", "reca")


def test_a_request_ends_when_nothing_more_arrives_and_not_before(serve, tmp_path, monkeypatch):
    """A row group may take longer than the five minutes that aiohttp gives to a request."""
    monkeypatch.setattr(web, "STALLED", 1.0)
    address, handler = serve
    fill(tmp_path / "www", {"a.png": image_bytes()})
    source, ended = open_source(address, "reca"), threading.Event()
    assert source.root.fs.client_kwargs["timeout"].total is None
    monkeypatch.setattr(remote, "ATTEMPTS", 1)
    handler.copyfile = lambda self, file, out: (out.write(file.read(min(9, self.left))), ended.wait(30))
    with pytest.raises(TimeoutError, match=r"a.png: the server stopped answering"):
        source[0]
    ended.set()


def test_a_connection_is_waited_for_less_than_data(serve, monkeypatch):
    """Some hosts of a table of URLs answer nothing, not even that they are not there."""
    monkeypatch.setattr(web, "CONNECTING", 0.2)
    with socket.socket() as silent, contextlib.ExitStack() as held:
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)
        with pytest.raises(TimeoutError):  # when no more connections wait to be accepted
            for _ in range(100):
                held.enter_context(socket.create_connection(silent.getsockname(), 0.2))
        began = time.monotonic()
        with pytest.raises(TimeoutError, match="a.png: the server stopped answering"):
            remote.remote_path(f"http://127.0.0.1:{silent.getsockname()[1]}/a.png").read_range(0, 9)
    assert time.monotonic() - began < web.STALLED / 2


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
    for name in ("a.tar", "b.parquet"):
        with pytest.raises(Outage, match=f"{name}: ClientResponseError: 503"):
            open_source(f"{address}/{name}", "reca")
    source.tables.kept.clear()
    with pytest.raises(Outage, match=r"b.parquet: ClientResponseError: 503"):
        source[0]


@pytest.mark.parametrize("workers", [0, 4])
@pytest.mark.parametrize("failing", [r"/0\.png", r"/9\.png", r"png"])
def test_the_first_image_that_is_read_is_not_waited_for_if_others_are_sent(
    serve, tmp_path, monkeypatch, failing, workers
):
    """Of a host that had only listed its files nothing else was asked: one bad image was an outage if it came first."""
    monkeypatch.setattr(outage, "PATIENCE", 0.0)
    address, handler = serve
    fill(tmp_path / "www", {f"{n}.png": image_bytes() for n in range(10)})
    send = handler.send_head
    handler.send_head = lambda self: self.send_error(500) if re.search(failing, self.path) else send(self)
    config = DataConfig(images=address, shuffle=False, workers=workers, decoder="pillow", max_bad_fraction=1.0)
    stream = open_loader(config, "reca", Views(View(4), None), seed=0, micro_batch=10)
    with pytest.raises(DataError, match="remote storage") if failing == "png" else contextlib.nullcontext():
        next(iter(stream))
    stream.close()
    assert stream.bad == (failing != "png")


@pytest.mark.parametrize("ranges", [True, False])
def test_a_folder_over_http_whose_list_has_no_sizes(serve, tmp_path, ranges):
    address, handler = serve
    fill(tmp_path / "www", {"a.png": image_bytes(), "b c/d#1.png": image_bytes((1, 2, 3)), "b c/d#1.txt": b"one"})
    handler.ranges, handler.accepts = ranges, None
    source = open_source(address, "reca")
    assert [source[i].image for i in range(len(source))] == [image_bytes(), image_bytes((1, 2, 3))]
    assert source.size(0) == 0 and open_source(f"{address}/b%20c", "t2i")[0].text == "one"


NAMES = ["a#1.png", "b?x=1.png", "c d.png", "e%20f.png", "g%h.png", "\u00fc.png", "i/j&k;l.png", "m+n'.png", "o[1].png"]


def test_any_name_may_lie_below_an_address(serve, tmp_path):
    """Names in data are names, not parts of URLs: of rows, of a table, and of what a server lists."""
    address, _ = serve
    images = {name: image_bytes((number, 0, 0)) for number, name in enumerate(NAMES)}
    root = fill(tmp_path / "www", images)
    (root / "rows.json").write_text(json.dumps([row("human", "Q", "gpt", "A", image=name) for name in NAMES]))
    for image_root in (None, address, str(root)):
        source = open_source(f"{address}/rows.json", "i2t", image_root)
        assert [source[n].image for n in range(len(NAMES))] == list(images.values())
        assert [source.key(n) for n in range(len(NAMES))] == NAMES
    for name, shown in (("a1.tar", "a1.tar"), ("a[1].tar", "a[1].tar"), ("a[1].tar", "a%5B1%5D.tar")):
        tar(root / name, ("a.png", image_bytes()))
        assert open_source(f"{address}/{shown}", "reca").key(0) == f"{shown}/a.png"
    folder = open_source(address, "reca")
    assert {folder[n].image for n in range(len(folder))} == set(images.values())
    with pytest.raises(DataError, match=r"9 of 9 images have no caption; http://127.0.0.1:\d+/%C3%BC.txt is missing"):
        open_source(address, "t2i")
    if pytest.importorskip("pyarrow"):
        from tests.data.test_parquet import table

        table(root / "names.parquet", {"image": NAMES})
        source = open_source(f"{address}/names.parquet", "reca")
        assert [source[n].image for n in range(len(NAMES))] == list(images.values())


def test_images_at_urls_in_a_table_share_their_connections(serve, tmp_path):
    """A connection for every image, which none closed, ended a run with too many open files."""
    pytest.importorskip("pyarrow")
    from tests.data.test_parquet import table

    address, handler = serve
    images = {f"{number}.png": image_bytes((number, 0, 0)) for number in range(8)}
    fill(tmp_path / "www", images)
    handler.protocol_version = "HTTP/1.1"  # which keeps connections
    setup, connections = handler.setup, []
    handler.setup = lambda self: connections.append(1) or setup(self)
    source = open_source(str(table(tmp_path / "t.parquet", {"url": [f"{address}/{name}" for name in images]})), "reca")
    assert [source[number].image for number in range(8)] == list(images.values()) and len(connections) == 1


WHAT = [
    ("rows.json", "i2t"),
    ("a.tar", "reca"),
    ("{0..1}.tar", "reca"),
    ("*.tar", "reca"),
    ("", "reca"),
    ("s.json", "srum"),
]


@pytest.mark.parametrize(("name", "task"), WHAT)
def test_a_server_that_fails_has_not_said_that_a_file_is_missing(serve, name, task):
    address, handler = serve
    for status, attempts in ((503, 3), (429, 3), (403, 1)):
        asked = []
        handler.send_head = lambda self, status=status, asked=asked: asked.append(self.path) or self.send_error(status)
        linked = status == 403 and "*" in name
        message = "page of links" if linked else f"cannot be (read|listed): .*{status}"
        with pytest.raises(DataError, match=message) as error:
            open_source(f"{address}/{name}", task)
        assert str(error.value).count(address) == 1 + ("{" in name)  # the range, and a file
        assert max(map(asked.count, asked)) == attempts * (2 if name else 1)  # HEAD and GET
    handler.send_head = lambda self: self.send_error(404)
    with pytest.raises(DataError, match="does not exist|no tar file matches"):
        open_source(f"{address}/{name}", task)
    with pytest.raises(DataError, match=r"cannot be (read|listed): .*Connect"):
        open_source(f"http://127.0.0.1:9/{name}", task)


def test_a_request_that_asks_whether_a_file_is_there_is_made_again(serve, tmp_path):
    address, handler = serve
    conversations(tmp_path / "www", row("human", "Q", "gpt", "A"))
    asked, send_head = [], handler.send_head

    def flaky(self):
        asked.append(self.path)
        return self.send_error(503) if len(asked) < 5 else send_head(self)

    handler.send_head = flaky
    assert open_source(f"{address}/rows.json", "i2t")[0].text == [("Q", "A")]


def test_a_folder_below_a_folder_is_not_lost_with_its_connection(serve, tmp_path, monkeypatch):
    from fsspec.implementations.http import HTTPFileSystem

    address, _ = serve
    fill(tmp_path / "www", {"a.png": image_bytes(), "more/b.png": image_bytes((1, 2, 3))})
    asked, listed = [], HTTPFileSystem._ls_real

    async def reset(self, url, **options):
        asked.append(url)
        if "more" in url and asked.count(url) < least:
            raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
        return await listed(self, url, **options)

    monkeypatch.setattr(HTTPFileSystem, "_ls_real", reset)
    for least in (3, 9):
        with pytest.raises(DataError, match="reset by peer") if least > 3 else contextlib.nullcontext():
            assert len(open_source(address, "reca")) == 2
