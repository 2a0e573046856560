"""Parquet files as people have them: columns, row groups, order, and what is wrong with them."""

import itertools
import json
import os
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from reca.config.recipe_files import absolute_paths, load_recipe
from reca.data import order
from reca.data.audit import audit
from reca.data.config import ColumnsConfig, DataConfig
from reca.data.errors import BadSample, DataError, LeftOut
from reca.data.loader import open_loader
from reca.data.recently_used import RecentlyUsed
from reca.data.sample import digest
from reca.data.sources import columns as columns_module
from reca.data.sources import parquet
from reca.data.sources.factory import open_source
from reca.data.views import View, Views
from tests.data.files import fill, image_bytes, said

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def table(path, columns, types=None, rows=4, **options):
    """A parquet file of {column: values}, `rows` in a row group. Its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: pa.array(values, (types or {}).get(name)) for name, values in columns.items()}
    pq.write_table(pa.table(arrays), path, row_group_size=rows, **options)
    return path


def midjourney(path, first, count, rows=4):
    """Rows as the Midjourney set of the paper has them."""
    numbers = range(first, first + count)
    return table(
        path,
        {
            "id": [str(n) for n in numbers],
            "image": [{"bytes": image_bytes((n, 0, 0)), "path": None} for n in numbers],
            "width": [8] * count,
            "prompt": [f"prompt {n}" for n in numbers],
            "llava": [f"an image of {n}" for n in numbers],
            "llava_status": ["ok"] * count,
        },
        {"image": IMAGE},
        rows,
    )


def opened(path, task="reca", image_root=None, **columns):
    return open_source(str(path), task, image_root, ColumnsConfig(**columns))


def test_the_midjourney_layout(tmp_path):
    for n in range(3):
        midjourney(tmp_path / "data" / f"train-0000{n}-of-00003.parquet", 10 * n, 10)
    fill(tmp_path, {"README.md": b"# a data set"})
    for path in (tmp_path, tmp_path / "data" / "*.parquet", tmp_path / "data" / "train-0000{0..2}-of-00003.parquet"):
        source = opened(path)
        assert len(source) == 30
        assert [source[i].image for i in (0, 9, 10, 29)] == [image_bytes((n, 0, 0)) for n in (0, 9, 10, 29)]
    captions = opened(tmp_path, "t2i", caption="llava")
    assert captions[17].text == "an image of 17" and captions.key(17) == "train-00001-of-00003.parquet:7"
    with pytest.raises(DataError, match=r"prompt and llava may be the captions; name one in data.columns.caption"):
        opened(tmp_path, "t2i")


@pytest.mark.parametrize(
    ("columns", "types", "chosen"),
    [
        ({"anything": [{"bytes": image_bytes(), "path": "x"}]}, {"anything": IMAGE}, {}),
        ({"jpg": [image_bytes()]}, None, {}),
        ({"a": [image_bytes()], "b": [b"x"]}, None, {"image": "a"}),
        ({"image": ["a.png"]}, None, {}),
        ({"image": [{"bytes": None, "path": "a.png"}]}, {"image": IMAGE}, {}),
        ({"images": [[{"bytes": image_bytes(), "path": None}]]}, {"images": pa.list_(IMAGE)}, {}),
        ({"image": [image_bytes()]}, {"image": pa.large_binary()}, {}),
        ({"image": [image_bytes()]}, {"image": pa.binary(len(image_bytes()))}, {}),
        ({"image": [[{"bytes": image_bytes(), "path": None}]]}, {"image": pa.list_(IMAGE, 1)}, {}),
        ({"shot": [{"width": 8, "bytes": image_bytes()}]}, None, {}),
    ],
)
def test_where_an_image_may_be(tmp_path, columns, types, chosen):
    fill(tmp_path, {"a.png": image_bytes()})
    source = opened(table(tmp_path / "t.parquet", columns, types), **chosen)
    assert source[0].image == image_bytes()


@pytest.mark.parametrize("task", ["reca", "t2i"])
def test_tables_beside_tars_are_not_taken_for_the_images(tmp_path, task):
    """Beside each tar img2dataset writes a table of its URLs, from which the images would be fetched again."""
    table(tmp_path / "00000.parquet", {"url": ["https://host.invalid/0.png"], "caption": ["a cat"]})
    fill(tmp_path, {"00000.tar": b"", "00000_stats.json": b""})
    with pytest.raises(DataError, match=r": name its tars as FOLDER/\*\.tar, or its tables as FOLDER/\*\.parquet"):
        opened(tmp_path, task)
    assert len(opened(tmp_path / "*.parquet", task)) == 1


@pytest.mark.parametrize("task", ["reca", "i2t"])
@pytest.mark.parametrize("log", ["_delta_log/00000000000000000000.json", "metadata/00001-8f.metadata.json"])
def test_tables_whose_folder_has_earlier_versions_are_refused(tmp_path, task, log):
    """Rows of theirs that were replaced or deleted would be samples."""
    columns = {"image": [image_bytes()], "conversations": [said("human", "Q", "gpt", "A")]}
    table(tmp_path / "data" / "part-0.parquet", columns)
    fill(tmp_path, {"metadata/notes.json": b"{}", "data/_delta_log.json": b"{}"})
    assert len(opened(tmp_path, task)) == 1
    fill(tmp_path, {log: b"{}"})
    with pytest.raises(DataError, match=f"is a table of Delta or Iceberg, by {log}: .* or name the files as FOLDER/"):
        opened(tmp_path, task)
    assert len(opened(tmp_path / "data" / "*.parquet", task)) == 1


def test_files_that_spark_has_not_committed_are_no_part_of_a_table(tmp_path):
    table(tmp_path / "_temporary" / "0" / "part-1.parquet", {"image": [image_bytes()]})
    with pytest.raises(DataError, match="has only parquet files that Spark has not committed, in _temporary"):
        opened(tmp_path)
    table(tmp_path / "part-0.parquet", {"image": [image_bytes()] * 2})
    assert [opened(tmp_path).key(n) for n in range(len(opened(tmp_path)))] == ["part-0.parquet:0", "part-0.parquet:1"]


@pytest.mark.parametrize(("pattern", "task"), [("", "reca"), ("", "i2t"), ("**/*.parquet", "reca")])
def test_folders_that_cannot_be_read_are_said(tmp_path, monkeypatch, caplog, pattern, task):
    """Their tables are missing."""
    columns = {"image": [image_bytes()], "conversations": [said("human", "Q", "gpt", "A")]}
    for name in ("a", "locked/b", ".cache/c"):
        table(tmp_path / f"{name}.parquet", columns)
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert len(opened(tmp_path / pattern, task)) == 1
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / pattern}: skipped 1 folders that cannot be read (the first: locked, Permission denied)"
    ]


def test_names_in_cells_start_from_image_root(tmp_path):
    fill(tmp_path / "photos", {"a.png": image_bytes()})
    source = opened(table(tmp_path / "t.parquet", {"image": ["a.png", "b.png"]}), image_root=str(tmp_path / "photos"))
    assert source[0].image == image_bytes()
    with pytest.raises(FileNotFoundError):
        source[1]


@pytest.mark.parametrize("start", ["iVBORw0KGgo", "/9j/", "data:image/png;base64,"])
def test_an_image_in_base64_is_not_quoted(tmp_path, start):
    """Its megabytes would be a line of the log, as the name of a missing file."""
    source = opened(table(tmp_path / "t.parquet", {"image": [start + "A" * 10_000]}))
    with pytest.raises(BadSample, match="neither a path nor a URL: store the bytes of its file .base64 is") as error:
        source[0]
    assert len(str(error.value)) < 200


def test_names_in_cells_stay_below_the_root(tmp_path):
    """As those of rows in JSON do."""
    fill(tmp_path, {"photos/a.png": image_bytes(), "b.png": image_bytes(), "photos-old/c.png": image_bytes()})
    inside = ["a.png", "x/../a.png", str(tmp_path / "photos/a.png")]
    inside += [f"file://{inside[-1]}", f"local://{inside[-1]}"]
    outside = ["../b.png", str(tmp_path / "b.png"), "../photos-old/c.png", "/etc/hostname", "."]
    outside += [f"file://{tmp_path}/b.png", f"local://{tmp_path}/photos/../b.png"]
    cells = [{"bytes": None, "path": name} for name in inside + outside]
    path = table(tmp_path / "photos/t.parquet", {"image": cells}, {"image": IMAGE})
    for root in (None, str(tmp_path / "photos")):
        source = opened(path, image_root=root)
        assert [source[n].image for n in range(len(inside))] == [image_bytes()] * len(inside)
        for n in range(len(inside), len(cells)):
            with pytest.raises(BadSample, match=r"is outside .*photos: set data.image_root"):
                source[n]
    assert opened(path, image_root="/")[len(inside) + 1].image == image_bytes()
    assert opened(path, image_root=f"file://{tmp_path}")[len(inside) + 1].image == image_bytes()


def test_an_address_in_a_cell_that_is_none_is_a_bad_sample(tmp_path):
    fill(tmp_path, {"photos/x": b"", "b.png": image_bytes()})
    cells = ["htp://host/a.png", f"simplecache::file://{tmp_path}/b.png"]
    source = opened(table(tmp_path / "photos/t.parquet", {"url": cells}))
    with pytest.raises(BadSample, match="htp://host/a.png cannot be opened: ValueError: Protocol not known: htp"):
        source[0]
    with pytest.raises(BadSample, match=r"'simplecache::file://.*b.png' is a chain of file systems"):
        source[1]


def test_cells_that_are_neither_bytes_nor_a_path(tmp_path):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.int64())])
    source = opened(table(tmp_path / "t.parquet", {"image": [{"bytes": None, "path": 7}]}, {"image": kind}))
    with pytest.raises(BadSample, match="neither bytes nor a path"):
        source[0]
    with pytest.raises(BadSample, match="neither bytes nor a path"):
        opened(table(tmp_path / "u.parquet", {"image": ["a\0.png"]}))[0]


def test_images_in_cells_have_the_limit_of_image_files(tmp_path, monkeypatch):
    size = len(image_bytes())
    path = table(tmp_path / "t.parquet", {"image": [image_bytes()]})
    for limit in (size, size - 1):
        monkeypatch.setattr(columns_module, "MAX_IMAGE_BYTES", limit)
        with pytest.raises(BadSample, match=f"{size} bytes; at most") if limit < size else nullcontext():
            assert opened(path)[0].image == image_bytes()


def test_a_column_that_is_not_there(tmp_path):
    path = midjourney(tmp_path / "t.parquet", 0, 1)
    with pytest.raises(
        DataError,
        match=r"data.columns.image=imagge: .*t.parquet has no such column; did you mean image\? Its columns are "
        r"id \(text\), image \(image\), width \(other\), prompt \(text\)",
    ):
        opened(path, image="imagge")
    with pytest.raises(DataError, match=r"data.columns.caption=width: this column of .* has type other"):
        opened(path, "t2i", caption="width")
    with pytest.raises(DataError, match=r"no column name is recognised as the images; name one in data.columns.image"):
        opened(table(tmp_path / "u.parquet", {"a": [1], "b": [image_bytes()]}))


TALK = said("human", "<image>\nQ", "gpt", "A")
MESSAGES = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


@pytest.mark.parametrize("cell", [TALK, json.dumps(TALK), MESSAGES])
def test_conversations(tmp_path, cell):
    path = table(tmp_path / "t.parquet", {"image": [image_bytes()], "conversations": [cell]})
    assert opened(path, "i2t")[0].text == [("Q", "A")]
    assert opened(tmp_path, "i2t")[0].text == [("Q", "A")]


@pytest.mark.parametrize("name", ["t.parquet", "saved"])
def test_the_system_column_begins_the_first_question(tmp_path, name):
    """As the "system" key of a JSON row does."""
    columns = {
        "image": [image_bytes()] * 4,
        "conversations": [json.dumps(TALK)] * 3 + [json.dumps([*said("system", "Be kind."), *TALK])],
        "system": ["Be terse.", None, "", "Be terse."],
    }
    table(tmp_path / "t.parquet", columns)
    if name == "saved":
        pytest.importorskip("datasets").Dataset.from_dict(columns).save_to_disk(tmp_path / name)
    source = opened(tmp_path / name, "i2t")
    assert [source[i].text for i in range(3)] == [[("Be terse.\nQ", "A")], [("Q", "A")], [("Q", "A")]]
    with pytest.raises(BadSample, match='both "system" and a system turn, which differ'):
        source[3]
    assert opened(tmp_path / name)[0].text is None


def test_a_system_column_of_some_files_only(tmp_path):
    columns = {"image": [image_bytes()], "conversations": [json.dumps(TALK)]}
    table(tmp_path / "0.parquet", columns)
    table(tmp_path / "1.parquet", columns | {"system": ["Be terse."]})
    with pytest.raises(DataError, match=r"image, conversations, system, .*0.parquet image, conversations: name"):
        opened(tmp_path, "i2t")
    assert len(opened(tmp_path)) == 2


@pytest.mark.parametrize("task", ["reca", "i2t"])
def test_a_folder_is_listed_alike_for_every_task(tmp_path, task):
    table(tmp_path / "real" / "T.PARQUET", {"image": [image_bytes()], "conversations": [TALK]})
    fill(tmp_path / "folder", {"._T.parquet": b"junk", ".cache/T.parquet": b"junk"})
    (tmp_path / "folder" / "linked").symlink_to(tmp_path / "real")
    source = opened(tmp_path / "folder", task)
    assert len(source) == 1 and source[0].image == image_bytes()


def test_rows_that_are_no_samples(tmp_path):
    path = table(
        tmp_path / "t.parquet",
        {
            "image": [None, {"bytes": image_bytes(), "path": None}, {"bytes": image_bytes(), "path": None}],
            "conversations": ["[]", "junk", json.dumps(said("gpt", "A", "human", "Q"))],
            "caption": ["a", None, "  "],
        },
        {"image": IMAGE},
    )
    talk, captions = opened(path, "i2t"), opened(path, "t2i")
    for source in (talk, captions):
        with pytest.raises(LeftOut, match="without an image"):
            source[0]
    with pytest.raises(BadSample, match="the conversation is not JSON"):
        talk[1]
    with pytest.raises(BadSample, match="the turns have turns that do not alternate"):
        talk[2]
    with pytest.raises(BadSample, match="the caption is missing or not text"):
        captions[1]
    with pytest.raises(BadSample, match="the caption is empty"):
        captions[2]


@pytest.mark.parametrize("nothing", [None, {"bytes": None, "path": None}])
def test_row_groups_without_an_image_are_no_samples(tmp_path, nothing):
    """As of conversations that are text only. For each of their rows a substitute's row group was read."""
    talk = said("human", "Q", "gpt", "A")
    images = [{"bytes": image_bytes((n, 0, 0)), "path": None} for n in range(5)]
    columns = {"image": [*images[:3], nothing, *[nothing] * 4, *images[3:], nothing], "conversations": [talk] * 11}
    source = opened(table(tmp_path / "t.parquet", columns, {"image": IMAGE}, rows=4), "i2t")
    assert [source.key(n) for n in range(len(source))] == [f"t.parquet:{n}" for n in (0, 1, 2, 3, 8, 9, 10)]
    assert source[4].image == images[3]["bytes"] and source.indices_of({"t.parquet:5", "t.parquet:8"}) == [4]
    assert source.skipped.counts == {"row groups without an image": 1}
    assert source.skipped.first == {"row groups without an image": "t.parquet:4"}
    files = zip(source.names, source.footers, strict=True)
    assert source.identity() != digest([tuple(source.columns), *files])  # of versions in which they were samples
    with pytest.raises(DataError, match="have no images: skipped 1 row groups without an image"):
        opened(table(tmp_path / "u.parquet", {"image": [nothing], "conversations": [talk]}, {"image": IMAGE}), "i2t")


