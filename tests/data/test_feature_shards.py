"""Features made ahead of time: packed, exact, resumed, and used in training."""

import errno
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from reca import distributed, precompute
from reca.cli import main
from reca.config.recipe_files import load_recipe
from reca.data import cache, feature_shards
from reca.data.cache import FeatureCache, content
from reca.data.config import DataConfig
from reca.data.feature_shards import FeatureShards, ShardWriter, fill
from reca.data.loader import open_loader
from reca.data.meter import Meter
from reca.data.sources.parquet import Parquet
from reca.data.views import View, Views
from reca.io import folders
from reca.io.folders import NotWritable
from reca.options.fields import RecipeError
from tests.data.files import fill as files
from tests.data.files import image_bytes

ADDRESSES = [f"{n:064x}" for n in (5, 1 << 250, 7 << 200, (7 << 200) + 1)]  # the last two begin alike


def features(n):
    hidden = torch.randn(n, 2, 3, generator=torch.Generator().manual_seed(n)).to(torch.bfloat16)
    return {"h": hidden, "ids": [torch.arange(i) for i in range(n)]}


def test_what_is_written_is_read(tmp_path):
    wanted = features(4)
    writer = ShardWriter(tmp_path)
    for mine in (slice(0, 2), slice(2, 4)):
        writer.add(ADDRESSES[mine], {name: value[mine] for name, value in wanted.items()})
        writer.write()
    shards = FeatureShards(tmp_path)
    assert len(shards) == 4 and len(shards.paths) == 2
    for number, address in enumerate(ADDRESSES):
        found = shards.get(address)
        assert found.keys() == wanted.keys() and found["h"].dtype == torch.bfloat16
        assert torch.equal(found["h"], wanted["h"][number]) and torch.equal(found["ids"], wanted["ids"][number])
    assert shards.get(f"{(7 << 200) + 2:064x}") is None and shards.get("ff" * 32) is None
    assert FeatureShards(tmp_path / "empty").get(ADDRESSES[0]) is None


def test_shards_are_written_when_they_are_large_and_torn_ones_are_left_out(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(feature_shards, "SHARD_BYTES", 40)
    rows = [(f"{n << 200:064x}", n) for n in (3, 1, 2, 1, 5)]
    calls = []

    def encode(batch):
        calls.append(batch)
        return {"n": torch.tensor(batch)[:, None] * torch.ones(1, 8)}

    writer = fill(iter(rows), 2, encode, tmp_path)
    assert calls == [[3, 1], [2, 5]] and (writer.images, writer.bytes) == (4, 128)
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / "shard-torn.safetensors").write_bytes(b"junk")
    shards = FeatureShards(tmp_path)
    assert len(shards) == 4 and "shard-torn" in caplog.text
    assert shards.get(rows[2][0])["n"].tolist() == [2.0] * 8


