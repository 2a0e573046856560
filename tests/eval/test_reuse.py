"""What of an earlier evaluation is used again: what was made for the same prompt, source, question and judge."""

import json
import shutil

import pytest
import torch
from PIL import Image

import reca
from reca.config.recipe_files import load_recipe
from reca.eval import evaluation, generate, records, report
from reca.eval.checks import check
from reca.eval.errors import EvaluationError
from reca.eval.evaluation import judge_and_score
from reca.eval.judges import detectors
from reca.eval.judges.base import Judge
from reca.eval.judges.detectors import Owlv2Judge
from reca.eval.judges.endpoint import EndpointJudge
from reca.eval.judges.local_vlm import LocalVlmJudge
from reca.eval.records import Record
from reca.eval.settings import open_settings
from reca.eval.suites import Item, open_suite
from reca.eval.targets import Target, read_generation
from reca.eval.training import TrainingSuite
from reca.io.folders import NotWritable
from tests.eval.painter import Painter


class Reader(Judge):
    """Gives one point where the question has the word red."""

    name = "reader"

    def __init__(self):
        self.asked = 0

    def reply(self, text, images):
        self.asked += 1
        return f"Score: {int('red' in text)}"


@pytest.fixture
def reader(monkeypatch):
    judge = Reader()
    monkeypatch.setattr(evaluation, "open_judge", lambda *_: judge)
    return judge


def write_wise(path, explanations, prompt="p"):
    rows = [
        {"prompt_id": n, "Category": "CULTURE", "Prompt": prompt, "Explanation": explanation}
        for n, explanation in enumerate(explanations, 1)
    ]
    path.write_text(json.dumps(rows))
    return path


def without_digests(folder):
    """Make a folder what releases without digests wrote."""
    path = folder / "generation.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "items"}))
    path = folder / "records.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "digest"}) + "\n" for row in rows))


# ---- images ----


@pytest.mark.parametrize("old", [False, True])
def test_images_of_other_prompts_are_refused(painter, old):
    """Also in a folder without digests, whose results name the prompts."""
    first = reca.evaluate("toy", painter, limit=42)
    if old:
        without_digests(painter / "eval/000002/toy")
    there = {"limit": 42, "out": painter / "eval/000002/toy"}
    for steps in (("generate", "judge", "score"), ("score",)):
        with pytest.raises(
            EvaluationError, match=r"with other settings \(the prompts .* of \d+ items, such as 000\d\d"
        ):
            reca.evaluate("toy?seed=1", painter, steps=steps, **there)
        with pytest.raises(EvaluationError, match="protocol 'toy dataset shapes' -> 'toy dataset emoji'"):
            reca.evaluate("toy?dataset=emoji", painter, steps=steps, **there)
    assert Painter.made == 42 and reca.evaluate("toy", painter, limit=42) == first
    for limit, count, made in ((50, 1, 50), (50, 2, 100)):  # more of the same
        found = reca.evaluate("toy", painter, limit=limit, images_per_item=count)
        assert found["counts"]["images"] == made and Painter.made >= made
    assert len(read_generation(painter / "eval/000002/toy")["items"]) >= 50


def test_a_base_whose_folder_cannot_be_written_is_evaluated_alone(painter, tmp_path):
    """As in a run that is only readable: out is that of the run's evaluation, not of its base's."""
    (painter / "eval/base").touch()
    given = {"limit": 5, "out": tmp_path / "out"}
    with pytest.raises(NotWritable, match="other model's folder .*: evaluate .*/run/recipe.yaml alone with out, then "):
        reca.evaluate("toy", painter, against="base", **given)
    reca.evaluate("toy", painter / "recipe.yaml", limit=5, out=tmp_path / "base")
    found = reca.evaluate("toy", painter, against=tmp_path / "base", **given)
    assert found["against"]["overall"]["value"] < 1
    with pytest.raises(
        NotWritable, match=f"out {painter}/eval/base/toy cannot be written to .Not a directory.; name ano"
    ):
        reca.evaluate("toy", painter, limit=5, out=painter / "eval/base/toy")