@pytest.mark.parametrize("nothing", [None, {"bytes": None, "path": None}, []])
@pytest.mark.parametrize("name", ["a", "z"])
def test_a_file_without_images_has_no_type_for_them(tmp_path, nothing, name):
    """Pandas derives the types of a shard from its values, so those of nulls are null, before and after other files."""
    image = {"bytes": image_bytes(), "path": None}
    table(tmp_path / "m.parquet", {"image": [image] * 2, "text": ["a", "b"], "url": [None] * 2})
    table(tmp_path / f"{name}.parquet", {"image": [nothing] * 3, "text": ["c"] * 3})
    source = opened(tmp_path, "t2i")
    assert [source.key(n) for n in range(len(source))] == ["m.parquet:0", "m.parquet:1"]
    assert source[1].text == "b" and source.skipped.counts == {"row groups without an image": 1}


def test_paths_beside_bytes_without_a_type(tmp_path):
    fill(tmp_path, {"one.png": image_bytes()})
    source = opened(table(tmp_path / "t.parquet", {"picture": [{"bytes": None, "path": "one.png"}]}))
    assert source[0].image == image_bytes()


def test_tables_with_few_images_say_that_rows_have_none(tmp_path):
    columns = {"image": [None] * 199 + [{"bytes": image_bytes(), "path": None}]}
    path = table(tmp_path / "t.parquet", columns, {"image": IMAGE}, rows=200)
    stream = open_loader(DataConfig(images=str(path), workers=0), "reca", Views(View(8), None), seed=0, micro_batch=200)
    with pytest.raises(DataError, match=r"the last is t.parquet:\d+ \(a row without an image: leave such rows out"):
        next(iter(stream))


