"""Rows of LLaVA-style files: roles, forms that are refused, and what is said of them."""

import gzip
import io
import json

import pytest

from reca.data.errors import DataError
from reca.data.sources import index_files, json_stream
from reca.data.sources.factory import open_source
from tests.data.files import conversations, fill, image_bytes, row

GOOD = row("human", "Q", "gpt", "A")


def said(text):
    return {"type": "text", "text": text}


def opened(tmp_path, *rows, image_root=None):
    return open_source(str(conversations(tmp_path, *rows)), "i2t", image_root and str(image_root))


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        (("human", "<image>\nQ", "gpt", "A"), [("Q", "A")]),
        (("human", "Q\n<image>", "gpt", " A "), [("Q", "A")]),
        (("user", "Q", "assistant", "A", "Human", "R", "GPT", "B"), [("Q", "A"), ("R", "B")]),
        (("system", "Be task.", "human", "<image>\nQ", "gpt", "A"), [("Be task.\nQ", "A")]),
        (("human", "<image>", "human", "Q", "gpt", "A"), [("Q", "A")]),
        (("system", "Be task.", "human", "<image>", "human", "Q", "gpt", "A"), [("Be task.\nQ", "A")]),
        (("human", "<image>", "gpt", "A caption."), [("", "A caption.")]),
        (("human", "Q", "gpt", "A", "human", "R"), [("Q", "A")]),
        (("user", [{"type": "image", "index": 0, "text": None}, said("Q")], "assistant", [said("A")]), [("Q", "A")]),
        (("user", [said("Q\n"), {"type": "image"}], "assistant", [said("A"), said("B")]), [("Q", "AB")]),
    ],
)
def test_turns_are_paired_by_role(tmp_path, turns, expected):
    assert opened(tmp_path, row(*turns))[0].text == expected


@pytest.mark.parametrize(
    ("system", "turns", "expected"),
    [
        ("Be terse.", ("human", "<image>\nQ", "gpt", "A"), [("Be terse.\nQ", "A")]),
        ("Be terse.", ("system", "Be terse.", "human", "Q", "gpt", "A"), [("Be terse.\nQ", "A")]),
        ([said("Be "), said("terse.")], ("human", "<image>", "human", "Q", "gpt", "A"), [("Be terse.\nQ", "A")]),
        ("", ("system", "Be terse.", "human", "Q", "gpt", "A"), [("Be terse.\nQ", "A")]),
        (None, ("human", "Q", "gpt", "A"), [("Q", "A")]),
    ],
)
def test_the_system_prompt_of_a_row(tmp_path, system, turns, expected):
    """ShareGPT files have it beside the turns."""
    assert opened(tmp_path, row(*turns) | {"system": system})[0].text == expected