def test_a_suite_with_options_has_a_folder_of_its_own(painter):
    """The second of toy and toy?seed=1 could not be evaluated, or replaced the results of the first."""
    options = {
        "toy": "toy", "toy?dataset=shapes&seed=0": "toy", "toy?seed=1": "toy_seed1", "toy?dataset=emoji": "toy_emoji",
        "toy?seed=2&dataset=emoji": "toy_emoji_seed2", "geneval": "geneval",
    }  # fmt: skip
    assert {name: open_suite(name).folder for name in options} == options
    for name in ("toy", "toy?seed=1"):
        reca.evaluate(name, painter, limit=5, against="base")
    for step in ("000002", "base"):
        done = (painter / "eval" / step).glob("*/results.json")
        assert {json.loads(path.read_text())["counts"]["items"] for path in done} == {5}
        assert {path.name for path in (painter / "eval" / step).iterdir()} - {"other"} == {"toy", "toy_seed1"}
    recipe = load_recipe("show_o_tiny", ["eval.every=1", "eval.suite=toy?dataset=emoji&seed=1"])
    assert TrainingSuite(recipe, painter)._side(3).folder == painter / "eval/training/toy_emoji_seed1/000003"


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", "{}", "[" * 100_000, '{"a": {"b": 1}}', '{"model": {}}', '{"model": {"source": "r", "umm": 3}}',
        '{"model": {"source": "r"}, "items": 3}',
    ],
)  # fmt: skip
def test_a_damaged_list_of_what_was_generated(painter, content):
    reca.evaluate("toy", painter, limit=5)
    (painter / "eval/000002/toy/generation.json").write_text(content)
    with pytest.raises(
        EvaluationError, match="generation.json is damaged: expected .* delete .*/toy or set another out"
    ):
        reca.evaluate("toy", painter, limit=5)


def test_images_of_unknown_weights_are_those_of_other_ones(painter):
    reca.evaluate("toy", painter, limit=5)
    path = painter / "eval/000002/toy/generation.json"
    made = json.loads(path.read_text())
    del made["model"]["weights_sha256"]
    path.write_text(json.dumps(made))
    next(path.parent.rglob("*.png")).unlink()
    with pytest.raises(EvaluationError, match=r"with other settings \(other weights\)"):
        reca.evaluate("toy", painter, limit=5)


def test_another_protocol_is_refused(painter):
    reca.evaluate("toy", painter, limit=5)
    path = painter / "eval/000002/toy/generation.json"
    path.write_text(path.read_text().replace('"toy dataset shapes"', '"older name"'))
    with pytest.raises(EvaluationError, match=r"with other settings \(protocol 'older name' -> 'toy dataset shapes'\)"):
        reca.evaluate("toy", painter, limit=5)


def test_evaluations_of_other_prompts_are_not_compared(painter):
    other = painter / "other"
    reca.evaluate("toy?seed=1", painter, limit=42, out=other)
    with pytest.raises(EvaluationError, match=r"other has different prompts, .* under \d+ ids, such as 000\d\d"):
        reca.evaluate("toy", painter, limit=42, against=other)


def test_evaluations_of_other_sources_or_questions_are_not_compared(tmp_path):
    """Their edits and marks differ for another reason than the model."""
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (4, 4), colour).save(tmp_path / f"{name}.png")
    suite, by = open_suite("imgedit"), {"name": "x"}

    def results(source, question="q"):
        items = [Item(str(n), "add", "p", tmp_path / source, {"question": question}) for n in range(3)]
        return report.results(suite, items, {}, [Record(i.id, 0, None, by, "A: 4") for i in items], by, {})

    first, lost = results("a.png"), results("none.png")
    for same in (results("a.png"), lost, json.loads(json.dumps(first))):
        assert report.compare(first, same, tmp_path)["against"]["items"] == 3
    for other in (results("b.png"), results("a.png", "another")):
        with pytest.raises(EvaluationError, match="different prompts, sources or questions .* under 3 ids, such as 0;"):
            report.compare(first, other, tmp_path)
    for row in lost["items"]:
        del row["digest"]  # as in results of earlier releases
    assert report.compare(first, lost, tmp_path)["against"]["items"] == 3
    with pytest.raises(EvaluationError, match="has no prompts of this evaluation"):
        report.compare(first, lost | {"items": [row | {"item": "9"} for row in lost["items"]]}, tmp_path)