def test_nothing_half_done_is_left_behind(tmp_path):
    encodings = iter([features(1)])  # of one batch; the second fails
    with pytest.raises(StopIteration):
        fill(zip(ADDRESSES, range(4), strict=True), 1, lambda _: next(encodings), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_next_start_removes_the_partial_shard_of_a_killed_process(tmp_path):
    """That of another process, which is being written now, is kept."""
    write = (
        "import os, signal, sys, torch; from pathlib import Path; from reca.io import folders; "
        "from reca.data.feature_shards import ShardWriter; "
        "folders.sync_to_disk = lambda part: os.kill(os.getpid(), signal.SIGKILL); "
        "writer = ShardWriter(Path(sys.argv[1])); writer.add(['00' * 32], {'h': torch.ones(1, 2)}); writer.write()"
    )
    folder = FeatureCache(tmp_path, VIEWS, "a").folder
    assert subprocess.run([sys.executable, "-c", write, str(folder)]).returncode == -signal.SIGKILL
    (killed,) = folder.iterdir()
    recent = killed.with_name(f".shard-1{killed.name.removeprefix('.shard-')}")
    recent.write_bytes(killed.read_bytes())
    os.utime(killed, (0, time.time() - 2 * feature_shards.ABANDONED))
    FeatureCache(tmp_path, VIEWS, "a")
    assert list(folder.iterdir()) == [recent]


VIEWS = Views(gen=View(4), und=None)


class Model(torch.nn.Module):
    """Its feature of an image is the red level."""

    encoder_roles = None
    inherited = frozenset()
    tasks = ("reca",)

    @classmethod
    def load(cls, config, device):
        cls.seen = []
        return cls()

    def views(self, task):
        return VIEWS

    def encode(self, batch):
        reds = [float(view[0, 0, 0]) for view in batch.gen]
        self.seen += reds
        return {"red": torch.tensor(reds)[:, None]}


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.setattr(precompute, "umm_package", lambda name: SimpleNamespace(Adapter=Model))
    images = {f"{n:02}.png": image_bytes((n, 0, 0)) for n in range(11)}
    root = files(tmp_path / "photos", images | {"again.png": image_bytes((3, 0, 0)), "bad.png": b"x"})
    return load_recipe("show_o_tiny", [
        f"data.images={root}", f"data.cache={tmp_path / 'cache'}", "data.max_bad_fraction=0.5",
        "objective.i2t.weight=0", "objective.reca.micro_batch=4",
    ])  # fmt: skip


def test_all_features_are_made_once_and_training_uses_them(recipe):
    (line,) = precompute.cache_features(recipe)
    assert sorted(Model.seen) == list(range(11)) and line.startswith("reca: 11 images encoded (44 bytes")
    assert ", 0 already cached, 1 bad" in line
    (line,) = precompute.cache_features(recipe)
    assert Model.seen == [] and "reca: 0 images encoded" in line and ", 12 already cached, 1 bad" in line
    stream = open_loader(
        recipe.data, "reca", VIEWS, seed=0, micro_batch=4, identity=precompute.features_identity(recipe, Model(), None)
    )
    batches = list(itertools.islice(stream, 3))
    stream.close()
    assert all(batch.features is not None and batch.gen is None for batch in batches)
    assert {float(red) for batch in batches for red in batch.features["red"]} <= set(range(11))


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_features_that_may_only_be_read_are_used(recipe, monkeypatch, caplog, code):
    """Those of a colleague, or on a disk that is mounted without the permission to write."""
    precompute.cache_features(recipe)

    def refuse(path=None, mode=0, dir=None):
        raise FileExistsError if path and os.path.exists(path) else OSError(code, os.strerror(code))

    monkeypatch.setattr(folders.tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(os, "mkdir", refuse)
    identity = precompute.features_identity(recipe, Model(), None)
    stream = open_loader(recipe.data, "reca", VIEWS, seed=0, micro_batch=4, identity=identity)
    assert next(iter(stream)).features is not None
    files(Path(recipe.data.images), {f"{n:02}.png": image_bytes((n + 100, 0, 0)) for n in range(11)})
    for batch in itertools.islice(stream, 3):
        if batch.on_encoded:
            batch.on_encoded({"red": torch.zeros(4, 1)})
    stream.close()
    assert [path.suffix for path in stream.cache.folder.iterdir()] == [".safetensors"]  # the shard
    assert caplog.text.count("may only be read: the run uses its features and adds none") == 1
    with pytest.raises(NotWritable, match="cannot be written to"):
        precompute.cache_features(recipe)
    with pytest.raises(NotWritable, match="cannot be written to"):  # of other encoders, none are there
        open_loader(recipe.data, "reca", VIEWS, seed=0, micro_batch=4, identity="others")


def test_features_belong_to_the_contents_of_weights_wherever_they_are(recipe, tmp_path):
    def identity(name):
        recipe.model.weights = str(tmp_path / name)
        return precompute.features_identity(recipe, Model(), None)

    (tmp_path / "here").write_bytes(b"weights")
    first = identity("here")
    (tmp_path / "here").rename(tmp_path / "there")
    assert identity("there") == first
    (tmp_path / "there").write_bytes(b"others")
    assert identity("there") != first


def test_a_command_that_was_stopped_goes_on_and_ranks_share(recipe, monkeypatch):
    monkeypatch.setattr(feature_shards, "SHARD_BYTES", 1)
    encode = Model.encode

    def stop(self, batch):
        if len(self.seen) >= 8:
            raise KeyboardInterrupt
        return encode(self, batch)

    monkeypatch.setattr(Model, "encode", stop)
    with pytest.raises(KeyboardInterrupt):
        precompute.cache_features(recipe)
    before = set(Model.seen)
    monkeypatch.setattr(Model, "encode", encode)
    found = []
    for rank in range(2):
        monkeypatch.setattr("reca.distributed.rank", lambda rank=rank: rank)
        monkeypatch.setattr("reca.distributed.world_size", lambda: 2)
        precompute.cache_features(recipe)
        found += Model.seen
    assert len(before) == 8 and sorted(found) == sorted(set(range(11)) - before)


def test_ranks_read_different_row_groups(recipe, tmp_path, monkeypatch):
    rows = [{"image": {"bytes": image_bytes((n, 0, 0)), "path": None}} for n in range(16)]
    pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=2)
    recipe.data.images, load, read = str(tmp_path / "a.parquet"), Parquet._load, []
    monkeypatch.setattr(Parquet, "_load", lambda self, number: read.append(number) or load(self, number))
    for rank in range(3):
        monkeypatch.setattr("reca.distributed.rank", lambda rank=rank: rank)
        monkeypatch.setattr("reca.distributed.world_size", lambda: 3)
        precompute.cache_features(recipe)
    assert sorted(set(read)) == list(range(8)) and len(read) <= 8 + 2  # two shares end inside of a group


def test_counts_are_of_all_ranks(recipe, monkeypatch):
    monkeypatch.setattr("reca.distributed.all_gather", lambda value, group=None: [value] * 3)
    assert precompute.cache_features(recipe)[0].startswith("reca: 33 images encoded (132 bytes")
    assert ", 36 already cached" in precompute.cache_features(recipe)[0]


def test_ranks_wait_for_one_that_has_more_left(recipe, monkeypatch):
    """Where a part is in the cache already, shares are unequal, by hours of many images."""
    given = []
    monkeypatch.setattr("reca.distributed.initialize", lambda minutes: given.append(minutes) or torch.device("cpu"))
    precompute.cache_features(recipe)
    assert given == [60 * distributed.HOURS]


def test_no_folder_is_an_error(recipe, capsys):
    recipe.data.cache = None
    with pytest.raises(RecipeError, match="data.cache is null: set the folder of the features"):
        precompute.cache_features(recipe)
    assert main(["cache", "show_o_tiny"]) == 3


def test_the_command_prints_what_was_done(recipe, capsys):
    overrides = [f"data.images={recipe.data.images}", f"data.cache={recipe.data.cache}", "objective.i2t.weight=0"]
    assert main(["cache", "show_o_tiny", "data.max_bad_fraction=0.5", *overrides]) == 0
    assert capsys.readouterr().out.startswith("reca: 11 images encoded")


# ---- features of a run ----


def test_a_batch_is_kept_without_waiting_for_the_disk(tmp_path, monkeypatch):
    disk, written = threading.Event(), []

    class Jobs(deque):
        def popleft(self):  # before waiting for it
            disk.set()
            return super().popleft()

    def write(path, data, sync):
        assert disk.wait(10)
        written.append(path.stem)

    monkeypatch.setattr(cache, "write_atomically", write)
    found = FeatureCache(tmp_path, VIEWS, "identity")
    batches = [content(bytes([n])) for n in range(cache.WAITING + 1)]
    hidden = torch.ones(1, 3)
    for address in batches[:-1]:
        found.put([address], {"h": hidden})
    hidden += 1  # what is kept is a copy
    assert written == [] and found.get(batches[0])["h"].tolist() == [1.0] * 3
    found.jobs = Jobs(found.jobs)
    found.put([batches[-1]], {"h": hidden})
    assert written[:1] == batches[:1]  # no more batches wait in memory than that
    found.flush()
    assert written == batches and found.get(batches[0]) is None


def test_a_loader_that_is_closed_has_written_its_features(tmp_path):
    root = files(tmp_path / "photos", {f"{n}.png": image_bytes((n, 0, 0)) for n in range(4)})
    config = DataConfig(images=str(root), cache=str(tmp_path / "cache"), decoder="pillow")
    stream = open_loader(config, "reca", VIEWS, seed=0, micro_batch=4, identity="identity")
    batch = next(iter(stream))
    batch.on_encoded({"h": torch.ones(4, 3)})
    stream.close()
    assert len(list(stream.cache.folder.glob("*/*.safetensors"))) == 4


# ---- the loader's speed ----


def test_a_meter_counts_what_threads_do(monkeypatch):
    clock = iter([0.0, 2.0, 2.0, 4.0, 10.0, 11.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    meter = Meter()
    for _ in range(2):
        with meter:
            pass
    assert meter.rate() == 0.5 and meter.rate() == 0.0
    with meter:
        pass
    assert meter.rate() == 1.0


def test_a_loader_tells_its_speed(tmp_path):
    root = files(tmp_path, {f"{n}.png": image_bytes((n, 0, 0)) for n in range(8)})
    stream = open_loader(
        DataConfig(images=str(root), workers=2, decoder="pillow"), "reca", VIEWS, seed=0, micro_batch=4
    )
    list(itertools.islice(stream, 2))
    assert stream.images_per_s() > 0
    stream.close()