def marked(question, answer):
    """A row whose two turns have further keys."""
    asked, answered = GOOD["conversations"]
    return GOOD | {"conversations": [asked | question, answered | answer]}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("text", "are not JSON objects"),
        ({"conversations": GOOD["conversations"]}, "have no image"),
        (GOOD | {"image": None}, "have no image"),
        (GOOD | {"image": []}, "have no image"),
        (GOOD | {"image": ["a.png", "b.png"]}, "have more than one image"),
        (GOOD | {"images": ["b.png"]}, 'have both "image" and "images", which differ'),
        (GOOD | {"messages": []}, 'have both "conversations" and "messages", which differ'),
        (GOOD | {"image": 7}, "have an image name that is not text"),
        (GOOD | {"image": ["a.png", 1][1:]}, "have an image name that is not text"),
        (GOOD | {"image": "a\0.png"}, "have an image name that is not text"),
        (GOOD | {"image": "\ud800.png"}, "have an image name that is not text"),
        (GOOD | {"image": "/9j/" * 2000}, "have an image name of more than 4096 characters"),
        (GOOD | {"image": "s3://bucket/a.png"}, "have an image at a URL"),
        (GOOD | {"image": "/etc/a.png"}, "have an image outside data.image_root"),
        (GOOD | {"image": "../a.png"}, "have an image outside data.image_root"),
        (GOOD | {"image": "."}, "have an image outside data.image_root"),
        ({"image": "a.png"}, "have no conversation"),
        ({"image": "a.png", "conversations": {}}, "have no conversation"),
        ({"image": "a.png", "conversations": []}, "have no conversation"),
        ({"image": "a.png", "conversations": ["Q", "A"]}, "have a turn whose value is not text"),
        (
            {"image": "a.png", "conversations": [{"from": "human"}, {"from": "gpt"}]},
            "have a turn whose value is not text",
        ),
        (row("human", "Q", "gpt", None), "have a turn whose value is not text"),
        (row("human", "Q", "gpt", 3), "have a turn whose value is not text"),
        (row("human", ["Q"], "gpt", "A"), "have a turn whose value is not text"),
        (row("human", [{"type": "video"}, said("Q")], "gpt", "A"), "have a turn whose value is not text"),
        (row("human", [{"type": "image"}] * 2, "gpt", "A"), "have more than one <image> for one image"),
        (row("human", "Q", None, "A"), "have a turn from a role other than human, gpt or system"),
        (row("human", "Q", "tool", "A"), "have a turn from a role other than human, gpt or system"),
        (marked({}, {"loss": False}), "have an answer marked as not to be trained on"),
        (marked({}, {"weight": 0, "train": None}), "have an answer marked as not to be trained on"),
        (row("human", "Q", "gpt", "\ud83d"), "have a turn with lone surrogates or NUL characters"),
        (row("human", "Q"), "have no answer"),
        (row("system", "S", "human", "Q"), "have no answer"),
        (row("human", "Q", "human", "R", "gpt", "A"), "do not alternate"),
        (row("gpt", "A", "human", "Q"), "do not alternate"),
        (row("human", "Q", "gpt", "A", "gpt", "B"), "do not alternate"),
        (GOOD | {"system": 7}, 'have a "system" that is not text'),
        (row("system", "S", "human", "Q", "gpt", "A") | {"system": "T"}, 'have both "system" and a system turn'),
        (GOOD | {"system": "Look at <image>"}, "have an <image> after the first question"),
        (row("human", "Q", "gpt", "A", "system", "S", "human", "R", "gpt", "B"), "do not alternate"),
        (row("human", "<image><image>\nQ", "gpt", "A"), "have more than one <image> for one image"),
        (row("human", "Q", "gpt", "A", "human", "<image>\nR", "gpt", "B"), "have an <image> after the first question"),
        (row("human", "Q", "gpt", "<image>"), "have an <image> after the first question"),
        (row("human", "Q", "gpt", " \n"), "have an empty answer"),
    ],
)
def test_rows_of_other_forms_are_left_out_by_reason(tmp_path, bad, reason, caplog):
    source = opened(tmp_path, GOOD, bad, bad)
    assert [source[i].text for i in range(len(source))] == [[("Q", "A")]]
    ((found, count),) = source.skipped.counts.items()
    assert reason in found and count == 2
    assert f"rows.json: skipped 2 {found} (the first: row 2)" in caplog.text
    with pytest.raises(DataError, match=f"rows.json .*(has no conversation.*{reason}|not LLaVA-style)"):
        opened(tmp_path, bad)


def test_answers_that_other_trainers_train_on_are_used(tmp_path):
    source = opened(
        tmp_path,
        marked({"loss": False}, {"loss": True, "weight": 1}),
        marked({"weight": 0}, {"loss": None, "train": ""}),
    )
    assert len(source) == 2 and not source.skipped


def test_a_last_question_without_an_answer_is_said(tmp_path):
    source = opened(tmp_path, row("human", "Q", "gpt", "A", "human", "R"))
    assert source.skipped.counts == {"last questions without an answer (the rest of their rows is used)": 1}


def test_rows_one_a_line(tmp_path):
    path = conversations(tmp_path).with_name("rows.JSONL")
    lines = [json.dumps(row("human", "Q", "gpt", answer), ensure_ascii=False) for answer in ("A", "B\u2028", "C")]
    path.write_text(f"{lines[0]}\r\n\n{lines[1]}\n {lines[2]}", newline="")
    source = open_source(str(path), "i2t")
    assert [source[i].text for i in range(len(source))] == [[("Q", "A")], [("Q", "B")], [("Q", "C")]]
    path.write_text(f"{lines[0]}\n{lines[1][:-2]}")
    with pytest.raises(DataError, match=r"rows.JSONL is not JSON: line 2: Expecting .*, at character \d+ of the line"):
        open_source(str(path), "i2t")
    path.write_text(f"[{lines[0]}, {lines[1]}]")
    with pytest.raises(DataError, match=r"line 1 is a list, but .*; rename the file to \.json if it is a list$"):
        open_source(str(path), "i2t")
    path.with_name("rows.json").write_text("\n".join(lines))
    with pytest.raises(
        DataError, match=r"rows.json is not JSON: Extra data.*rename it to .jsonl if it has one row per line"
    ):
        open_source(str(path.with_name("rows.json")), "i2t")