def test_an_evaluation_to_compare_with_is_checked_before_anything_is_drawn(painter, tmp_path):
    """Whether it has results, or images that are still to be judged."""
    other, given = tmp_path / "other", {"limit": 5, "against": tmp_path / "other", "out": tmp_path / "out"}
    reca.evaluate("toy?seed=1", painter, limit=5, out=other)
    Painter.made = 0
    with pytest.raises(EvaluationError, match="other has different prompts"):
        reca.evaluate("toy", painter, **given)
    shutil.rmtree(other)
    reca.evaluate("toy", painter, limit=5, out=other, steps=["generate"])
    (other / "images/00000").rename(tmp_path / "kept")
    Painter.made = 0
    with pytest.raises(EvaluationError, match="images of toy are missing: 00000"):
        reca.evaluate("toy", painter, **given)
    assert Painter.made == 0
    assert reca.evaluate("toy", painter, partial=True, **given)["against"]["items"] == 4 and Painter.made == 5


def test_a_digest_is_of_all_that_decides(tmp_path):
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (4, 4), colour).save(tmp_path / f"{name}.png")
    shutil.copy(tmp_path / "a.png", tmp_path / "moved.png")
    item = Item("1", "t", "p", tmp_path / "a.png", {"x": 1, "y": [2]})
    same = Item("2", "t", "p", tmp_path / "moved.png", {"y": [2], "x": 1})
    assert (item.input_digest, item.digest) == (same.input_digest, same.digest)
    asked = [Item("1", "u", "p", item.source, item.metadata), Item("1", "t", "p", item.source, {"x": 2})]
    given = [Item("1", "t", "q", item.source, item.metadata), Item("1", "t", "p", tmp_path / "b.png", item.metadata)]
    assert {other.input_digest for other in asked} == {item.input_digest} and item.input_digest not in {
        other.input_digest for other in given
    }
    assert len({other.digest for other in (item, *asked, *given)}) == 5
    lost = Item("1", "t", "p", tmp_path / "none.png")
    assert lost.input_digest is None and lost.digest is None


# ---- answers ----


def test_answers_to_other_questions_are_not_read(tmp_path, monkeypatch):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    replies = iter(["first", "second"])
    monkeypatch.setattr(generate.inference, "answer", lambda model, images, *_, **__: [next(replies)] * len(images))
    suite, path = open_suite("pope"), tmp_path / "answers.jsonl"
    one, other = (Item("1", "t", text, tmp_path / "a.png") for text in ("is it red?", "is it blue?"))
    assert generate.generate_answers(torch.nn.Module(), suite, [one], path) == 1
    assert generate.read_answers(path, [one]) == {("1", 0): "first"} and generate.read_answers(path, [other]) == {}
    assert generate.generate_answers(torch.nn.Module(), suite, [other], path) == 1
    assert generate.read_answers(path, [other]) == {("1", 0): "second"}


# ---- verdicts ----


