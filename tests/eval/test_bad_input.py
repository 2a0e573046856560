"""What others made and what goes wrong on the way: a clear error or a failed image, and nothing lost."""

import contextlib
import json
import math
import re

import numpy as np
import pytest
from PIL import ExifTags, Image

import reca
from reca.comparison import curves, page
from reca.eval import records, report
from reca.eval.errors import EvaluationError
from reca.eval.files import write
from reca.eval.judges.base import JudgeError
from reca.eval.judges.endpoint import data_url
from reca.eval.judges.local_vlm import _rgb
from reca.eval.judges.mask2former import read_rgb
from reca.eval.judges.toy import ToyJudge
from reca.eval.records import Record
from reca.eval.scoring import score
from reca.eval.settings import Settings
from reca.eval.suites import Item, open_suite
from reca.eval.suites.base import check_items
from tests.toy_datasets.artwork import needs_artwork

NEXT_LINE, SEPARATOR, HALF = "\x85", "\u2028", "\ud83d"  # what str.splitlines splits at, and half of an emoji


def wise(folder, rows):
    folder.mkdir(exist_ok=True)
    (folder / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder


def prompt(number, text="p"):
    return {"prompt_id": number, "Prompt": text, "Category": "Cultural knowledge", "Explanation": "e"}


# ---- files of benchmarks ----


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b'"x"', b"\xff\xfe\x00", b"[" * 100_000, b'{"a": {}}\n'])
@pytest.mark.parametrize(
    ("suite", "name"),
    [
        ("geneval", "evaluation_metadata.jsonl"), ("geneval2", "geneval2_data.jsonl"), ("dpg", "dpg_bench.csv"),
        ("wise", "culture.json"), ("imgedit", "singleturn.json"), ("gedit", "items.jsonl"),
        ("pope", "coco_pope_random.json"), ("mme", "existence/1.txt"),
    ],
)  # fmt: skip
def test_a_file_that_is_none_of_the_benchmark(tmp_path, suite, name, content):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    if suite == "mme":
        Image.new("RGB", (4, 4)).save(path.with_suffix(".png"))
    settings = Settings(open_suite(suite, tmp_path))
    with pytest.raises(EvaluationError, match=f"{path.stem}|{tmp_path}"):
        settings.items()


def test_a_table_without_a_column(tmp_path):
    (tmp_path / "dpg_bench.csv").write_text("item_id,proposition_id,tuple\n" + "p1,1,entity\n" * 2)
    with pytest.raises(EvaluationError, match=r"dpg_bench.csv has no column dependency, question_natural_lang"):
        open_suite("dpg", tmp_path).items()


def test_ids_and_prompts_that_cannot_be_used(tmp_path):
    suite = open_suite("wise", wise(tmp_path, [prompt(1), prompt(2), prompt(1, "other")]))
    with pytest.raises(EvaluationError, match="wise: item '1' occurs twice"):
        Settings(suite).items()
    suite = open_suite("imgedit")
    for name in ("../../x", "/x", "a\0b", "x" * 300, HALF):
        with pytest.raises(EvaluationError, match="has no valid file name in the folder of images"):
            check_items(suite, [Item(name, "add", "p")])
    for text in (None, 3, HALF):
        with pytest.raises(EvaluationError, match="has a prompt that is not valid text"):
            check_items(suite, [Item("1", "add", text)])
    check_items(
        suite, [Item(".hidden", "add", "/ ../" + 300 * "ü"), Item("2", "add", "the same"), Item("3", "add", "the same")]
    )


def test_prompts_may_hold_other_separators_of_lines(tmp_path):
    row = {"tag": "single_object", "include": [], "prompt": f"a{SEPARATOR}b{NEXT_LINE}c"}
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(row, ensure_ascii=False).encode() + b"\r\n")
    assert [item.prompt for item in open_suite("geneval", path).items()] == [row["prompt"]]


def test_images_to_begin_from_are_looked_for_at_once(tmp_path, painter):
    edits = {"1": {"id": "a.png", "prompt": "p", "edit_type": "add"}}
    (tmp_path / "singleturn.json").write_text(json.dumps(edits))
    with pytest.raises(EvaluationError, match="1 of the 1 input images of imgedit do not exist: .*a.png"):
        reca.evaluate("imgedit", "bagel_tiny", data=tmp_path, judge="local:x", out=tmp_path / "out")


# ---- records and answers ----


