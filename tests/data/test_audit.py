"""`reca data check` and `reca data view`."""

import base64
import io
import json
import os
import re
from types import SimpleNamespace

import pytest
from PIL import Image

from reca.cli import main
from reca.data.audit import audit, report
from reca.data.config import DataConfig
from reca.data.contact_sheet import contact_sheet
from reca.data.errors import DataError, LeftOut
from reca.data.loader import open_loader
from reca.data.sources.factory import open_source
from reca.data.views import View, Views
from tests.data.files import conversations, fill, image_bytes, row

VIEWS = {"reca": Views(gen=View(20), und=View(12, "center_crop")), "t2i": Views(gen=View(20), und=None)}


@pytest.fixture
def root(tmp_path):
    """Four images, two of one content, and one that is none, with captions."""
    files = {
        "a.png": image_bytes(size=(100, 300)), "b.png": image_bytes(size=(600, 600)),
        "c.png": image_bytes(size=(600, 600)), "d.png": image_bytes((1, 1, 1), (520, 512)), "e.png": b"junk",
        "a.txt": b"one", "b.txt": b"one two three", "c.txt": b"one", "d.txt": b"", "e.txt": b"x",
    }  # fmt: skip
    return fill(tmp_path / "photos", files)


def test_every_sample_is_counted(root):
    found = audit(open_source(str(root), "reca"))
    assert (found.samples, len(found.bad)) == (5, 1)
    assert found.bad == {"e.png": "not an image in a supported format (JPEG, PNG, WEBP, GIF, BMP, TIFF, AVIF)"}
    assert found.duplicates == {"c.png": "b.png"}
    assert found.sides == {0: 1, 3: 3} and found.ratios == {0: 3, 3: 1}
    text = report(found)
    assert "5 samples, 4 of them usable" in text and "512 to 768" in text and "c.png = b.png" in text
    assert found.bytes == sum((root / f"{name}.png").stat().st_size for name in "abcd")


def test_a_file_that_vanishes_is_bad_and_a_row_without_an_image_is_no_sample(root, monkeypatch):
    source = open_source(str(root), "reca")
    (root / "b.png").unlink()
    found = audit(source)
    assert (found.samples, len(found.bad)) == (5, 2) and found.bad["b.png"].startswith("FileNotFoundError: ")

    def leave_out(self, index):
        raise LeftOut("rows without an image")

    monkeypatch.setattr(type(source), "__getitem__", leave_out)
    found = audit(source)
    assert (found.samples, found.left_out.counts) == (0, {"rows without an image": 5}) and not found.bad


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), MemoryError(), RuntimeError("strange")])
def test_a_fault_of_the_machine_or_of_a_source_is_not_one_of_the_sample(root, monkeypatch, error):
    source = open_source(str(root), "reca")

    def fail(self, index):
        raise error

    monkeypatch.setattr(type(source), "__getitem__", fail)
    with pytest.raises(DataError, match=f"sample a.png: {type(error).__name__}"):
        audit(source)


def test_rows_about_a_bad_image_are_not_usable(root, tmp_path):
    """Each image is listed once."""
    rows = [row("human", f"Q{n}", "gpt", "A", image=name) for n in range(3) for name in ("a.png", "e.png")]
    text = report(audit(open_source(str(conversations(tmp_path, *rows)), "i2t", str(root)), about=True))
    assert "6 samples, 3 of them usable" in text and "bad samples (1)" in text


def test_reasons_are_listed_up_to_a_number(tmp_path):
    """Files that have vanished have one each."""
    source = open_source(str(fill(tmp_path, {f"{n:02}.png": b"" for n in range(30)})), "reca")
    for n in range(30):
        (tmp_path / f"{n:02}.png").unlink()
    text = report(audit(source))
    assert "bad samples (30)" in text and len(text.splitlines()) < 30 and text.count("… and 20 more") == 2


def test_captions_and_conversations_are_counted(root, tmp_path):
    found = audit(open_source(str(root), "t2i"))
    assert sorted(found.captions) == [1, 1, 3] and found.bad["d.png"] == "the caption is empty"
    assert "captions: words 1 to 3, median 1; 1 are the text of another" in report(found)
    talk = conversations(
        tmp_path, row("human", "Q", "gpt", "a b"), row("human", "Q", "gpt", "A", "human", "R", "gpt", "B")
    )
    source = open_source(str(talk), "i2t")
    found = audit(source, about=True)
    assert sorted(found.turns) == [1, 2] and sorted(found.answers) == [1, 1, 2] and not found.duplicates
    assert "conversations: turns 1 to 2, median 1.5; words of an answer 1 to 2" in report(found, source.skipped)


def test_a_target_that_is_none_is_a_bad_sample(root, tmp_path):
    row = {"caption": "one", "boxes": [], "image": "a.png"}
    (tmp_path / "scored.json").write_text(json.dumps([row, row | {"target": "b.png"}, row | {"target": "e.png"}]))
    found = audit(open_source(str(tmp_path / "scored.json"), "srum", str(root)))
    assert list(found.bad) == ["a.png#3"] and found.samples == 3