def test_an_edited_question_is_asked_anew(painter, reader, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for n in (1, 2):
        Image.new("RGB", (8, 8)).save(images / f"{n}.png")
    given = {"images": images, "judge": "endpoint:http://x/v1", "out": tmp_path / "out"}

    def score(*explanations, **others):
        data = write_wise(tmp_path / "wise.json", explanations)
        return reca.evaluate("wise", painter, data=data, **given | others)["overall"]["value"], reader.asked

    kept = tmp_path / "kept.jsonl"
    assert score("red", "red") == (1, 2)
    shutil.copy(tmp_path / "out/records.jsonl", kept)
    assert score("red", "blue") == (0.5, 3)
    assert score("red", "red") == (1, 3)  # a record stays
    with pytest.raises(EvaluationError, match=r"has no record of 1 images of wise: 2 \(0\)"):
        score("red", "blue", records=kept)
    with pytest.raises(EvaluationError, match="contains answers about other prompts, sources or questions than wise"):
        score("green", "blue", records=kept)


def test_records_of_earlier_releases_count(painter):
    first = reca.evaluate("toy", painter, limit=5)
    without_digests(painter / "eval/000002/toy")
    before = (painter / "eval/000002/toy/records.jsonl").read_text()
    assert reca.evaluate("toy", painter, limit=5) == first
    assert (painter / "eval/000002/toy/records.jsonl").read_text() == before


# ---- judges ----


def opened(monkeypatch, kind, **options):
    """Open a judge whose weights are stood in for."""
    if kind is EndpointJudge:
        return kind("http://127.0.0.1:1/v1" if "url" not in options else options.pop("url"), model="q", **options)
    import transformers

    class Loaded:
        from_pretrained = classmethod(lambda cls, *_, **__: torch.nn.Identity())

    for name in ("AutoProcessor", "AutoModelForZeroShotObjectDetection", "AutoModelForImageTextToText"):
        monkeypatch.setattr(transformers, name, Loaded)
    monkeypatch.setattr(detectors, "load_clip", lambda *_: None)
    return kind("x/y", "cpu", **options)


@pytest.mark.parametrize(
    ("kind", "options", "told"),
    [
        (Owlv2Judge, {"threshold": 0.5}, True),
        (LocalVlmJudge, {"max_new_tokens": 4}, True),
        (LocalVlmJudge, {"dtype": "float32"}, True),
        (EndpointJudge, {"max_tokens": 4}, True),
        (EndpointJudge, {"url": "http://127.0.0.1:2/v1"}, True),
        (EndpointJudge, {"workers": 2, "timeout": 3.0, "tries": 2, "price_in": 1.0}, False),
    ],
)
def test_a_judge_tells_what_decides_its_answers(monkeypatch, kind, options, told):
    usual, other = opened(monkeypatch, kind).describe(), opened(monkeypatch, kind, **options).describe()
    assert (usual != other) == told and json.loads(json.dumps(other)) == other


# ---- recorded answers ----


def judged_by(judge, items, pictures=None):
    lines = [Record(i.id, 0, (pictures or {}).get(i.id), {"name": judge}, {}, digest=i.digest).line() for i in items]
    return "".join(line + "\n" for line in lines)


def test_records_of_two_judges_are_not_mixed(tmp_path):
    suite, path = open_suite("geneval"), tmp_path / "records.jsonl"
    items = suite.items()[:4]
    path.write_text(judged_by("a", items) + judged_by("b", items[:2]))
    found = records.import_answers(path, suite, items)
    assert {key[0] for key in found} == {item.id for item in items[:2]}
    assert {record.judge["name"] for record in found.values()} == {"b"}
    settings = open_settings("geneval", None, limit=4, steps=["score"])
    side = Target("x", None, False, tmp_path / "out")
    path.write_text(judged_by("a", settings.items()) + judged_by("b", settings.items()[:2]))
    with pytest.raises(EvaluationError, match="no record of 2 images of geneval"):
        judge_and_score(settings, side, None, check(settings, [side], None, path), "cpu")
    path.write_text(judged_by("b", settings.items()[:2]) + judged_by("a", settings.items()))
    given = check(settings, [side], None, path)
    assert judge_and_score(settings, side, None, given, "cpu")["judge"] == {"name": "a"}


def test_a_judge_that_failed_takes_no_answer_back(tmp_path):
    """Nor does a line that broke off within a character of several bytes, as where its process was killed."""
    suite, path = open_suite("geneval"), tmp_path / "records.jsonl"
    items = suite.items()[:3]
    failed = [Record(item.id, 0, None, {"name": "a"}, error="refused").line() + "\n" for item in items[1:]]
    path.write_bytes((judged_by("a", items[:2]) + "".join(failed) + '{"item": "caf').encode() + "é".encode()[:1])
    found = records.import_answers(path, suite, items)
    assert list(found) == [(item.id, 0) for item in items[:2]] and {r.error for r in found.values()} == {None}


def test_a_result_file_that_was_replaced_is_read_again(tmp_path):
    """Files of other judges have the same name: that of the script's default, in another folder."""
    data, images = write_wise(tmp_path / "w.json", ["e", "e"]), tmp_path / "images"
    images.mkdir()
    for n in (1, 2):
        Image.new("RGB", (8, 8), (n, 0, 0)).save(images / f"{n}.png")

    def value(scores, **options):
        path = tmp_path / "scores.jsonl"
        path.write_text("".join(json.dumps({"prompt_id": n, "score": s}) + "\n" for n, s in scores.items()))
        given = {"data": data, "images": images, "judge": f"recorded:{path}", "out": tmp_path / "out"}
        return reca.evaluate("wise", "show_o_tiny", **given, **options)["overall"]["value"]

    assert [value({1: 1, 2: 1}), value({1: 0, 2: 1}), value({1: 0, 2: 1})] == [1, 0.5, 0.5]
    assert len(records.read(tmp_path / "out/records.jsonl")) == 3  # what it says as before is not said again
    with pytest.raises(EvaluationError, match=r"no answer about 1 of the 2 images of wise: 1 \(0\). Set partial=True"):
        value({2: 1})  # of image 1 it says nothing any more
    assert value({2: 1}, partial=True) == 1


def test_a_file_to_judge_by_is_read_before_anything_is_drawn(painter, tmp_path, monkeypatch):
    reca.evaluate("toy", painter, limit=5)
    lines = (painter / "eval/000002/toy/records.jsonl").read_text().splitlines()
    kept, read = tmp_path / "kept.jsonl", []
    parse = records.import_answers
    monkeypatch.setattr(records, "import_answers", lambda *given: read.append(1) or parse(*given))
    given = {"limit": 5, "judge": f"recorded:{kept}", "out": tmp_path / "out"}
    for content, message in ((lines[:3], "no answer about 2 of the 5 images of toy"), (["{}"], "no answers")):
        kept.write_text("".join(line + "\n" for line in content))
        Painter.made = 0
        with pytest.raises(EvaluationError, match=message):
            reca.evaluate("toy", painter, **given)
        assert Painter.made == 0
    kept.write_text("".join(line + "\n" for line in lines))
    assert reca.evaluate("toy", painter, **given)["counts"]["failed"] == 0 and Painter.made == 5
    read.clear()
    reca.evaluate("toy", painter, limit=5, records=kept, out=tmp_path / "other")
    assert len(read) == 1


def test_records_of_other_images_do_not_count(painter):
    reca.evaluate("toy", painter, limit=5)
    folder = painter / "eval/000002/toy"
    kept = folder.parent / "kept.jsonl"
    shutil.copy(folder / "records.jsonl", kept)
    given = {"limit": 5, "images": folder / "images", "records": kept, "out": painter / "out", "steps": ["score"]}
    assert reca.evaluate("toy", painter, **given)["counts"]["images"] == 5
    first, *_, last = sorted(folder.rglob("*.png"))
    shutil.copy(last, first)
    with pytest.raises(EvaluationError, match="no record of 1 images of toy"):
        reca.evaluate("toy", painter, **given)


def test_a_recorded_judge_is_checked_for_both_sides_before_anything_is_drawn(painter, tmp_path):
    """Answers without the hash of an image would be those of both models, with a difference of zero."""
    other, kept = tmp_path / "other", tmp_path / "kept.jsonl"
    reca.evaluate("toy", painter, limit=5)
    reca.evaluate("toy", painter, limit=5, images_per_item=2, out=other, steps=["generate"])
    lines = (painter / "eval/000002/toy/records.jsonl").read_text()
    kept.write_text(lines)
    given = {"limit": 5, "judge": f"recorded:{kept}", "out": tmp_path / "out"}
    Painter.made = 0
    with pytest.raises(EvaluationError, match="no answer about 5 of the 10 images of toy"):
        reca.evaluate("toy", painter, against=other, **given)
    kept.write_text("".join(record._replace(picture=None).line() + "\n" for record in records.read(kept)))
    with pytest.raises(EvaluationError, match="both sides the same answers"):
        reca.evaluate("toy", painter, against="base", **given)
    assert Painter.made == 0
    assert reca.evaluate("toy", painter, **given)["counts"]["images"] == 5
