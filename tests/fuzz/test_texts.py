"""Conversations, captions and templates of any content: used, counted, or refused with a reason."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reca.data.errors import BadSample, DataError
from reca.data.sample import decode_caption
from reca.data.sources.conversations import Conversations
from reca.data.tasks import Turn
from reca.data.templates import load_templates
from tests.fuzz.bounds import counted, fewer
from tests.fuzz.mutate import mutate, mutations

ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
WORDS = st.sampled_from(
    ["Q", "A", " ", "", "<image>", "<image>\nQ", "<image><image>", "Wörter", "\ud83d", "\0", "a\r\nb"]
)
TEXTS = WORDS | st.text(max_size=12)
ROLES = st.sampled_from(["human", "gpt"] * 4 + ["user", "assistant", "system", "Human", "tool", "", None])
TURNS = st.fixed_dictionaries({"from": ROLES, "value": TEXTS}) | st.fixed_dictionaries(
    {"from": ROLES | ANY, "value": TEXTS | ANY}
)
GOOD = st.just([{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}])
IMAGES = st.sampled_from(
    ["a.png", "./a.png", "d/../a.png", "../a.png", "/a.png", "", "a\0", ["a.png"], ["a.png", "b.png"], []]
)
ROWS = st.fixed_dictionaries(
    {}, optional={"image": IMAGES | ANY, "conversations": GOOD | st.lists(TURNS, max_size=5) | ANY}
)


@pytest.fixture(scope="module")
def root():
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def said(rows, roles):
    """All that turns of these roles say, wherever they stand."""
    turns = [row.get("conversations") for row in rows if isinstance(row, dict)]
    turns = [turn for row in turns if isinstance(row, list) for turn in row if isinstance(turn, dict)]
    return {
        turn["value"].strip()
        for turn in turns
        if isinstance(turn.get("value"), str) and str(turn.get("from")).strip().lower() in roles
    }


@fewer(0.25)
@given(
    rows=st.lists(st.fixed_dictionaries({"image": st.just("a.png"), "conversations": GOOD}) | ROWS | ANY, max_size=5)
)
def test_every_row_is_used_or_counted(root, rows):
    path = root / "rows.json"
    path.write_text(json.dumps(rows))
    with counted("lists of rows"):
        try:
            source = Conversations(path, None)
        except DataError as error:
            assert str(path) in str(error)
            return
        unused = {reason: n for reason, n in source.skipped.counts.items() if "the rest of their rows" not in reason}
        assert len(source) + sum(unused.values()) == len(rows)
        answers, questions = said(rows, ("gpt", "assistant")), said(rows, ("human", "user"))
        for index in range(len(source)):
            image, turns = source.key(index), [Turn(*turn) for turn in source.value(index)]
            assert image and not image.startswith(("/", "..")) and source.key(index) == image and turns
            for turn in turns:
                assert turn.answer and turn.answer in answers
                assert any(turn.question.endswith(text.replace("<image>", "").strip()) for text in questions)
        assert len(source.identity()) == 64


SOUND = json.dumps(
    [{"image": "a.png", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "Ä"}]}] * 3
)


@fewer(0.25)
@given(encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]), changes=mutations())
def test_damaged_files_of_rows_are_read_or_refused(root, encoding, changes):
    path = root / "rows.json"
    path.write_bytes(mutate(SOUND.encode(encoding), changes))
    with counted("damaged files of rows"):
        try:
            source = Conversations(path, None)
        except DataError as error:
            assert str(path) in str(error)
            return
        assert len(source)


@fewer(0.25)
@given(data=st.binary(max_size=32) | st.text(max_size=16).map(lambda text: text.encode("utf-16", "surrogatepass")))
def test_captions_are_text_or_bad_samples(root, data):
    with counted("captions and templates"):
        try:
            text = decode_caption(data)
            assert text and text == text.strip() and "\0" not in text and "\r" not in text and text.encode()
        except BadSample:
            pass
        (root / "templates.txt").write_bytes(data)
        try:
            assert all(load_templates(str(root / "templates.txt")))
        except DataError as error:
            assert "templates.txt" in str(error)