def test_names_of_other_chat_formats(tmp_path):
    turns = [{"role": "user", "content": "<image>Q"}, {"role": "assistant", "content": "A"}]
    source = opened(tmp_path, {"images": ["b.png"], "messages": turns}, {"image": "a.png", "conversations": turns})
    empty = {"image": None, "conversations": None, "from": None}  # as a table has them
    same = opened(tmp_path, GOOD | {"images": ["a.png"]}, empty | {"images": ["b.png"], "messages": turns})
    assert [same[i].key for i in range(2)] == ["a.png", "b.png"] and not same.skipped
    assert [source[i][::2] for i in range(2)] == [("b.png", [("Q", "A")]), ("a.png", [("Q", "A")])]


def test_names_of_images_start_from_the_root(tmp_path):
    names = ["a.png", ["a.png"], "./a.png", "d/../a.png", str(tmp_path / "a.png")]
    source = opened(tmp_path, *(GOOD | {"image": name} for name in names))
    assert [source[i].key for i in range(len(source))] == ["a.png"] * 5
    source = opened(tmp_path, GOOD | {"image": str(tmp_path / "a.png")}, image_root="/")
    assert source[0].key == str(tmp_path / "a.png")[1:] and source[0].image == image_bytes()


def test_a_root_that_is_missing_is_no_list_of_bad_samples(tmp_path):
    with pytest.raises(DataError, match="data.image_root .*nowhere is not a folder"):
        opened(tmp_path, GOOD, image_root=tmp_path / "nowhere")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks(tmp_path, encoding):
    path = conversations(tmp_path)
    path.write_bytes(json.dumps([row("human", "Q", "gpt", "Wörter")], ensure_ascii=False).encode(encoding))
    assert open_source(str(path), "i2t")[0].text == [("Q", "Wörter")]


def test_files_that_are_none(tmp_path):
    path = conversations(tmp_path)
    for data, words in (
        (b"caf\xe9", "not UTF-8 .byte 0xe9 at 3"),
        (b"[" * 10**6, "is not JSON"),
        (b"[]", "not LLaVA-style"),
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (b"<!DOCTYPE html>", "is a web page"),
        (gzip.compress(b"[]"), "is compressed by gzip; unpack it first"),
        (b"PK\3\4", "is a zip archive"),
    ):
        path.write_bytes(data)
        with pytest.raises(DataError, match=f"rows.json.*{words}"):
            open_source(str(path), "i2t")


def test_a_line_is_no_longer_than_an_item_of_a_list(tmp_path, monkeypatch):
    monkeypatch.setattr(json_stream, "LONGEST", 200)
    path = conversations(tmp_path).with_suffix(".jsonl")
    path.write_text(f"{json.dumps(GOOD)}\n{json.dumps(row('human', 'Q', 'gpt', 'A' * 200))}\n")
    for large in (2**24, 0):
        monkeypatch.setattr(index_files, "LARGE", large)  # read as a whole, or as a stream
        with pytest.raises(DataError, match="rows.jsonl is not JSON: line 2 has more than 200 characters"):
            open_source(str(path), "i2t")
    path.write_bytes(b"[" * 2**20)
    taken, read = [], io.BytesIO(path.read_bytes())
    read.read1 = lambda size: taken.append(size) or io.BytesIO.read1(read, size)
    monkeypatch.setattr(json_stream, "open_stream", lambda path: read)
    with pytest.raises(ValueError, match="line 1 has more than 200 characters"):
        list(json_stream.read_items(path, lines=True))
    assert sum(taken) < 2**16  # the rest of the line is not read


def test_identity_is_of_rows_and_sizes_and_not_of_the_place(tmp_path):
    one, two = (opened(fill(tmp_path / name, {}) / "x", GOOD).identity() for name in ("here", "there"))
    assert one == two
    assert opened(tmp_path / "there/x", row("human", "Q", "gpt", "B")).identity() != one
    path = conversations(tmp_path / "there/x", GOOD)
    path.with_name("a.png").write_bytes(image_bytes() + b"0")
    changed = open_source(str(path), "i2t").identity()
    path.with_name("a.png").unlink()
    assert len({one, changed, open_source(str(path), "i2t").identity()}) == 3
