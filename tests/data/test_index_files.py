"""Large conversation files and tars: read in pieces, indexed once, and never by an index that is not theirs."""

import contextlib
import errno
import json
import multiprocessing
import os
import shutil

import pytest

from reca.data.bad_samples import _count_keys
from reca.data.errors import DataError
from reca.data.sample import digest
from reca.data.sources import index_files, json_rows, json_stream, records, tar_index, tars
from reca.data.sources.factory import open_source
from reca.data.sources.json_stream import read_items
from reca.data.sources.mixture import indices_of
from tests.data.files import conversations, fill, image_bytes, row, tar


@pytest.fixture(autouse=True)
def every_file_is_large(tmp_path, monkeypatch):
    monkeypatch.setenv("RECA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(index_files, "LARGE", 0)
    monkeypatch.setattr(index_files, "SETTLED", 0.0)


def kept(tmp_path):
    return sorted(p.name for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.suffix != ".lock")


# ---- JSON in pieces ----

ITEMS = [{"a": ["ä", "😀\\u", '"', {}], "b": 1.5}, 12, -3e7, "x\ny", None, True, [], [[1], {"c": "]"}], {"d": "\t,"}]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 50, 10**6])
def test_lists_are_read_in_pieces_of_any_size(tmp_path, monkeypatch, encoding, indent, chunk):
    monkeypatch.setattr(json_stream, "CHUNK", chunk)
    path = tmp_path / "a.json"
    path.write_bytes(("\r\n " + json.dumps(ITEMS, indent=indent, ensure_ascii=False) + "\n ").encode(encoding))
    assert list(read_items(path, lines=False)) == ITEMS
    rows = [item for item in ITEMS if not isinstance(item, list)]
    path.write_bytes("\r\n".join(map(json.dumps, rows)).encode(encoding))
    assert list(read_items(path, lines=True)) == rows


def test_a_line_that_is_a_list_is_named_with_blank_lines_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n[{"a": 2}]\n')
    with pytest.raises(ValueError, match="line 3 is a list"):
        list(read_items(path, lines=True))


def test_an_item_without_an_end_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(json_stream, "CHUNK", 8)
    monkeypatch.setattr(json_stream, "LONGEST", 64)
    (tmp_path / "a.json").write_text('[{"a": 1}, "' + "x" * 1000)
    items = read_items(tmp_path / "a.json", lines=False)
    assert next(items) == {"a": 1}
    with pytest.raises(ValueError, match="an item of more than 64 characters, at character 11"):
        next(items)


@pytest.mark.parametrize("chunk", [1, 5, 10**6])
@pytest.mark.parametrize("text", ["[]", " [ ] ", "[1]", "[1, 2]", '["é"]', "[{}, {}]"])
def test_short_lists(tmp_path, monkeypatch, text, chunk):
    monkeypatch.setattr(json_stream, "CHUNK", chunk)
    (tmp_path / "a.json").write_text(text)
    assert list(read_items(tmp_path / "a.json", lines=False)) == json.loads(text)


@pytest.mark.parametrize("chunk", [1, 4, 10**6])
@pytest.mark.parametrize(
    "text", ["", " ", "[", "[1", "[1,", "[1,]", "[1 2]", "[1] 2", "[1]]", "[{]", '["a]', "[1,,2]", "[nul]", "[01]", "]"]
)
def test_what_is_not_json_is_refused_as_json_does(tmp_path, monkeypatch, text, chunk):
    monkeypatch.setattr(json_stream, "CHUNK", chunk)
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match="at character"):
        list(read_items(tmp_path / "a.json", lines=False))
    with pytest.raises(ValueError):
        json.loads(text)