def test_answers_with_anything_in_them_are_read_again(tmp_path):
    path = tmp_path / "records.jsonl"
    answers = [f"a{SEPARATOR}b{NEXT_LINE}\n\x0c", HALF, "\N{GRINNING FACE}", {"nested": [HALF]}, ""]
    with records.Appender(path) as file:
        for k, answer in enumerate(answers):
            file.append(records.Record("1", k, None, {"name": "j"}, answer).line())
    assert [record.answer for record in records.read(path)] == answers
    write(tmp_path / "results.json", json.dumps({"x": HALF}, ensure_ascii=False))
    assert json.loads((tmp_path / "results.json").read_text()) == {"x": HALF}


@pytest.mark.parametrize(
    "row",
    ['{"item": "1", "k": -1, "answer": 1}', '{"item": "1", "k": 0, "answer": 1, "judge": "me"}', "[]", "null", "7",
     '{"item": "1", "k": 1e999, "answer": 1}', '{"item": "1", "k": 0, "answer": 1, "picture": 3}', "[" * 100_000,
     '{"item": "1", "k": 0}', '{"item": "1", "k": 0, "error": 5}'],
)  # fmt: skip
def test_lines_that_are_no_records(row):
    assert records.parse(row) is None


@pytest.mark.parametrize(
    ("suite", "item", "good", "bad"),
    [
        ("geneval", Item("1", "counting", "p", metadata={"tag": "counting", "include": [{"class": "cow", "count": 1}]}),
         {"cow": [{"box": [0, 0, 1, 1], "score": 0.99}]}, [None, "x", 3, [], {"cow": "x"}, {"cow": [{"box": 1}]}]),
        ("geneval2", Item("1", "3", "p", metadata={"questions": [("q", "a")], "skills": ["object"], "atom_count": 3}),
         [0.5], [None, 3, "x", [], [math.nan], [None], ["x"], {}]),
        ("dpg", Item("1", "all", "p", metadata={"questions": []}), None, [None, 3, "x", [3], [{"a": "yes"}], {}]),
        ("wise", Item("1", "CULTURE", "p"), "Score: 1", [None, "", {}, {"score": math.nan}, {"score": 7}, [], 3]),
        ("wise_legacy", Item("1", "CULTURE", "p"), "Consistency: 1\nRealism: 1\nAesthetic Quality: 1",
         [None, {"consistency": 9.9, "realism": 1, "aesthetic_quality": 1}, {"consistency": math.nan}, [], 3]),
        ("imgedit", Item("1", "add", "p"), "A: 1", [None, 3, {}, "A: ²", ""]),
        ("mme", Item("1", "color", "p", metadata={"image": "a.png", "truth": "Yes"}), None, [None, 3, ["Yes"], {}]),
        ("gedit", Item("1", "ps_human", "p", metadata={"intersection": True}),
         {"semantics": "[1, 2]", "quality": "[1, 2]"}, [None, 3, {}, {"semantics": [math.nan], "quality": [1]}, "x"]),
    ],
)  # fmt: skip
def test_an_answer_that_is_nonsense_is_one_failed_image(suite, item, good, bad):
    """Whatever it is, the others keep their score; and no figure of the results is anything but a number."""
    opened, other = open_suite(suite), Item("2", item.tag, "p", metadata=item.metadata)
    for answer in bad:
        answers = {("1", 0): answer} | ({("2", 0): good} if good is not None else {})
        found = score(opened, answers, [item, other])
        assert [key for key, _ in found.failed] == [("1", 0)], answer
        assert [value.item for value in found.values] == (["2"] if good is not None else []), answer
        json.dumps(found.metrics, allow_nan=False)


# ---- result files of others ----


def test_a_result_file_with_more_rows_and_with_less(tmp_path):
    rows = [{"tag": "single_object", "include": [], "prompt": f"p{i}"} for i in range(3)]
    data, results = tmp_path / "data.jsonl", tmp_path / "results.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def line(i, k=0, correct=True, row=None):
        return {
            "filename": f"{i:05d}/samples/{k:04d}.png",
            "prompt": "p",
            "correct": correct,
            "metadata": json.dumps(row or rows[i]),
        }

    def evaluated(*lines, **options):
        results.write_text("".join(json.dumps(one) + "\n" for one in lines))
        given = {"data": data, "records": results, "out": tmp_path / "out"}
        return reca.evaluate("geneval", "show_o_tiny", **given, **options)

    every = [line(i) for i in range(3)]
    assert evaluated(*every, line(0, correct=False))["overall"]["value"] == pytest.approx(2 / 3)  # the later one counts
    extra = [line(7, row=rows[0]), line(0, k=-1), {"filename": "x.png"}, [], "x"]
    assert evaluated(*extra, *every)["counts"]["images"] == 3
    assert evaluated(*every, limit=1)["counts"]["items"] == 1
    with pytest.raises(EvaluationError, match=r"no record of 1 images of geneval: 00002 \(0\)"):
        evaluated(*every[:2])
    with pytest.raises(EvaluationError, match="line 2: correct is 'false'; expected true or false"):
        evaluated(line(0), line(1, correct="false"))
    with pytest.raises(EvaluationError, match="contains no answers about the items of geneval"):
        evaluated(*extra)