CAPTIONS = ("a cat", "the cat", "cats")


@pytest.mark.parametrize(
    "cell",
    [
        json.dumps(dict(enumerate(CAPTIONS))),  # as in the files of BAGEL's release
        json.dumps({"long": CAPTIONS[0], "none": None, "empty": "", "tags": CAPTIONS[1], "short": CAPTIONS[2]}),
        json.dumps(CAPTIONS),
        [*CAPTIONS, None],
    ],
)
def test_one_of_several_captions_is_drawn(tmp_path, cell):
    path = table(tmp_path / "t.parquet", {"image": [image_bytes()] * 20, "captions": [cell] * 20})
    assert opened(path, "t2i")[7].text == CAPTIONS

    def drawn(size, steps):
        config = DataConfig(captions=str(path), decoder="pillow", workers=0)
        stream = open_loader(config, "t2i", VIEWS, seed=0, micro_batch=size)
        return [text for batch in itertools.islice(stream, steps) for text in batch.text]

    found = drawn(10, 6)
    assert set(found) == set(CAPTIONS) and found[:20] != found[20:40]
    assert drawn(4, 15) == found
    assert sorted(audit(opened(path, "t2i")).captions) == [1] * 20 + [2] * 40


@pytest.mark.skipif(not hasattr(pa, "json_"), reason="this pyarrow has no type of JSON")
def test_columns_of_json(tmp_path):
    """`datasets` stores values of several types so, such as turns whose content is a text or a list of parts."""
    talk = [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, {"role": "assistant", "content": "A"}]
    cells = {"messages": [json.dumps(talk)] * 3, "caption": ['"a cat"', '{"0": "a", "1": "b"}', "{"]}
    columns = {name: pa.array(values).cast(pa.json_()) for name, values in cells.items()}
    pq.write_table(pa.table({"image": [image_bytes()] * 3, **columns}), tmp_path / "t.parquet")
    assert opened(tmp_path, "i2t")[0].text == [("Q", "A")]
    captions = opened(tmp_path, "t2i")
    assert captions[0].text == "a cat" and captions[1].text == ("a", "b")
    with pytest.raises(BadSample, match="the column caption is not JSON"):
        captions[2]


