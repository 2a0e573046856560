"""Samples found by their keys, and counted: as by asking for every key, but without doing so."""

import json
import os

import numpy as np
import pytest

from reca.data.bad_samples import BadSamples
from reca.data.errors import DataError
from reca.data.held_out import hold_out
from reca.data.sources import index_files, records
from reca.data.sources.factory import open_source
from reca.data.sources.mixture import Subset, indices_of
from tests.data.files import conversations, fill, image_bytes, row, tar

NAMES = [
    "é/b.1",
    'a", [1',
    'a", [2',
    "a/b/c",
    "a b",
    "07",
    "7",
    "\u2028",
    "x\\",
]  # some with the end of a name in an entry
IMAGE = image_bytes()


def tars(root):
    for shard in "ab/c", "d":
        tar(root / f"{shard}.tar", *((f"{name}{suffix}", IMAGE) for name in NAMES for suffix in (".png", ".txt")))
    return f"{root}/**/*.tar", "reca"


def talks(root):
    return str(
        conversations(root, *(row("human", "Q", "gpt", "A", image=name) for name in [*NAMES, *NAMES[:3]]))
    ), "i2t"


def tables(root):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for name, rows in (("a", 5), ("b", 0), ("c", 4)):
        pq.write_table(pa.table({"image": pa.array([IMAGE] * rows, pa.binary())}), root / f"{name}.parquet", 2)
    return str(root), "reca"


def saved(root):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Value("binary")})
    datasets.Dataset.from_dict({"image": [IMAGE] * 5}, features).save_to_disk(root / "saved")
    return str(root / "saved"), "reca"


def folder(root):
    return str(fill(root / "images", {f"{n}.png": IMAGE for n in range(5)})), "reca"


def scored(root):
    rows = [{"image": name, "caption": "c", "boxes": []} for name in [*NAMES, *NAMES[:2]]]
    (root / "scored.json").write_text(json.dumps(rows))
    return str(root / "scored.json"), "srum"


@pytest.mark.parametrize("large", [0, 10**9])
@pytest.mark.parametrize("write", [tars, talks, tables, saved, folder, scored])
def test_they_are_those_that_have_the_keys(write, large, tmp_path, monkeypatch):
    monkeypatch.setenv("RECA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(index_files, "LARGE", large)
    monkeypatch.setattr(index_files, "SETTLED", 0.0)
    monkeypatch.setattr(records, "AT_ONCE", 2)
    source = open_source(*write(tmp_path))
    own = [source.key(index) for index in range(len(source))]
    others = {"", ":", "a.parquet:0003", "a.parquet:5", "row:01", "row:9", "a:٣", "0/x", "d.tar/é", 'd.tar/a", [3.png'}
    others |= {os.fsdecode(b"caf\xe9.png"), "\ud800"}  # names of files that are not UTF-8
    for some in (set(own), set(own[1::2]), set(own[:1]), set()):
        found = indices_of(source, some | others)
        assert sorted(found) == [index for index, key in enumerate(own) if key in some]
        half = Subset(source, np.arange(1, len(source), 2))
        assert [half.key(index) for index in indices_of(half, some | others)] == [k for k in own[1::2] if k in some]


@pytest.mark.parametrize("write", [tars, talks, tables, saved, scored])
def test_holding_out_does_not_ask_for_every_key(write, tmp_path, monkeypatch):
    """That took 14 us per sample of tars at each start."""
    source = open_source(*write(tmp_path))
    asked, key = [], type(source).key
    monkeypatch.setattr(type(source), "key", lambda own, index: asked.append(index) or key(own, index))
    left, aside = hold_out({"reca": source, "other": source}, 2, 0)
    assert len(asked) <= 6 < 2 * len(source)  # two in each of three places
    asked.clear()
    keys = {aside.key(0), aside.key(1)}
    assert not keys & {left["other"].key(index) for index in range(len(left["other"]))}


@pytest.mark.parametrize("write", [tars, tables, saved, folder, scored])
def test_a_bad_sample_does_not_ask_for_every_key(write, tmp_path, monkeypatch):
    """Its share is of distinct samples, and where no two have the same key, these are all."""
    source = open_source(*write(tmp_path))
    asked, key = [], type(source).key
    monkeypatch.setattr(type(source), "key", lambda own, index: asked.append(index) or key(own, index))
    with pytest.raises(DataError, match=f"1 of {len(source)} samples are unreadable"):
        BadSamples(None, source, 0.01).add(0, "junk")
    assert asked == [0]