@pytest.mark.parametrize("text", ["{}", "7", '"a"', "null"])
def test_json_that_is_no_list(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(TypeError, match="a JSON "):
        list(read_items(tmp_path / "a.json", lines=False))
    with pytest.raises(DataError, match=r"a.json is .*not LLaVA-style: expected a list of \{"):
        open_source(str(tmp_path / "a.json"), "i2t")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"[\xff]", "the text is not UTF-8"),
        ("[1]".encode("utf-16-le"), "the text contains NUL characters"),
        (b"<html>", "is a web page"),
        (
            b'{"image": "a"}\n{"image": "b"}',
            "is not JSON: Extra data, .*rename it to .jsonl if it has one row per line",
        ),
        (b'[{"image": "a.png"}', "is not JSON: Expecting ',' delimiter, at character 19"),
    ],
)
def test_large_files_that_are_wrong(tmp_path, data, words):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(DataError, match=words):
        open_source(str(tmp_path / "a.json"), "i2t")
    assert kept(tmp_path) == []


# ---- the index of conversations ----

ROWS = [
    row("human", "<image>\nQ", "gpt", "Ä", image="a.png"),
    {"id": "text alone"},
    row("human", "R", "gpt", "B", "human", "S", "gpt", "C", image="b.png"),
    row("gpt", "A"),
    row("human", "T", "gpt", "D\n\0"[:-1], image="a.png"),
]


def contents(source):
    return [(source.key(i), source.size(i), *source[i]) for i in range(len(source))], source.skipped.counts


def test_a_large_file_is_what_a_small_one_is(tmp_path, monkeypatch):
    path = conversations(tmp_path, *ROWS)
    indexed = open_source(str(path), "i2t")
    assert len(kept(tmp_path)) == 1
    monkeypatch.setattr(json_rows, "stream_rows", None)  # nothing is parsed again
    again = open_source(str(path), "i2t")
    monkeypatch.setattr(index_files, "LARGE", 10**9)
    small = open_source(str(path), "i2t")
    assert contents(indexed) == contents(again) == contents(small)
    assert indexed.identity() == again.identity() == small.identity()
    assert again.skipped.first == small.skipped.first and len(small) == 3
    assert indexed.images == again.images == small.images == _count_keys(small) == 2


SCORED = [
    {"image": "a.png", "caption": " Ä \u2028", "boxes": [{"box": [0, 1, 2.5, 3], "score": 0.1}], "score": 0.3},
    {"caption": "no image"},
    {"image": "b/ü.png", "caption": "x", "boxes": [], "background": -0.7, "target": "a.png"},
]


def test_a_large_file_of_scored_images_is_what_a_small_one_is(tmp_path, monkeypatch):
    """Held in memory, rows took some 3.7 kB each, in every process."""
    fill(tmp_path, {"a.png": image_bytes(), "b/ü.png": image_bytes((1, 2, 3))})
    path = tmp_path / "scored.json"
    path.write_text(json.dumps(SCORED))
    indexed = open_source(str(path), "srum")
    assert [name.rpartition(".")[2] for name in kept(tmp_path)] == ["scored"]
    monkeypatch.setattr(json_rows, "stream_rows", None)  # nothing is parsed again
    again = open_source(str(path), "srum")
    monkeypatch.setattr(index_files, "LARGE", 10**9)
    small = open_source(str(path), "srum")
    assert contents(indexed) == contents(again) == contents(small) and indexed.key(1) == "b/ü.png#3"
    rows = (
        ("a.png", "Ä", (((0.0, 1.0, 2.5, 3.0), 0.065),), 0.0, None, 1),
        ("b/ü.png", "x", (), -0.7, "a.png", 3),
    )
    sizes = indexed.size(0), indexed.size(1)
    assert {s.identity() for s in (indexed, again, small)} == {digest(zip(rows, sizes, strict=True))}
    assert indices_of(again, {"b/ü.png#3", "a.png#2", "a.png"}) == [1]


def test_an_index_is_not_used_once_the_file_or_its_root_is_another(tmp_path):
    path = conversations(tmp_path, *ROWS)
    assert open_source(str(path), "i2t")[0].text[0].answer == "Ä"
    stamp = os.stat(path)
    path.write_text(path.read_text().replace("\\u00c4", "\\u00d6"))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # of the same size, and made to look as old
    assert open_source(str(path), "i2t")[0].text[0].answer == "Ö"
    other = conversations(tmp_path / "other", *ROWS)
    assert open_source(str(other), "i2t")[0].text[0].answer == "Ä"
    open_source(str(path), "i2t", str(tmp_path / "other"))
    assert len(kept(tmp_path)) == 3