def test_images_that_a_list_names_elsewhere(tmp_path):
    row = {"prompt": "two cats", "atom_count": 3, "skills": ["object"], "vqa_list": [["Is there a cat?", "Yes"]]}
    (tmp_path / "geneval2_data.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "cats.png")
    listed = tmp_path / "images/image_paths.json"
    (tmp_path / "records.jsonl").write_text(json.dumps({"item": "00000", "k": 0, "answer": [0.5]}) + "\n")
    given = {"data": tmp_path, "images": tmp_path / "images", "out": tmp_path / "out", "steps": ["judge", "score"]}
    for content in ({"two cats": 3}, [1]):
        listed.write_text(json.dumps(content))
        with pytest.raises(EvaluationError, match="image_paths.json: expected {prompt: path of its image}"):
            reca.evaluate("geneval2", "show_o_tiny", judge=f"recorded:{tmp_path / 'records.jsonl'}", **given)
    listed.write_text(json.dumps({"two cats": str(tmp_path / "cats.png"), "a dog": "dog.png"}))
    found = reca.evaluate("geneval2", "show_o_tiny", judge=f"recorded:{tmp_path / 'records.jsonl'}", **given)
    assert found["overall"]["value"] == pytest.approx(50)
    assert found["items"][0]["images"][0]["path"] == str(tmp_path / "cats.png")


def test_names_that_only_look_like_numbers(tmp_path):
    suite = open_suite("geneval")
    items = suite.items()[:1]
    for name in ("²/samples/0000.png", "00000/samples/².png", "00000/samples/0000.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "00000/samples/0001.png").mkdir()
    assert list(suite.find(tmp_path, items)) == [("00000", 0)]
    assert suite.items_of_images(tmp_path) == []


def evaluated():
    """Results of three edits of two tags, compared with those of other images."""
    suite, by = open_suite("imgedit"), {"name": "x", "version": "1", "dtype": None, "exact": True}
    items = [Item(str(n), tag, "p") for n, tag in enumerate(("add", "add", "remove"))]
    model = {"source": "r", "umm": "bagel", "trained": True, "step": 2, "ema": False, "dtype": "fp32",
             "weights_sha256": "ab"}  # fmt: skip

    def results(marks):
        answers = [Record(item.id, 0, None, by, f"A: {mark}") for item, mark in zip(items, marks, strict=True)]
        made = {"model": model, "sampling": {"steps": 2}, "seed": 0}
        return report.results(suite, items, {("0", 0): "0.png"}, answers, by, made) | {"images": "images"}

    return json.loads(json.dumps(report.compare(results((4, 3, 5)), results((4, 4, 1)), "folder")))


def page_of(compared):
    side = {"source": "r", "kind": "run", "step": 2}
    suites = [compared | {"of": {"before": "b", "after": "a"}}]
    found = {"before": side, "after": side, "suites": suites, "curves": [], "settings": [], "notes": []}
    return found | {"understanding": None, "reconstructions": None}


def test_results_that_are_none(tmp_path):
    path = tmp_path / "results.json"
    whole = evaluated()
    path.write_text("\ufeff" + json.dumps(whole), encoding="utf-8")
    assert report.read(path) == whole
    for content, reason in (
        (json.dumps(whole | {"items": math.nan}), "NaN is not a finite number"),
        ("[]", "another format"),
        ('{"format": 1}', "suite is missing, or is of another type"),
        ('{"format": 2}', "another format"),
        ("[" * 100_000, "nested too deeply"),
        ("{", "Expecting property name"),
        ("", "Expecting value"),
        (json.dumps(whole)[:-9], "delimiter|Unterminated|Expecting"),
    ):
        path.write_text(content)
        with pytest.raises(EvaluationError, match=f"results.json cannot be read: .*{reason}.*; repeat its `reca eval`"):
            report.read(path)
    folder = tmp_path / "eval/training/toy/000002"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text("{")
    with pytest.raises(EvaluationError, match=f"; delete {folder} to leave this evaluation out"):  # it has no reca eval
        report.read(folder / "results.json")


def test_results_with_a_value_of_another_type_are_damaged(tmp_path):
    """Whichever value it is: none gets as far as a comparison, a page or a card."""
    path = tmp_path / "results.json"
    whole, compared = evaluated(), {"power", "against"}
    for damaged, place in damage(whole):
        path.write_text(json.dumps(damaged))
        try:
            report.text(found := report.read(path))
        except EvaluationError as error:
            inside = rf"\({re.escape(place)}[\w.\[\]]* is missing, or is of another type\)"
            assert re.search(f"{inside}|it has another format", str(error)), (place, str(error))
            continue
        if not compared & {place, place.split(".")[0]}:  # those of one type are compared once
            compared.add(place)
            with contextlib.suppress(EvaluationError):  # other suites, other prompts
                page.render(page_of(report.compare(found | {"against": None}, whole, tmp_path)), tmp_path)


def damage(value, place=""):
    """Every value within `value` in turn removed or replaced by others: the whole, and the place."""
    keys = value.keys() if isinstance(value, dict) else range(min(len(value), 1)) if isinstance(value, list) else ()
    for key in keys:
        inner = f"[{key}]" if isinstance(value, list) else f".{key}" if place else key
        copy = dict(value) if isinstance(value, dict) else list(value)
        for other in (None, "x", 3, [], {}, [[1]]):
            copy[key] = other
            yield json.loads(json.dumps(copy)), place + inner
        for changed, where in damage(value[key], place + inner):
            copy[key] = changed
            yield json.loads(json.dumps(copy)), where
        if isinstance(value, dict):
            yield {name: one for name, one in value.items() if name != key}, place + inner


# ---- images of others ----


def images(folder):
    """The same grey, saved in other modes: name -> file."""
    grey = Image.new("RGB", (6, 4), (156, 156, 156))
    clear = Image.new("RGBA", (6, 4), (0, 0, 0, 0))
    sixteen = Image.fromarray(np.full((4, 6), 40_000, dtype=np.uint16))
    turned, exif = grey.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    grey.convert("CMYK").save(folder / "cmyk.tif")
    sixteen.save(folder / "sixteen.png")
    grey.convert("P").save(folder / "palette.png")
    clear.save(folder / "clear.png")
    turned.save(folder / "turned.jpg", exif=exif, quality=100)
    return {path.stem: path for path in folder.iterdir()}


def test_every_judge_sees_images_of_any_mode_alike(tmp_path):
    found = images(tmp_path)
    for name, path in found.items():
        wanted = 255 if name == "clear" else 156
        seen = np.asarray(_rgb(path)).astype(int)
        assert seen.shape == (4, 6, 3) and abs(seen - wanted).max() <= 3, name
        shown = page._image(path)
        assert shown and shown["small"], name
    assert abs(read_rgb(found["sixteen"]).astype(int) - 156).max() <= 1 and read_rgb(found["turned"]).shape == (4, 6, 3)
    assert data_url(found["cmyk"]).startswith("data:image/png;base64,iVBOR")
    assert data_url(found["turned"]).startswith("data:image/jpeg;base64,/9j/")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 60)
    assert page._image(tmp_path / "broken.png") is None and page._image(tmp_path / "none.png") is None


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (8, 8), (512, 300)])
def test_shapes_are_judged_in_images_of_any_size(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "x.png")
    suite = open_suite("toy")
    assert suite.ask(ToyJudge(), suite.items()[0], tmp_path / "x.png") == {"correct": False, "seen": "shows nothing"}


