"""Hugging Face datasets, from folders: nothing here reaches for the network."""

import itertools
import json
import struct
import sys
from typing import ClassVar

import huggingface_hub
import pytest

from reca.config.recipe_files import absolute_paths, load_recipe
from reca.data.config import ColumnsConfig, DataConfig
from reca.data.errors import BadSample, DataError, LeftOut
from reca.data.loader import open_loader
from reca.data.sources import hf
from reca.data.sources.factory import open_source
from reca.data.views import View, Views
from tests.data.files import fill, image_bytes, said

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def rows(count=6, **columns):
    columns = {
        "image": [{"bytes": image_bytes((n, 0, 0)), "path": None} for n in range(count)],
        "prompt": [f"prompt {n}" for n in range(count)],
        "llava": [f"image {n}" for n in range(count)],
    } | columns
    features = {name: datasets.Value("string") for name in columns} | {"image": datasets.Image()}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def opened(path, task="reca", **columns):
    return open_source(str(path), task, None, ColumnsConfig(**columns))


def test_a_saved_folder(tmp_path):
    rows().save_to_disk(tmp_path / "saved")
    source = opened(tmp_path / "saved", "t2i", caption="llava")
    assert [source[i].text for i in range(len(source))] == [f"image {n}" for n in range(6)]
    assert source[3].image == image_bytes((3, 0, 0)) and source.key(3) == "row:3"
    with pytest.raises(DataError, match="prompt and llava may be the captions"):
        opened(tmp_path / "saved", "t2i")
    with pytest.raises(DataError, match=r"no such column; did you mean image\? Its columns are image \(image\)"):
        opened(tmp_path / "saved", image="imag")
    identity = source.identity()
    assert identity != opened(tmp_path / "saved").identity()
    (tmp_path / "saved").rename(tmp_path / "moved")
    assert opened(tmp_path / "moved", "t2i", caption="llava").identity() == identity
    rows(7).save_to_disk(tmp_path / "saved")
    assert opened(tmp_path / "saved", "t2i", caption="llava").identity() != identity


@pytest.mark.parametrize("talks", [False, True])
def test_identity_is_of_the_length_of_every_cell(tmp_path, talks):
    """Arrow pads its buffers: neither a longer text nor another order of the rows changes the size of the file."""

    def saved(name, *texts):
        cells = {"conversations": [said("human", "Q", "gpt", text) for text in texts]} if talks else {"caption": texts}
        datasets.Dataset.from_dict({"image": [image_bytes()] * len(texts), **cells}).save_to_disk(tmp_path / name)
        source = opened(tmp_path / name, "i2t" if talks else "t2i")
        return source.identity(), source.size(0)

    first, size = saved("first", "a red cat", "two")
    assert saved("again", "a red cat", "two") == (first, size)
    for name, texts in {"longer": ("a green cat", "two"), "order": ("two", "a red cat")}.items():
        other, other_size = saved(name, *texts)
        assert other_size == size and other != first


