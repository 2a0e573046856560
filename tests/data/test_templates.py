"""The 360 sentences that stand beside h_v."""

import re

import pytest

from reca.data.errors import DataError
from reca.data.templates import load_templates

SENTENCES = load_templates()


def test_count_lengths_and_variety():
    assert len(SENTENCES) == 360
    assert len({s.casefold() for s in SENTENCES}) == 360
    assert all(20 <= len(s) <= 390 for s in SENTENCES)
    assert sum(s.endswith("?") for s in SENTENCES) >= 40
    assert sum(len(s) < 60 for s in SENTENCES) >= 60 and sum(len(s) > 150 for s in SENTENCES) >= 30
    assert sum(s[-1] not in ".?!" for s in SENTENCES) >= 30


def test_no_two_say_the_same():
    words = [frozenset(s.casefold().strip(".?").split()) for s in SENTENCES]
    for i, a in enumerate(words):
        for j in range(i):
            assert len(a & words[j]) / len(a | words[j]) < 0.75, (SENTENCES[i], SENTENCES[j])


def test_first_words_vary():
    assert len({s.split()[0] for s in SENTENCES}) >= 60


def test_some_of_them_are_spread_over_all():
    assert load_templates(None, 3) == [SENTENCES[0], SENTENCES[120], SENTENCES[240]]
    assert load_templates(None, 360) == SENTENCES


def test_own_file_and_errors(tmp_path):
    (tmp_path / "mine.txt").write_text("Look.\n\n  Say what you see.  \n")
    assert load_templates(str(tmp_path / "mine.txt")) == ["Look.", "Say what you see."]
    with pytest.raises(DataError, match="does not exist"):
        load_templates(str(tmp_path / "nowhere.txt"))
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match="is empty"):
        load_templates(str(tmp_path / "empty.txt"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('["Look.", "Say what you see."]', "mine.txt is JSON; write its sentences one per line"),
        ('{"prompts": ["Look."]}\n', "mine.txt is JSON"),
        ("Look.\nSay what you see.\n<image>\n", "<image> in '<image>' would be read as text; remove it from the 1 "),
        ("<image> Look.\nSay.\nSee <image>.", "<image> in '<image> Look.' would be read as text; remove it from the 2"),
    ],
)
def test_what_other_trainers_write_is_not_read_as_sentences(tmp_path, text, said):
    (tmp_path / "mine.txt").write_text(text)
    with pytest.raises(DataError, match=re.escape(said)):
        load_templates(str(tmp_path / "mine.txt"))


def test_brackets_are_no_json(tmp_path):
    (tmp_path / "mine.txt").write_text("[Look.]\n{Say}")
    assert load_templates(str(tmp_path / "mine.txt")) == ["[Look.]", "{Say}"]


def test_fewer_templates():
    assert load_templates(count=360) == SENTENCES
    few = load_templates(count=7)
    assert len(set(few)) == 7 and set(few) <= set(SENTENCES)
    for count in (0, 361):
        with pytest.raises(DataError, match=f"template_count={count}, but there are 360"):
            load_templates(count=count)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks_are_no_part_of_a_sentence(tmp_path, encoding):
    (tmp_path / "mine.txt").write_bytes("Erzähl.\r\nSieh.\r\n".encode(encoding))
    assert load_templates(str(tmp_path / "mine.txt")) == ["Erzähl.", "Sieh."]


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "mine.txt").write_bytes(b"l\x92image\n")
    with pytest.raises(DataError, match="mine.txt cannot be read: the text is not UTF-8 .byte 0x92 at 1"):
        load_templates(str(tmp_path / "mine.txt"))