@needs_artwork
def test_emoji_have_one_size(tmp_path):
    Image.new("RGB", (20, 30), "white").save(tmp_path / "x.png")
    suite = open_suite("toy?dataset=emoji")
    with pytest.raises(JudgeError, match="x.png has 20 x 30 pixels; images of the toy dataset emoji have another size"):
        suite.ask(ToyJudge(), suite.items()[0], tmp_path / "x.png")


def test_a_judge_whose_library_fails_on_one_image(painter, monkeypatch):
    judged = ToyJudge.shows

    def shows(self, image, prompt):
        if "/00000/" in str(image):
            raise ValueError("Unable to infer channel dimension format\nmore")
        return judged(self, image, prompt)

    monkeypatch.setattr(ToyJudge, "shows", shows)
    found = reca.evaluate("toy", painter, limit=6)
    assert found["failed"] == [
        {"item": "00000", "k": 0, "error": "ValueError: Unable to infer channel dimension format"}
    ]


# ---- the page ----


def test_a_curve_of_step_0_alone(tmp_path):
    """An evaluation before the first step, of a run that was stopped then."""
    (tmp_path / "log.jsonl").write_text('{"step": 0, "evaluation": true, "holdout/loss": 2.0}\n')
    (points,) = curves._losses(tmp_path).values()
    drawn = page._chart({"name": "holdout/loss", "before": [], "after": points})
    assert drawn["after"] == "0.0,120.0" and drawn["ends"] == {"after": "2"}