def test_names_in_cells_start_from_image_root(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    fill(tmp_path / "photos", {"a.png": image_bytes()})
    fsspec.filesystem("memory").pipe("/photos/a.png", image_bytes())
    datasets.Dataset.from_dict({"image": ["a.png"]}).save_to_disk(tmp_path / "saved")
    for root in (f"{tmp_path}/photos", f"file://{tmp_path}/photos", "memory://photos"):
        assert open_source(str(tmp_path / "saved"), "reca", root)[0].image == image_bytes()
    fsspec.filesystem("memory").rm("/photos", recursive=True)


def test_splits_are_chosen(tmp_path):
    datasets.DatasetDict({"train": rows(4), "test": rows(2)}).save_to_disk(tmp_path / "{two}")
    with pytest.raises(DataError, match=r"has the splits train, test: name one of them, such as .*/{two}/train"):
        opened(tmp_path / "{two}")
    assert len(opened(tmp_path / "{two}" / "train")) == 4
    datasets.DatasetDict({"train": rows(4)}).save_to_disk(tmp_path / "one")
    assert len(opened(tmp_path / "one")) == 4


def test_a_name_is_loaded_with_its_split(tmp_path):
    """A folder stands for a name of the hub."""
    folder = tmp_path / "set"
    folder.mkdir()
    rows(4).to_parquet(folder / "train-00000-of-00001.parquet")
    rows(2).to_parquet(folder / "test-00000-of-00001.parquet")
    source = opened(f"hf:{folder}?split=train")
    assert len(source) == 4 and source[2].image == image_bytes((2, 0, 0)) and source.key(2) == "train:2"
    assert [len(opened(f"hf:{folder}?split={part}")) for part in ("train+test", "train[:50%]+test[1:]")] == [6, 3]
    with pytest.raises(DataError, match=r"has the splits .*: name one of them, such as hf:.*\?split="):
        opened(f"hf:{folder}")
    with pytest.raises(DataError, match="cannot be loaded by datasets"):
        opened("hf:nobody/nothing?split=train")
    for text in ("hf:", "hf:a?spilt=train", "hf:a?split", "hf:a?split="):
        with pytest.raises(DataError, match=r"is not valid; write hf:NAME\?split=train"):
            opened(text)


def test_images_of_a_folder_that_datasets_loads_are_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    fill(tmp_path / "set", {f"{n}.png": image_bytes((n, 0, 0)) for n in range(3)})
    source = opened(f"hf:{tmp_path / 'set'}")
    assert source[2].image == image_bytes((2, 0, 0))


@pytest.mark.skipif(not hasattr(datasets, "Json"), reason="this datasets has no type of JSON")
@pytest.mark.parametrize("form", ["column", "turns", "texts"])
def test_columns_of_json(tmp_path, form):
    """What `datasets` makes of a file whose turns differ in type: JSON of a conversation, of its turns or texts."""
    json, text = datasets.Json(), datasets.Value("string")
    kind = {"column": json, "turns": datasets.List(json), "texts": datasets.List({"from": text, "value": json})}[form]

    def saved(name, *answers):
        talks = [said("human", "Q", "gpt", answer) for answer in answers]
        features = datasets.Features({"image": datasets.Value("binary"), "messages": kind})
        cells = {"image": [image_bytes()] * len(talks), "messages": talks}
        datasets.Dataset.from_dict(cells, features=features).save_to_disk(tmp_path / name)
        return opened(tmp_path / name, "i2t")

    source = saved("first", "A", "two")
    assert [source[n].text for n in range(2)] == [[("Q", "A")], [("Q", "two")]]
    assert saved("again", "A", "two").identity() == source.identity() != saved("order", "two", "A").identity()


def test_captions_in_the_metadata_of_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = "".join(f'{{"file_name": "{n}.png", "text": "image {n}"}}\n' for n in range(3))
    images = {f"{n}.png": image_bytes((n, 0, 0)) for n in range(3)}
    fill(tmp_path / "set", images | {"metadata.jsonl": rows.encode()})
    source = opened(f"hf:{tmp_path / 'set'}", "t2i")
    assert {(source[n].image, source[n].text) for n in range(3)} == {
        (image_bytes((n, 0, 0)), f"image {n}") for n in range(3)
    }


def test_streams_are_refused_with_what_to_do(tmp_path):
    with pytest.raises(DataError, match=r"a stream has neither .* hf://datasets/o/n/\*\*/\*\.parquet"):
        opened("hf:o/n?split=train&streaming=true")


def test_parquet_files_of_the_hub_are_read_where_they_lie(tmp_path, monkeypatch):
    """hf:// is the hub's file system of fsspec, for which one in memory stands here."""
    fsspec = pytest.importorskip("fsspec")
    from fsspec.implementations.memory import MemoryFileSystem

    class Hub(MemoryFileSystem):
        protocol = "hf"
        store: ClassVar[dict] = {}
        pseudo_dirs: ClassVar[list] = [""]

        @classmethod
        def _strip_protocol(cls, path):
            return "/" + path.removeprefix("hf://").strip("/")

    fsspec.register_implementation("hf", Hub, clobber=True)
    try:
        rows(4).to_parquet(tmp_path / "train-0.parquet")
        Hub().pipe("/datasets/o/n/data/train-0.parquet", (tmp_path / "train-0.parquet").read_bytes())
        for text in ("hf://datasets/o/n/**/*.parquet", "hf://datasets/o/n"):
            source = opened(text)
            assert len(source) == 4 and source[2].image == image_bytes((2, 0, 0))
    finally:
        sys.modules["fsspec.registry"]._registry.pop("hf", None)


def test_rows_in_a_stream(tmp_path):
    talk = [json.dumps(said("human", "<image>\nQ", "gpt", f"A {n}")) for n in range(5)] + ["junk"]
    set_ = rows(conversations=talk)
    set_.save_to_disk(tmp_path / "saved")
    config = DataConfig(conversations=str(tmp_path / "saved"), workers=2, decoder="pillow", max_bad_fraction=0.5)
    stream = open_loader(config, "i2t", Views(None, View(4)), seed=0, micro_batch=2)
    answers = {text[0].answer for batch in itertools.islice(stream, 6) for text in batch.text}
    stream.close()
    assert answers == {f"A {n}" for n in range(5)} and list(stream.bad_samples.bad) == ["row:5"]


def test_cells_are_what_is_stored_whatever_the_format(tmp_path):
    set_ = rows().select_columns(["image", "prompt"])
    for name in ("torch", "numpy", "pandas", "arrow"):
        set_.with_format(name).save_to_disk(tmp_path / name)
        sample = opened(tmp_path / name, "t2i")[3]
        assert (sample.image, sample.text) == (image_bytes((3, 0, 0)), "prompt 3")


def test_lists_of_one_image(tmp_path):
    cells = [[{"bytes": image_bytes((n, 0, 0)), "path": None}] for n in range(4)]
    features = datasets.Features({"images": datasets.Sequence(datasets.Image())})
    set_ = datasets.Dataset.from_dict({"images": cells}, features=features)
    set_.save_to_disk(tmp_path / "saved")
    set_.to_parquet(tmp_path / "t.parquet")
    for path in ("saved", "t.parquet"):
        assert opened(tmp_path / path)[2].image == image_bytes((2, 0, 0))


def test_paths_and_rows_without_image(tmp_path):
    fill(tmp_path / "photos", {"a.png": image_bytes()})
    names = {"image": [None, "a.png"]}
    datasets.Dataset.from_dict(names).save_to_disk(tmp_path / "saved")
    source = open_source(str(tmp_path / "saved"), "reca", str(tmp_path / "photos"))
    assert source[1].image == image_bytes()
    with pytest.raises(LeftOut):
        source[0]


@pytest.mark.parametrize("column", ["image", "caption"])
def test_text_that_is_not_utf8_costs_its_row(tmp_path, column):
    pa = pytest.importorskip("pyarrow")
    fill(tmp_path, {"ok": image_bytes()})
    odd = pa.array([b"ok", b"\xff\xfe"], pa.binary()).view(pa.string())
    table = pa.table({"image": ["ok", "ok"], "caption": ["one", "two"]} | {column: odd})
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "0.parquet")
    datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    for path in ("0.parquet", "saved"):
        source = open_source(str(tmp_path / path), "t2i", str(tmp_path))
        assert source[0].image == image_bytes()
        with pytest.raises(BadSample, match=f"the column {column} is not UTF-8"):
            source[1]


