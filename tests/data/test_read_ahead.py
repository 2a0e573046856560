"""Whoever asks about many files does not wait for one answer after the other: each takes a round trip to a server."""

import contextlib
import json
import os
import threading
from types import SimpleNamespace

import pytest
import torch

from reca.data import feature_shards
from reca.data.bad_samples import BadSamples
from reca.data.feature_shards import FeatureShards, ShardWriter
from reca.data.read_ahead import GROUP, read_ahead, read_many
from reca.data.sample import digest
from reca.data.sources import folder
from reca.data.sources.factory import open_source
from reca.data.sources.patterns import expand
from reca.precompute import _Reader
from tests.data.files import fill, said

NAMES = [f"{number:03d}.png" for number in range(2 * GROUP + 1)]
WAIT = 1.0  # seconds


@pytest.fixture
def root(tmp_path):
    return fill(tmp_path / "photos", {name: b"x" * number for number, name in enumerate(NAMES)})


def overlapping(monkeypatch, module, name, about=""):
    """Have calls of a function wait for a second one, in another thread. The result is set once there was one."""
    real, both, met = getattr(module, name), threading.Barrier(2), threading.Event()

    def called(path, *arguments, **options):
        if about in str(path) and not met.is_set():
            with contextlib.suppress(threading.BrokenBarrierError):
                both.wait(WAIT)
                met.set()
                both.abort()
        return real(path, *arguments, **options)

    monkeypatch.setattr(module, name, called)
    return met


@pytest.mark.parametrize("count", [0, 1, GROUP - 1, GROUP, GROUP + 1, 9 * GROUP])
def test_results_are_in_order(count):
    assert list(read_many(str, iter(range(count)))) == list(map(str, range(count)))


@pytest.mark.parametrize("precomputes", [False, True])
def test_reads_that_wait_end_with_the_reading(precomputes):
    """As those of remote storage that does not answer, for which Ctrl-C would have to wait."""
    closed, waits, ended = threading.Event(), threading.Event(), []

    def read(item):
        if not item:
            waits.wait(30)
            raise KeyboardInterrupt
        waits.set()
        ended.append(closed.wait(30))

    loader = SimpleNamespace(source=range(3), row_of=read, config=SimpleNamespace(workers=2), closed=closed)
    with pytest.raises(KeyboardInterrupt):
        next(iter(_Reader(loader)) if precomputes else read_ahead(read, range(3), 2, closed))
    assert ended and all(ended)


def test_sizes_of_a_folder(root, monkeypatch):
    source = open_source(str(root), "reca")
    met = overlapping(monkeypatch, os, "stat", ".png")
    assert source.identity() == digest((name, number) for number, name in enumerate(NAMES)) and met.is_set()


@pytest.mark.parametrize("task", ["i2t", "srum"])
def test_sizes_of_the_images_of_rows(root, task, monkeypatch):
    """Images that several rows share are asked about once for conversations, unless it is at the same time."""
    other = {"conversations": said("human", "Q", "gpt", "A"), "caption": "C", "boxes": []}
    rows = [{"image": name} | other for name in NAMES + NAMES[:5]]
    source = open_source(str(fill(root, {"rows.json": json.dumps(rows).encode()}) / "rows.json"), task)
    met = overlapping(monkeypatch, os, "stat", ".png")
    first = source.identity()
    (root / NAMES[3]).write_bytes(b"y" * 1000)
    assert source.identity() != first and met.is_set()


def rows_file(root):
    """Two rows of each image, good for conversations and for scored images."""
    rows = [{"image": name, "conversations": said("human", "Q", "gpt", "A"), "caption": "C", "boxes": []}
            for name in NAMES for _ in range(2)]  # fmt: skip
    return str(fill(root, {"rows.json": json.dumps(rows).encode()}) / "rows.json")


def test_a_row_is_read_once_for_the_identity(root, monkeypatch):
    source, reads = open_source(rows_file(root), "i2t"), []
    first, read = source.identity(), type(source.rows).__getitem__
    monkeypatch.setattr(type(source.rows), "__getitem__", lambda *given: reads.append(given[1]) or read(*given))
    assert source.identity() == first and reads == list(range(2 * len(NAMES)))


@pytest.mark.parametrize("task", ["i2t", "srum"])
def test_sizes_of_remote_images_of_rows_are_not_asked_about(root, task, monkeypatch):
    pytest.importorskip("fsspec")
    source = open_source(rows_file(root), task, "memory://images")
    monkeypatch.setattr(type(source), "size", lambda *_: pytest.fail("a row was asked about its image"))
    assert len(source.identity()) == 64


def test_bad_samples_of_an_earlier_start(root, monkeypatch):
    source, path = open_source(str(root), "reca"), root.parent / "bad.jsonl"
    lines = ({"key": name, "sample": number, "bytes": number, "reason": "junk"} for number, name in enumerate(NAMES))
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (root / NAMES[7]).write_bytes(b"repaired")
    met = overlapping(monkeypatch, os, "stat", ".png")
    assert BadSamples(path, source, 1.0).count() == len(NAMES) - 1 and met.is_set()


def test_files_of_a_range(root, monkeypatch):
    met = overlapping(monkeypatch, os, "stat", "0.png")
    monkeypatch.setattr(type(root), "is_file", lambda path: True)  # asks as well
    assert [path.name for path in expand(f"{root}/{{000..{len(NAMES) - 1}}}.png")] == NAMES and met.is_set()


def test_folders_of_a_folder(tmp_path, monkeypatch):
    fill(tmp_path, {f"{name}/{name}.png": b"" for name in "abcd"})
    met = overlapping(monkeypatch, os, "scandir", str(tmp_path) + "/")
    assert len(open_source(str(tmp_path), "reca")) == 4 and met.is_set()


def test_targets_of_the_links_in_a_folder(root, tmp_path, monkeypatch):
    (tmp_path / "links").mkdir()
    for name in NAMES:
        os.symlink(root / name, tmp_path / "links" / name)
    met = overlapping(monkeypatch, folder, "_entry_type")
    assert len(open_source(str(tmp_path / "links"), "reca")) == len(NAMES) and met.is_set()


def test_shards_of_features(tmp_path, monkeypatch):
    for address in ("0" * 64, "f" * 64):
        writer = ShardWriter(tmp_path)
        writer.add([address], {"h_v": torch.zeros(1, 2)})
        writer.write()
    met = overlapping(monkeypatch, feature_shards, "safe_open")
    assert len(FeatureShards(tmp_path)) == 2 and met.is_set()