def test_a_file_without_rows_needs_no_types(tmp_path):
    table(tmp_path / "a.parquet", {"image": [], "caption": []})
    table(tmp_path / "b.parquet", {"image": [image_bytes()], "caption": ["a cat"]})
    assert opened(tmp_path, "t2i")[0].text == "a cat"


@pytest.mark.parametrize("cell", ["{}", "[1girl, solo]", '{"text": {"en": "a"}}', '["", null]', '{"a": 1}', "{" * 9999])
def test_captions_that_only_look_like_json(tmp_path, cell):
    assert opened(table(tmp_path / "t.parquet", {"image": [b"x"], "caption": [cell]}), "t2i")[0].text == cell


def test_a_list_without_captions_is_a_bad_sample(tmp_path):
    cells = [[], [""], [None], [" ", "a"]]
    source = opened(table(tmp_path / "t.parquet", {"image": [b"x"] * 4, "caption": cells}), "t2i")
    for number in range(4):
        with pytest.raises(BadSample, match="the caption is (missing or not text|empty)"):
            source[number]


VIEWS = Views(gen=View(4), und=None)


def reds(path, count, **options):
    """The red level of the samples of a stream, which tells them apart; the stream."""
    config = DataConfig(images=str(path), decoder="pillow", max_bad_fraction=0.5, **{"workers": 0} | options)
    stream = open_loader(config, "reca", VIEWS, seed=0, micro_batch=2)
    found = [int(view[0, 0, 0]) for batch in itertools.islice(stream, count // 2) for view in batch.gen]
    stream.close()
    return found, stream


def test_every_epoch_holds_every_row_and_windows_few_groups(tmp_path, monkeypatch):
    midjourney(tmp_path / "a.parquet", 0, 30)
    midjourney(tmp_path / "b.parquet", 30, 30)
    source = opened(tmp_path)
    monkeypatch.setattr(order, "WINDOW", 3 * max(block.bytes for block in source.blocks))
    (found, _), (threads, _) = reds(tmp_path, 120), reds(tmp_path, 120, workers=3)
    assert found == threads
    assert sorted(found[:60]) == sorted(found[60:]) == list(range(60)) and found[:60] != found[60:]
    groups = [red // 30 * 8 + red % 30 // 4 for red in found[:60]]
    for start in range(0, 60 - 8, 8):  # 60 rows of at most 4 a group in windows of 3 groups or a little more
        assert len(set(groups[start : start + 8])) <= 8
    assert all(len({*groups[i : i + 6]}) <= 8 for i in range(54))
    first = groups[:8]
    assert set(first) & set(groups[24:]) == set()  # a window that is done does not come again in its epoch


def test_row_groups_of_a_column_whose_name_has_a_dot_have_a_size(tmp_path):
    """Without one a window held all groups, and every group that was read stayed in memory."""
    images = [image_bytes((n, 0, 0)) for n in range(8)]
    plain = opened(table(tmp_path / "a.parquet", {"jpg": images}))
    dotted = opened(table(tmp_path / "b.parquet", {"image.jpg": images, "image": ["x"] * 8}), image="image.jpg")
    assert dotted.blocks == plain.blocks and dotted[5].image == images[5]


def test_a_row_group_is_read_once_while_it_is_used(tmp_path, monkeypatch):
    midjourney(tmp_path / "a.parquet", 0, 40)
    loads, load = [], parquet.Parquet._load
    monkeypatch.setattr(parquet.Parquet, "_load", lambda self, number: loads.append(number) or load(self, number))
    reds(tmp_path, 40, workers=3)
    assert sorted(set(loads)) == list(range(10)) and len(loads) == 10


def test_no_row_group_is_decoded_in_one_piece(tmp_path, monkeypatch):
    """Of a nested column pyarrow decodes less than 2 GiB in one piece, and pandas writes groups of a million rows."""
    monkeypatch.setattr(parquet, "DECODED", 4)
    source = opened(midjourney(tmp_path / "a.parquet", 0, 10, rows=10), "t2i", caption="llava")
    assert [source[n].text for n in range(10)] == [f"an image of {n}" for n in range(10)]
    assert [len(piece) for piece in source.tables(0).column("image").chunks] == [4, 4, 2]


def test_large_row_groups_are_warned_of(tmp_path, monkeypatch, caplog):
    path = table(tmp_path / "t.parquet", {"image": [image_bytes()] * 6}, rows=3)
    size = max(group.bytes for group in opened(path).groups)
    for largest, warned in ((size, False), (size - 1, True)):
        monkeypatch.setattr(parquet, "LARGE", largest)
        opened(path)
        assert ("reading a row reads its whole group" in caplog.text) == warned


def test_bytes_that_are_damaged_are_bad_samples(tmp_path):
    path = midjourney(tmp_path / "a.parquet", 0, 20)
    whole = pq.read_metadata(path)
    place = whole.row_group(2).column(1).data_page_offset
    with path.open("r+b") as file:
        file.seek(whole.row_group(2).column(1).dictionary_page_offset or place)
        file.write(b"\xff" * 64)
    found, stream = reds(path, 40)
    assert set(found) == set(range(20)) - {8, 9, 10, 11}
    assert sorted(stream.bad_samples.bad) == sorted(f"a.parquet:{n}" for n in range(8, 12))
    assert all("row group 2 cannot be read" in reason for reason in stream.bad_samples.bad.values())


def test_a_damaged_footer_is_told(tmp_path, monkeypatch):
    """It has no checksum. Bytes that are changed at random have given these."""
    path = midjourney(tmp_path / "a.parquet", 0, 8)

    def fail():
        raise pa.ArrowNotImplementedError("Integers with more than 64 bits not implemented")

    damaged = SimpleNamespace(num_rows=8, schema=SimpleNamespace(to_arrow_schema=fail))
    with monkeypatch.context() as patch:
        patch.setattr(parquet, "read_footer", lambda path: (damaged, ""))
        with pytest.raises(DataError, match=r"a.parquet has a schema that pyarrow cannot read: Integers with more"):
            opened(path)
    whole = pq.read_metadata(path)
    damaged = SimpleNamespace(
        num_rows=8, schema=whole.schema, num_columns=whole.num_columns, num_row_groups=1,
        row_group=lambda number: SimpleNamespace(num_rows=-4),
    )  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(parquet, "read_footer", lambda path: (damaged, ""))
        with pytest.raises(DataError, match=r"a.parquet is damaged: row group 0 has -4 rows; fetch it again"):
            opened(path)
    source = opened(path)
    source.groups[1] = source.groups[1]._replace(rows=5)
    assert source[0].key == "a.parquet:0"
    with pytest.raises(BadSample, match="row group 1 has 4 rows, not 5 as the footer says"):
        source[4]


def test_a_damaged_dictionary_costs_its_rows():
    texts = pa.DictionaryArray.from_arrays(pa.array([0, 5]), pa.array(["a cat"]), safe=False)
    column = pa.chunked_array([texts])
    assert columns_module.cell_of(column, 0, "caption") == "a cat"
    with pytest.raises(BadSample, match="the column caption is damaged: .*out.of.bounds"):
        columns_module.cell_of(column, 1, "caption")


def test_an_image_that_is_none_is_a_bad_sample_with_its_row(tmp_path):
    images = [image_bytes((n, 0, 0)) for n in range(6)] + [b"junk", None]
    found, stream = reds(table(tmp_path / "a.parquet", {"image": images}, {"image": pa.binary()}), 16)
    assert set(found) == set(range(6))
    assert stream.bad_samples.bad == {"a.parquet:6": stream.bad_samples.bad["a.parquet:6"]}  # no image is no fault


def test_files_that_are_not_whole(tmp_path):
    path = midjourney(tmp_path / "a.parquet", 0, 8)
    data = path.read_bytes()
    for name, content, words in (
        ("cut.parquet", data[: len(data) // 2], "is cut off: it has no footer"),
        ("page.parquet", b"<html>", "is a web page"),
        ("empty.parquet", b"", "is empty"),
        ("none.parquet", b"text", "is not a parquet file"),
        ("junk.parquet", b"PAR1" + bytes(20) + b"\x08\0\0\0PAR1", "is not a readable parquet file"),
    ):
        with pytest.raises(DataError, match=f"{name} {words}"):
            opened(fill(tmp_path, {name: content}) / name)
    empty = table(tmp_path / "empty" / "none.parquet", {"image": pa.array([], pa.binary())})
    with pytest.raises(DataError, match="have no rows"):
        opened(empty)


def test_a_file_written_again_is_not_read_for_the_old_one(tmp_path):
    source = opened(midjourney(tmp_path / "a.parquet", 0, 8))
    midjourney(tmp_path / "a.parquet", 100, 12)
    with pytest.raises(BadSample, match=r"a\.parquet has other rows than when the run began"):
        source[0]


def test_the_splits_of_a_folder_are_not_mixed(tmp_path):
    for split in ("train", "test"):
        midjourney(tmp_path / f"{split}-00000-of-00001.parquet", 0, 2)
    with pytest.raises(DataError, match="has parquet files of the splits test and train: name those of one"):
        opened(tmp_path)
    assert len(opened(tmp_path / "train-*.parquet")) == 2
    with pytest.raises(DataError, match=r"\*\*/\*.parquet has parquet files of the splits test and train") as caught:
        opened(tmp_path / "**" / "*.parquet")
    assert str(caught.value).endswith(f"such as '{tmp_path}/train-*.parquet'")


@pytest.mark.parametrize("name", ["{}/0.parquet", "split={}/0.parquet", "{}/part-1/0.parquet"])
def test_the_splits_of_folders_are_not_mixed(tmp_path, name):
    for split in ("train", "validation"):
        midjourney(tmp_path / "data" / name.format(split), 0, 2)
    with pytest.raises(DataError, match="of the splits train and validation: name those of one, such as") as caught:
        opened(tmp_path / "data")
    example = tmp_path / "data" / name.format("validation")
    assert str(caught.value).endswith(str(example.parent)) and len(opened(example.parent)) == 2
    with pytest.raises(DataError, match="of the splits train and validation"):
        opened(tmp_path / "**" / "*.parquet")
    assert len(opened(tmp_path / "data" / name.format("validation").replace("0.parquet", "*.parquet"))) == 2


def test_columns_of_one_name_and_cells_of_two_images(tmp_path):
    cells = [[{"bytes": image_bytes(), "path": None}] * number for number in (2, 0)]
    source = opened(table(tmp_path / "a.parquet", {"images": cells}, {"images": pa.list_(IMAGE)}))
    with pytest.raises(BadSample, match="has 2 images in this row; expected one"):
        source[0]
    with pytest.raises(LeftOut, match="without an image"):
        source[1]
    images = pa.array([image_bytes()])
    pq.write_table(pa.Table.from_arrays([images, images], ["image", "image"]), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="b.parquet has 2 columns named 'image': rename one of them"):
        opened(tmp_path / "b.parquet")


def test_identity_is_of_contents_and_not_of_the_place(tmp_path):
    one, two = (opened(midjourney(tmp_path / name / "a.parquet", 0, 4)).identity() for name in ("here", "there"))
    other = opened(midjourney(tmp_path / "here" / "a.parquet", 1, 4)).identity()
    captions = opened(tmp_path / "there", "t2i", caption="llava").identity()
    assert len({one, other, captions}) == 3 and one == two and len(one) == 64


def test_patterns_in_recipes_are_made_absolute(tmp_path, monkeypatch):
    (tmp_path / "a[1]").mkdir()
    monkeypatch.chdir(tmp_path / "a[1]")
    midjourney(tmp_path / "a[1]" / "x.parquet", 0, 2)
    recipe = load_recipe("show_o_512", ["data.images=*.parquet", "data.columns.image=image"])
    assert len(opened(absolute_paths(recipe).data.images)) == 2


def test_recently_used_values_are_bounded_and_loaded_once():
    loads, gate = [], threading.Event()

    def load(key):
        gate.wait(10)
        loads.append(key)
        if key == 9:
            raise ValueError("nine")
        return key * 10

    kept = RecentlyUsed(load, lambda key: 4, budget=10)
    found = []
    threads = [threading.Thread(target=lambda: found.append(kept(1))) for _ in range(4)]
    for thread in threads:
        thread.start()
    gate.set()
    for thread in threads:
        thread.join()
    assert found == [10] * 4 and loads == [1]
    assert [kept(key) for key in (2, 1, 3, 1, 2)] == [20, 10, 30, 10, 20]
    assert loads == [1, 2, 3, 2] and kept.bytes == 8
    for _ in range(2):
        with pytest.raises(ValueError, match="nine"):
            kept(9)
    assert loads[-2:] == [9, 9] and kept.bytes <= 8


def test_two_values_are_kept_whatever_their_size():
    loads = []
    kept = RecentlyUsed(lambda key: loads.append(key) or key, lambda key: 5, budget=4)
    for key in (1, 2, 1, 2, 3, 2, 3, 1):
        assert kept(key) == key
    assert loads == [1, 2, 3, 1] and kept.bytes == 10
    exact = RecentlyUsed(lambda key: loads.append(key) or key, lambda key: 5, budget=15)
    for key in (4, 5, 6, 4, 5, 6):
        exact(key)
    assert loads[4:] == [4, 5, 6]


def test_a_load_that_fails_once_its_value_is_no_longer_kept():
    """It takes neither the place nor the bytes of a later load of the same key."""
    gates = {number: threading.Event() for number in (1, 2)}
    loads = []

    def load(key):
        if key == 0:
            loads.append(key)
            started.release()
            gates[number := len(loads)].wait(10)
            if number == 1:
                raise ValueError("first")
        return key

    started, found = threading.Semaphore(0), []
    kept = RecentlyUsed(load, lambda key: 5, budget=4)

    def ask():
        try:
            found.append(kept(0))
        except ValueError as error:
            found.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    threads[0].start()
    started.acquire()
    kept(1), kept(2)  # the first load of 0 is given up
    threads[1].start()
    started.acquire()
    gates[1].set()
    threads[0].join()
    assert found == ["first"] and list(kept.kept) == [2, 0] and kept.bytes == 10
    gates[2].set()
    threads[1].join()
    assert found == ["first", 0] and kept(0) == 0 and loads == [0, 0]