@pytest.mark.parametrize("form", ["bytes", "struct", "text", "turns"])
def test_damaged_offsets_cost_their_rows(tmp_path, form):
    """A file is mapped to memory unread, and an offset in it was followed to any address."""
    pa = pytest.importorskip("pyarrow")

    def cut(kind):
        """Return four parts of 40 bytes, the third of which ends behind them."""
        offsets = pa.py_buffer(struct.pack("<5i", 0, 4, 8, 60, 40))
        return pa.Array.from_buffers(kind, 4, [None, offsets, pa.py_buffer(b"abcd" * 10)])

    talk, texts, structs = said("human", "Q", "gpt", "A"), ["a", "b", "c", "d"], pa.StructArray.from_arrays
    columns = {"image": [image_bytes()] * 4, "caption": texts, "conversations": [talk] * 4}
    if form == "bytes":
        columns["image"] = cut(pa.binary())
    elif form == "struct":
        columns["image"] = structs([cut(pa.binary()), pa.array(texts)], ["bytes", "path"])
    elif form == "text":
        columns["caption"] = cut(pa.string())
    else:
        turns = structs([pa.array(["human", "gpt"] * 2), cut(pa.string())], ["from", "value"])
        columns["conversations"] = pa.ListArray.from_arrays(pa.array([0, 2, 2, 2, 4], pa.int32()), turns)
    task = {"text": "t2i", "turns": "i2t"}.get(form, "reca")
    damaged = datasets.Dataset(pa.table(columns), fingerprint="0")  # it would read all of the table for one
    source = hf.HuggingFace(damaged, task, ColumnsConfig(), "rows", tmp_path)
    assert source[0].image == (b"abcd" if form in ("bytes", "struct") else image_bytes())
    with pytest.raises(BadSample, match="the row is damaged: "):
        source[3]


@pytest.mark.parametrize("offset", [-5, 60])
def test_damaged_offsets_of_lists_do_not_end_the_process(tmp_path, offset):
    """The identity is made at the start, of the lengths of all cells, and Arrow follows offsets around a null."""
    pa = pytest.importorskip("pyarrow")
    turns = pa.array(said("human", "Q", "gpt", "A") * 2)
    offsets = pa.py_buffer(struct.pack("<5i", 0, 2, offset, 2, 4))
    lists = pa.Array.from_buffers(pa.list_(turns.type), 4, [pa.py_buffer(b"\x0b"), offsets], children=[turns])
    damaged = datasets.Dataset(pa.table({"image": [image_bytes()] * 4, "messages": lists}), fingerprint="0")
    source = hf.HuggingFace(damaged, "i2t", ColumnsConfig(), "rows", tmp_path)
    assert source.identity() == source.identity() and source[0].text == source[3].text
    with pytest.raises(BadSample, match="the row is damaged: "):
        source[1]


def test_folders_that_are_not_whole_and_no_datasets(tmp_path, monkeypatch):
    fill(tmp_path / "saved", {"state.json": b"{", "dataset_info.json": b"{}"})
    with pytest.raises(DataError, match="saved cannot be opened by datasets: "):
        opened(tmp_path / "saved")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"needs Hugging Face datasets.*pip install 'reca\[hf\]'"):
        opened(tmp_path / "saved")


def test_names_stay_as_they_are():
    recipe = load_recipe("show_o_512", ["data.images=hf:owner/name?split=train"])
    assert absolute_paths(recipe).data.images == "hf:owner/name?split=train"