@pytest.mark.parametrize(
    "harm",
    [lambda data, place=place: data[:place] for place in (0, 40, -100, -1)]
    + [lambda data, place=place: data[:place] + b"?" + data[place:][1:] for place in (-300, -100, -40, -12)],
)
def test_a_damaged_index_is_made_again(tmp_path, harm):
    path = conversations(tmp_path, *ROWS)
    expected = contents(open_source(str(path), "i2t"))
    (index,) = (tmp_path / "cache" / "index").glob("*.rows")
    whole = index.read_bytes()
    index.write_bytes(harm(whole))
    assert contents(open_source(str(path), "i2t")) == expected
    assert len(index.read_bytes()) == len(whole)


def test_a_damaged_offset_is_found(tmp_path):
    path = conversations(tmp_path, *ROWS)
    expected = contents(open_source(str(path), "i2t"))
    (index,) = (tmp_path / "cache" / "index").glob("*.rows")
    whole = index.read_bytes()
    place = whole.index(b'{"stamp"') - 16  # that of the row before the last
    index.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    assert contents(open_source(str(path), "i2t")) == expected and index.read_bytes() == whole


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_costs_the_index_alone(tmp_path, monkeypatch, number):
    path = conversations(tmp_path, *ROWS)
    expected = contents(open_source(str(path), "i2t"))
    shutil.rmtree(tmp_path / "cache")

    def full(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(records, "_finish", full)
    if number == errno.EIO:
        with pytest.raises(DataError, match=r"rows\.json cannot be read: Input/output error"):
            open_source(str(path), "i2t")
    else:
        assert contents(open_source(str(path), "i2t")) == expected
    assert kept(tmp_path) == []


def test_a_file_that_changes_while_it_is_read_leaves_no_index(tmp_path, monkeypatch):
    path = conversations(tmp_path, *ROWS)
    stream = json_rows.stream_rows

    def changing(path, form):
        yield from stream(path, form)
        os.utime(path, ns=(1, 1))

    monkeypatch.setattr(json_rows, "stream_rows", changing)
    assert len(open_source(str(path), "i2t")) == 3 and kept(tmp_path) == []


def test_a_folder_that_cannot_be_written_to_costs_the_index_alone(tmp_path, caplog):
    (tmp_path / "cache").write_bytes(b"")
    path = conversations(tmp_path, *ROWS)
    assert len(open_source(str(path), "i2t")) == 3
    assert "cannot be saved in" in caplog.text and "Set RECA_CACHE" in caplog.text
    assert len(open_source(str(tar(tmp_path / "a.tar", ("a.png", image_bytes()))), "reca")) == 1


def open_as(path, start, tally):
    stream = json_rows.stream_rows

    def counted(path, form):
        with tally.get_lock():
            tally.value += 1
        yield from stream(path, form)

    json_rows.stream_rows = counted
    start.wait()
    source = open_source(str(path), "i2t")
    os._exit(0 if len(source) == 3 and source[2].text[0].answer == "D" else 1)


def test_ranks_that_start_together_make_one_index(tmp_path):
    context = multiprocessing.get_context("fork")
    path, start, tally = conversations(tmp_path, *ROWS), context.Barrier(4), context.Value("i", 0)
    ranks = [context.Process(target=open_as, args=(path, start, tally)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0] * 4 and tally.value == 1 and len(kept(tmp_path)) == 1


# ---- the index of tars ----


def test_a_tar_is_scanned_once(tmp_path, monkeypatch):
    path = tar(
        tmp_path / "a.tar",
        ("a.png", image_bytes()),
        ("a.txt", b"x"),
        (".b.png", image_bytes()),
        ("c.png", (b"2", "a.png")),
    )
    monkeypatch.setattr(index_files, "LARGE", 10**9)
    expected = open_source(str(path), "reca")
    monkeypatch.setattr(index_files, "LARGE", 0)
    first = open_source(str(path), "reca")
    assert {name.rpartition(".")[2] for name in kept(tmp_path)} == {"tar", "samples"}
    monkeypatch.setattr(tar_index, "read_index", None)
    again = open_source(str(path), "reca")
    for source in (first, again):
        assert contents(source) == contents(expected) and source.identity() == expected.identity()
        assert source.skipped.first == expected.skipped.first and source.skipped.counts


def test_a_tar_that_is_another_is_scanned_again(tmp_path):
    path = tar(tmp_path / "a.tar", ("a.png", image_bytes()))
    assert open_source(str(path), "reca").key(0) == "a.tar/a.png"
    stamp = os.stat(path)
    tar(path, ("b.png", image_bytes()))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert open_source(str(path), "reca").key(0) == "a.tar/b.png"


def test_the_samples_of_tars_are_grouped_once(tmp_path, monkeypatch):
    """Those of one task, as only some tasks need captions."""
    for name in "ab":
        tar(tmp_path / f"{name}.tar", (f"{name}.png", image_bytes()), (f"{name}.txt", name.encode()))
    grouped, group = [], tars._samples
    monkeypatch.setattr(tars, "_samples", lambda path: grouped.append(path.name) or group(path))
    for _ in range(2):
        sources = [open_source(f"{tmp_path}/*.tar", task) for task in ("reca", "t2i")]
        assert [[source[i].text for i in range(2)] for source in sources] == [[None, None], ["a", "b"]]
    assert grouped == ["a.tar", "b.tar"] * 2
    tar(tmp_path / "b.tar", ("c.png", image_bytes()))  # one of them changes
    assert open_source(f"{tmp_path}/*.tar", "reca").key(1) == "b.tar/c.png"
    tar(tmp_path / "c.tar", ("d.png", image_bytes()))  # one more
    assert len(open_source(f"{tmp_path}/*.tar", "reca")) == 3


def test_many_small_tars_have_an_index_as_one_large_tar(tmp_path, monkeypatch):
    for name in "ab":
        tar(tmp_path / f"{name}.tar", (f"{name}.png", image_bytes()))
    monkeypatch.setattr(index_files, "LARGE", 2 * (tmp_path / "a.tar").stat().st_size)
    open_source(f"{tmp_path}/a.tar", "reca")
    assert kept(tmp_path) == []
    open_source(f"{tmp_path}/*.tar", "reca")
    assert len(kept(tmp_path)) == 1


@pytest.mark.parametrize(
    ("kind", "harm"),
    [(kind, harm) for kind in ("tar", "samples") for harm in (lambda data: data[:-5], lambda data: b"")]
    + [("tar", lambda data: b"0" + data[1:]), ("samples", lambda data: data[:-5] + b"?" + data[-4:])],
)
def test_a_damaged_tar_index_is_made_again(tmp_path, kind, harm):
    path = tar(tmp_path / "a.tar", ("a.png", image_bytes()))
    open_source(str(path), "reca")
    (index,) = (tmp_path / "cache" / "index").glob(f"*.{kind}")
    damaged = harm(index.read_bytes())
    shutil.rmtree(index.parent)
    index.parent.mkdir()
    index.write_bytes(damaged)
    assert open_source(str(path), "reca")[0].image == image_bytes()


def test_a_tar_that_is_not_whole_has_no_index(tmp_path):
    path = tar(tmp_path / "a.tar", ("a.png", image_bytes()))
    os.truncate(path, 1024)
    for _ in range(2):
        with contextlib.suppress(DataError):
            open_source(str(path), "reca")
    assert kept(tmp_path) == []


@pytest.mark.parametrize("name", ["RECA_CACHE", "XDG_CACHE_HOME"])
def test_a_tilde_is_the_home_of_the_user(name, tmp_path, monkeypatch):
    """No shell expands a variable of `docker --env-file` or of a job's environment: a folder named ~ was made here."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RECA_CACHE")
    monkeypatch.setenv(name, "~/here")
    assert tmp_path / "here" in index_files.cache_folder().parents