def test_the_command_exits_1_where_something_is_bad(root, capsys):
    assert main(["data", "check", str(root)]) == 1
    out = capsys.readouterr().out
    assert "data.images (reca)" in out and "bad samples (1)" in out and "e.png: not an image" in out
    (root / "e.png").unlink()
    (root / "e.txt").unlink()
    assert main(["data", "check", str(root)]) == 0
    assert main(["data", "check", str(root), "--task", "t2i"]) == 1  # a caption is empty
    assert main(["data", "check", "show_o_tiny", f"data.images={root}", "--task", "reca"]) == 0
    assert main(["data", "check", str(root / "nowhere")]) == 4
    assert main(["data", "check", str(root), "data.colums.image=a"]) == 3


@pytest.mark.parametrize("limit", ["null", 2])
def test_what_sources_of_a_mixture_left_out_is_printed(root, tmp_path, capsys, limit):
    other = fill(tmp_path / "other", {"f.png": image_bytes((7, 7, 7)), "g.heic": b"", "._f.png": b""})
    mixed = f"data.images=[{{source: {root}}}, {{source: {other}}}]"
    assert main(["data", "check", "show_o_tiny", mixed, "--task", "reca", f"data.limit={limit}"]) in (0, 1)
    out = capsys.readouterr().out
    assert "1 images in unsupported formats (the first: g.heic)" in out and "1 hidden files and folders" in out


def images(page):
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r"base64,([^\"]*)", page)]


def sheet(root, task="reca", count=4):
    spec = {"reca": "images", "t2i": "captions"}[task]
    config = DataConfig(**{spec: str(root)}, decoder="pillow", workers=0, max_bad_fraction=0.5)
    options = {"seed": 3, "micro_batch": count}
    page = contact_sheet(open_loader(config, task, VIEWS[task], **options), count, "a < b")
    return page, next(iter(open_loader(config, task, VIEWS[task], **options)))


def test_a_contact_sheet_is_what_training_reads(root):
    page, batch = sheet(root)
    shown = images(page)
    assert page.count("<figure>") == 4 and len(shown) == 8 and "http" not in page and "a &lt; b" in page
    for number, (gen, und) in enumerate(zip(batch.gen, batch.und, strict=True)):
        for image, view in zip(shown[2 * number :], (gen, und), strict=False):
            assert image.tobytes() == view.permute(1, 2, 0).numpy().tobytes()
        assert batch.text[number] in page
    assert "Bad samples" in page and "e.png: not an image" in page


def test_captions_in_a_contact_sheet_are_text(root):
    (root / "b.txt").write_text("<b>bold & co</b>")
    page, _ = sheet(root, "t2i")
    assert "<b>bold" not in page and "&lt;b&gt;bold &amp; co" in page and len(images(page)) == 4
    assert "in training order, each with its generation view." in page


def test_turns_and_scores_are_lines_of_a_contact_sheet(root, tmp_path):
    talk = conversations(tmp_path, row("human", "<what>?", "gpt", "one"))
    scored = tmp_path / "scored.json"
    box = {"box": [0, 0, 50, 150], "score": -1}
    scored.write_text(json.dumps([{"image": "a.png", "caption": "two", "boxes": [box], "background": 0.5}]))
    config = DataConfig(conversations=str(talk), scored=str(scored), image_root=str(root), decoder="pillow", workers=0)
    views = {"i2t": Views(gen=None, und=View(12)), "srum": VIEWS["t2i"]}
    pages = {
        task: contact_sheet(open_loader(config, task, views[task], seed=0, micro_batch=1), 1, task) for task in views
    }
    assert "<b>Q</b> &lt;what&gt;?<br>\n<b>A</b> one<br>" in pages["i2t"]
    assert "two<br>\n-1 at 0.00, 0.00, 0.50, 0.50<br>\n+0.5 elsewhere<br>" in pages["srum"]


def test_the_command_writes_a_page_of_the_views_of_a_recipe(root, tmp_path, capsys, monkeypatch):
    model = SimpleNamespace(tasks=("reca",), views=VIEWS.get)
    monkeypatch.setattr("reca.commands.data.build_meta", lambda recipe: (model, None))
    out = tmp_path / "sheets"
    (root / "a.png").rename(root / os.fsdecode(b"caf\xe9.png"))  # a name that is not UTF-8
    arguments = ["data", "view", str(root), "--recipe", "show_o_tiny", "--out", str(out)]
    assert main([*arguments, "--count", "5"]) == 0
    assert capsys.readouterr().out == f"{out}/reca.html\n"
    page = (out / "reca.html").read_text()
    assert len(images(page)) == 10 and "caf\\udce9.png" in page and "e.png: not an image" in page
    assert main([*arguments, "--count", "0"]) == 3
    assert main([*arguments, "--task", "t2i"]) == 3
    assert "show_o has no t2i loss: its tasks are reca" in capsys.readouterr().err
