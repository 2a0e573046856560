"""Every suite from a user's files to a score: its items, its folder layout, and result files of the public scripts."""

import collections
import csv
import dataclasses
import hashlib
import json

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

import reca
from reca.data.errors import DataError
from reca.eval.errors import EvaluationError
from reca.eval.generate import image_seed
from reca.eval.suites import SUITES, open_suite
from reca.eval.suites.geneval import GenEval
from reca.eval.suites.geneval_rules import mistakes
from reca.eval.suites.pope import measures, read_answer
from tests.eval.painter import Painter

TORN = "\u00e9".encode()[:1]  # what a script that was killed while it wrote a character leaves at the end of a file
ROWS = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "colors", "include": [{"class": "cow", "count": 1, "color": "red"}], "prompt": "a photo of a red cow"},
]


@pytest.fixture
def geneval(tmp_path):
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def save(path, color="white"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), color).save(path)
    return path


def test_every_suite_says_where_its_files_are(tmp_path):
    for name in SUITES:
        suite = open_suite(name)
        assert suite.name == name and suite.protocol and suite.layout()
        if name != "toy" and suite.shipped is None:
            with pytest.raises(EvaluationError, match=f"{name} needs the benchmark's files: data='PATH'. Use "):
                suite.items()
        for folder in (tmp_path, tmp_path / "nothing") if name != "toy" else ():
            with pytest.raises(EvaluationError, match="(does not exist|cannot be read|contains no).* Use "):
                open_suite(name, folder).items()


# ---- GenEval ----


def test_the_prompts_of_geneval_are_shipped():
    """Made by the steps of GenEval's create_prompts.py from its seed; the licence lies beside them."""
    path = open_suite("geneval").shipped
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest == "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
    assert "Copyright (c) 2023 Dhruba Ghosh" in (path.parent / "LICENSE.txt").read_text()
    items = open_suite("geneval").items()
    assert collections.Counter(item.tag for item in items) == {
        "single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100,
    }  # fmt: skip
    assert [items[i].prompt for i in (0, 179, 552)] == [
        "a photo of a bench", "a photo of two clocks", "a photo of a blue pizza and a yellow baseball glove",
    ]  # fmt: skip


def test_geneval_writes_and_reads_its_layout(geneval, painter):
    suite = open_suite("geneval", geneval)
    arguments = {"suite": "geneval", "source": painter, "data": geneval}
    reca.evaluate(**arguments, steps=["generate"])
    images = painter / "eval/000002/geneval/images"
    files = sorted(str(path.relative_to(images)) for path in images.rglob("*.*"))
    assert files[:5] == ["00000/metadata.jsonl", *(f"00000/samples/{k:04d}.png" for k in range(4))] and len(files) == 10
    assert json.loads((images / "00001/metadata.jsonl").read_text()) == ROWS[1]
    # A folder that others made tells its own prompts; names begin with digits, as the public script has it.
    (images / "00001/samples/0003.png").rename(images / "00001/samples/0003.png.bak")
    save(images / "notes/samples/0000.png")
    save(images / "00001/samples/grid.png")
    items = open_suite("geneval").items_of_images(images, partial=True)
    assert [item.metadata for item in items] == ROWS and items == suite.items()
    assert len(suite.find(images, items)) == 8


def test_a_part_of_genevals_images_is_no_whole(tmp_path):
    """A generation that was stopped has images of the first tags alone, which are the easy ones."""
    suite, results, images = open_suite("geneval"), tmp_path / "results.jsonl", tmp_path / "images"
    shown = suite.items()[:3]
    for item in shown:
        save(images / suite.path(item, 0))
        (images / item.id / "metadata.jsonl").write_text(json.dumps(item.metadata))
    rows = [{"filename": f"x/{item.id}/samples/0000.png", "correct": True, "metadata": json.dumps(item.metadata)}
            for item in shown]  # fmt: skip
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"images": images, "judge": f"recorded:{results}", "out": tmp_path / "out"}
    with pytest.raises(EvaluationError, match=r"550 images of geneval are missing: 00003 \(0\)"):
        reca.evaluate("geneval", "show_o_tiny", **given)
    assert reca.evaluate("geneval", "show_o_tiny", **given, partial=True)["counts"]["missing"] == 550


def test_long_prompts_beside_a_part_of_the_images_are_no_whole(tmp_path):
    """Nothing that is shipped tells the prompts that are missing, so a part needs the list."""
    rows = [{**item.metadata, "prompt": f"At length, {item.prompt}."} for item in open_suite("geneval").items()]
    suite, data, images = open_suite("geneval_long"), tmp_path / "long.jsonl", tmp_path / "images"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = open_suite("geneval_long", data).items()
    lines = [{"filename": f"x/{item.id}/samples/0000.png", "correct": True, "metadata": json.dumps(item.metadata)}
             for item in items]  # fmt: skip
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = {"images": images, "judge": f"recorded:{tmp_path / 'results.jsonl'}", "out": tmp_path / "out"}
    for item in items[:3]:
        save(images / suite.path(item, 0))
        (images / item.id / "metadata.jsonl").write_text(json.dumps(item.metadata))
    with pytest.raises(
        EvaluationError, match=r"3 prompts that are not the 553 of geneval_long.* as data, or set partial=T"
    ):
        reca.evaluate("geneval_long", "show_o_tiny", **given)
    with pytest.raises(EvaluationError, match=r"550 images of geneval_long are missing: 00003 \(0\)"):
        reca.evaluate("geneval_long", "show_o_tiny", **given, data=data)
    for item in items[3:]:
        (images / item.id).mkdir()
        (images / item.id / "metadata.jsonl").write_text(json.dumps(item.metadata))
    assert suite.items_of_images(images) == items


def test_a_part_of_prompts_of_ones_own_is_no_whole(geneval, tmp_path):
    """Only their list tells how many there are; ids that follow each other say nothing of those after the last."""
    images, results = tmp_path / "images", tmp_path / "results.jsonl"
    geneval.write_text("".join(json.dumps(row) + "\n" for row in reversed(ROWS)))
    item, rest = open_suite("geneval", geneval).items()
    save(images / GenEval().path(item, 0))
    (images / item.id / "metadata.jsonl").write_text(json.dumps(item.metadata))
    row = {"filename": f"x/{item.id}/samples/0000.png", "correct": True, "metadata": json.dumps(item.metadata)}
    results.write_text(json.dumps(row) + "\n")
    given = {"images": images, "judge": f"recorded:{results}", "out": tmp_path / "out"}
    with pytest.raises(EvaluationError, match=r"rows of 1 prompts that are not the 553 of geneval.* as data"):
        reca.evaluate("geneval", "show_o_tiny", **given)
    with pytest.raises(EvaluationError, match=rf"1 images of geneval are missing: {rest.id}"):
        reca.evaluate("geneval", "show_o_tiny", **given, data=geneval)
    assert reca.evaluate("geneval", "show_o_tiny", **given, partial=True)["counts"]["images"] == 1


def test_geneval_scores_the_public_scripts_results(geneval, tmp_path):
    lines = [
        {"filename": f"x/images/{i:05d}/samples/{k:04d}.png", "tag": ROWS[i]["tag"], "prompt": ROWS[i]["prompt"],
         "correct": i == 0 or k == 3, "reason": "", "metadata": json.dumps(ROWS[i]), "details": "{}"}
        for i in range(2)
        for k in range(4)
    ]  # fmt: skip
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"filename": "x/im')
    with results.open("ab") as file:
        file.write(TORN)
    arguments = {"suite": "geneval", "source": "show_o_tiny", "data": geneval, "out": tmp_path / "out"}
    found = reca.evaluate(**arguments, records=results)
    assert found["overall"]["value"] == pytest.approx(0.625) and found["metrics"]["prompts"] == 1
    assert {tag: row["value"] for tag, row in found["tags"].items()} == {"single_object": 1, "colors": 0.25}
    assert found["images_per_item"] == 4 and found["judge"]["name"] == "imported:results.jsonl"
    lines[0]["metadata"] = json.dumps(ROWS[1])
    results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(
        EvaluationError, match="line 1: .* has the prompt 'a photo of a bench', but this item has another"
    ):
        reca.evaluate(**arguments, records=results)


@pytest.mark.parametrize(
    "relation, right, down", [("left of", -1, 0), ("right of", 1, 0), ("above", 0, -1), ("below", 0, 1)]
)
def test_a_position_holds_from_half_of_the_distance_on(relation, right, down):
    """A tenth of both sizes is taken off: of 10 pixels between boxes of 50 in all, 5 are left, and half is too few."""
    rule = {
        "tag": "position",
        "include": [{"class": "cow", "count": 1}, {"class": "cup", "count": 1, "position": [relation, 0]}],
    }

    def shown(distance):
        boxes = {"cow": [-15, -15, 15, 15], "cup": [-10, -10, 10, 10]}
        boxes["cup"] = [side + distance * sign for side, sign in zip(boxes["cup"], (right, down) * 2, strict=True)]
        return not mistakes({name: [{"box": box, "score": 0.9}] for name, box in boxes.items()}, rule)

    assert [shown(distance) for distance in (-100, 10, 10.1, 100)] == [False, False, True, True]


# ---- the others ----


def test_dpg(tmp_path):
    columns = "item_id text keywords proposition_id dependency category_broad category_detailed tuple"
    header = [*columns.split(), "question_natural_language"]
    with (tmp_path / "dpg_bench.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerow(["skipped", "", "", 1, 0, "", "", "x", "x"])
        for number, parent in ((1, 0), (2, 1)):
            writer.writerow(["p1", "", "", number, parent, "", "", f"entity - whole ({number})", f"question {number}?"])
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/p1.txt").write_text("a long prompt\n")
    (tmp_path / "prompts/p2.txt").write_text("a prompt that no question is about\n")
    suite = open_suite("dpg", tmp_path)
    (item,) = suite.items()
    assert item.prompt == "a long prompt" and suite.path(item, 2) == "p1_2.png"
    grid = tmp_path / "grids"
    image = Image.new("RGB", (8, 8), "white")
    image.paste("black", (4, 0, 8, 4))
    grid.mkdir()
    image.save(grid / "p1.png")

    class Judge:
        def reply(self, text, images):
            return "No." if images[0].getpixel((0, 0)) == (0, 0, 0) and "question 1" in text else "Yes."

    class Chatty:
        said = ""

        def reply(self, text, images):
            return self.said

    found = suite.find(grid, [item])
    for Chatty.said in ("**Yes**", "Yes, there is.", "```\nyes\n```", '"Yes"', "YES!", "__yes__", "yes\u3002"):
        assert suite.ask(Chatty(), item, found[item.id, 0])[0] == {"1": "yes", "2": "yes"}, Chatty.said
    for Chatty.said in ("I'm sorry, I can't help with that.", "", "Nothing", "yesterday"):
        with pytest.raises(DataError, match="reply to 'question 1.' is neither yes nor no"):
            suite.ask(Chatty(), item, found[item.id, 0])
    answer = suite.ask(Judge(), item, found[item.id, 0])
    assert [cell["1"] for cell in answer] == ["yes", "no", "yes", "yes"]
    score = suite.score({(item.id, 0): answer}, [item])
    assert score.values[0].value == 75 and score.metrics["final"] == 75
    save(tmp_path / "files/p1_0.png")
    save(tmp_path / "files/p1_1.png")
    save(tmp_path / "files/p1_3.png")  # of which p1_2.png was lost
    assert list(suite.find(tmp_path / "files", [item])) == [("p1", 0), ("p1", 1), ("p1", 3)]
    # The file of the public script beside its figures, by two processes, of which one was stopped.
    cells = ["(0, 0, 4, 4)", "(4, 0, 8, 4)"]
    lines = [f"out, a/p1.png, {cell}, question {n}?, {'no' if n == 2 else 'yes'}" for n in (1, 2) for cell in cells]
    lines += ["out, a/p2.png, (0, 0, 4, 4), question 1?, yes", "out, a"]
    (tmp_path / "r_detail.txt").write_bytes("\n".join(lines).encode() + TORN)
    imported = suite.import_answers(tmp_path / "r_detail.txt", [item])
    assert imported == {("p1", 0): [{"1": "yes", "2": "no"}] * 2}
    assert suite.score(imported, [item]).values[0].value == 50
    # At the last image it was stopped after the first cell of two.
    lines = [*lines[:4], *(f"out, a/p4.png, {cells[0]}, question {n}?, yes" for n in (1, 2))]
    (tmp_path / "r_detail.txt").write_text("\n".join(lines))
    assert suite.import_answers(tmp_path / "r_detail.txt", [item, dataclasses.replace(item, id="p4")]) == imported
    (tmp_path / "r_detail.txt").write_text("x/p1_3.png, None, question 1?, yes, it is\n")
    assert suite.import_answers(tmp_path / "r_detail.txt", [item]) == {("p1", 3): [{"1": "yes, it is"}]}
    for last, answers in (("no", {"1": "yes", "2": "no"}), ("y", {"1": "yes"})):  # cut off, or only without a line feed
        (tmp_path / "r_detail.txt").write_text(
            f"x/p1_3.png, None, question 1?, yes\nx/p1_3.png, None, question 2?, {last}"
        )
        assert suite.import_answers(tmp_path / "r_detail.txt", [item]) == {("p1", 3): [answers]}
    assert suite.score({("p1", 3): [{"1": "yes"}]}, [item]).failed
    other = dataclasses.replace(item, id="p1_1")
    save(grid / "p1_1.png")  # the grid of an item, not a picture of another
    assert list(suite.find(grid, [item, other])) == [("p1", 0), ("p1_1", 0)]


def test_geneval2(tmp_path):
    row = {"prompt": "two cats", "atom_count": 3, "skills": ["object", "count", "object"],
           "vqa_list": [["Is there a cat?", "Yes"], ["How many cats?", "two"], ["Fur?", "Yes"]]}  # fmt: skip
    file = tmp_path / "geneval2_data.jsonl"
    file.write_text(json.dumps(row | {"vqa_list": [], "skills": []}))
    suite = open_suite("geneval2", tmp_path)
    with pytest.raises(EvaluationError, match="line 1: .*a prompt with 3 atoms, 0 answers"):
        suite.items()
    file.write_text(json.dumps(row) + "\n\n")  # ends in an empty line
    (item,) = suite.items()
    asked = []

    class Judge:
        def first_token_probability(self, text, images, accepted):
            asked.append((text, accepted))
            return 0.5

    answer = suite.ask(Judge(), item, tmp_path / "x.png")
    assert asked[1] == ("How many cats? Answer in one word.", ["two", "Two", " two", " Two", "2", " 2"])
    score = suite.score({(item.id, 0): answer}, [item])
    assert score.metrics["soft_tifa_gm"] == pytest.approx(50) and score.metrics["per_skill"]["verb"] is None
    means = suite.score({(item.id, 0): [1.0, 0.5, 0.25]}, [item]).metrics
    assert (means["soft_tifa_am"], means["soft_tifa_gm"]) == pytest.approx((175 / 3, 50))
    (tmp_path / "score_lists.json").write_text(json.dumps([[1.0, 0.5, 0.25], [1]]))
    assert suite.import_answers(tmp_path / "score_lists.json", [item]) == {(item.id, 0): [1.0, 0.5, 0.25]}
    (tmp_path / "records.jsonl").write_text('{"item": "00000", "k": 0, "answer": [0.5]}\n' * 2)
    assert suite.import_answers(tmp_path / "records.jsonl", [item]) is None
    save(tmp_path / "images/any.png")
    (tmp_path / "images/image_paths.json").write_text(json.dumps({"two cats": "any.png"}))
    assert list(suite.find(tmp_path / "images", [item])) == [(item.id, 0)]


# ---- T2I-CompBench ----

# SHA-256 of its lists as copied from commit 3310c2f, six of them with CR LF
T2I_COMPBENCH = {
    "color": "1634259756dbc77d13093d907d414480080ec9790a8c97ad09efaea7b2534f2d",
    "shape": "37e1a276906c7ea9516cbd7ac8501be896006c0c17ca7344f260562834455bae",
    "texture": "fbb5363515b4a28009e360afaaaf389d2dd2289e50dbb0c6ef4ea0c7fe4f3d4f",
    "spatial": "8707a1d7e42ce3002d95363cf55f74bd043c843ae27108f5125aaaa7840ca988",
    "non_spatial": "04c56cc9ac441dc9ea6c5157652058bd1635b5308526dd31bb29a1caab9a758d",
    "complex": "1b808018b8d9916db3d47d5aa2ef18377a3549a56901a474156f799824cdf3b4",
    "3d_spatial": "c9953597315f36a5fcb41291bb19bdc6ab5f64a0fa760d691b4854a73f5d1fe9",
    "numeracy": "dad8df141604b70ba7554bec724e3db0a80023680769b5c514854ea2d2527bbe",
}


def test_the_prompts_of_t2i_compbench_are_shipped():
    suite = open_suite("t2i_compbench")
    files = {path.name: path for path in suite.shipped.glob("*_val.txt")}
    digests = {name[: -len("_val.txt")]: hashlib.sha256(p.read_bytes()).hexdigest() for name, p in files.items()}
    assert digests == T2I_COMPBENCH
    assert "Copyright (c) 2023 HKU" in (suite.shipped / "LICENSE.txt").read_text()
    items = suite.items()
    assert collections.Counter(item.tag for item in items) == dict.fromkeys(T2I_COMPBENCH, 300)
    assert len({(item.tag, item.prompt) for item in items}) == len({item.id for item in items}) == 2400
    by_id = {item.id: item for item in items}
    assert by_id["color/0299"].prompt == "a black bathroom with a black and white shower curtain"
    assert suite.path(by_id["numeracy/0001"], 9) == "numeracy/samples/six airplanes_000019.png"


def test_t2i_compbench_tells_equal_prompts_apart(tmp_path):
    """Older lists have prompts that come twice; the digits say which of them an image is of."""
    (tmp_path / "color_val.txt").write_text("a cow\na red cow\na cow\n")
    suite = open_suite("t2i_compbench", tmp_path)
    items = suite.items()
    saved = {(item.id, k): save(tmp_path / "images" / suite.path(item, k)) for item in items for k in range(2)}
    assert suite.find(tmp_path / "images", items) == saved


def test_t2i_compbench(tmp_path):
    (tmp_path / "color_val.txt").write_text("a red bench\na green/blue cow\n")
    suite = open_suite("t2i_compbench", tmp_path)
    items = suite.items()
    assert suite.path(items[1], 3) == "color/samples/a green blue cow_000013.png"
    for item in items:
        for k in range(2):
            save(tmp_path / "images" / suite.path(item, k))
    assert sorted(suite.find(tmp_path / "images", items)) == [(i.id, k) for i in items for k in range(2)]
    (tmp_path / "theirs/color/annotation_blip").mkdir(parents=True)
    rows = [{"question_id": n, "answer": str(n / 100)} for n in (0, 1, 10)]
    (tmp_path / "theirs/color/annotation_blip/vqa_result.json").write_text(json.dumps(rows))
    answers = suite.import_answers(tmp_path / "theirs", items)
    assert answers == {("color/0000", 0): 0.0, ("color/0000", 1): 0.01, ("color/0001", 0): 0.1}
    assert suite.score(answers, items).metrics["categories"]["color"] == pytest.approx(0.11 / 3)


@pytest.mark.parametrize("by_place", [True, False])
@pytest.mark.parametrize("numbering", ["ours", "one after another"])
def test_t2i_compbench_reads_answers_about_other_numbers_of_images(tmp_path, numbering, by_place):
    (tmp_path / "color_val.txt").write_text("a red bench\na blue cow\na green cat\n")
    suite = open_suite("t2i_compbench", tmp_path)
    items = suite.items()
    images = []
    for n, item in enumerate(items):
        for k in range(4):
            number = 10 * n + k if numbering == "ours" else 4 * n + k
            images.append((save(tmp_path / f"theirs/color/samples/{item.prompt}_{number:06d}.png"), (item.id, k)))
    digits = [int(image.stem[-6:]) for image, _ in images]
    rows = [{"question_id": n if by_place else digits[n], "answer": n} for n in range(len(images))]
    (tmp_path / "theirs/color/annotation_blip").mkdir()
    (tmp_path / "theirs/color/annotation_blip/vqa_result.json").write_text(json.dumps(rows))
    found = suite.import_answers(tmp_path / "theirs", items)
    assert found == {key: n for n, (_, key) in enumerate(images)}
    assert suite.import_answers(tmp_path / "theirs", items[1:]) == {key: n for key, n in found.items() if n >= 4}
    if numbering == "ours" and not by_place:  # a lost image moves no other
        images[0][0].unlink()
        found = suite.import_answers(tmp_path / "theirs", items)
        assert found == {key: n for n, (_, key) in enumerate(images) if n > 0}


def test_t2i_compbench_reads_the_file_that_counts(tmp_path):
    suite = open_suite("t2i_compbench")
    items = [item for item in suite.items() if item.tag in ("color", "complex")]

    def add(folder, answer):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "vqa_result.json").write_text(json.dumps([{"question_id": 0, "answer": answer}]))

    for part in ("blip", "clip", "obj_detection"):
        add(f"complex/annotation_{part}", 0.1)
    with pytest.raises(EvaluationError, match="complex contains annotation_blip.*expected one in annotation_3_in_1"):
        suite.import_answers(tmp_path, items)
    add("complex/annotation_3_in_1", 0.9)
    add("color/annotation_blip", 0.5)
    add("color/annotation1_blip/VQA/result", 0.2)  # of a noun phrase
    assert suite.import_answers(tmp_path, items) == {("complex/0000", 0): 0.9, ("color/0000", 0): 0.5}
    add("color/annotation_clip", 0.3)
    with pytest.raises(EvaluationError, match="color contains annotation_blip.*annotation_clip.*; expected one. Keep"):
        suite.import_answers(tmp_path, items)


def test_wise_protocols_are_two_suites(tmp_path):
    rows = [{"prompt_id": n, "Prompt": "p", "Explanation": "e", "Category": "c"} for n in (1, 560)]
    (tmp_path / "w.json").write_text(json.dumps(rows))
    verified, legacy = (open_suite(name, tmp_path / "w.json") for name in ("wise", "wise_legacy"))
    assert [item.tag for item in verified.items()] == ["CULTURE", "SPACE"]
    assert [item.tag for item in legacy.items()] == ["CULTURE", "TIME"]
    reply = "Consistency: 2\nRealism: 1\nAesthetic Quality: 0"
    (value,) = legacy.score({("1", 0): reply}, legacy.items()).values
    assert value.value == pytest.approx(0.8)
    score = verified.score({("1", 0): reply, ("560", 0): {"prompt_id": 560, "score": 1}}, verified.items())
    assert (
        [v.value for v in score.values] == [1] and score.failed[0][0] == ("1", 0) and score.metrics["overall"] is None
    )
    lines = tmp_path / "scores.jsonl"
    lines.write_bytes(b'{"prompt_id": 560, "score": 0}\n{"prompt_id": 1, "sc' + TORN)
    assert verified.import_answers(lines, verified.items()) == {("560", 0): {"prompt_id": 560, "score": 0}}


@pytest.mark.parametrize(("name", "good"), [("wise", "Score: 1"), ("wise_legacy", "2\n2\n2")])
def test_wise_weighs_its_categories_if_all_were_judged(tmp_path, name, good):
    rows = [{"prompt_id": n, "Prompt": "p", "Explanation": "e", "Category": "c"} for n in range(1000, 0, -1)]
    (tmp_path / "w.json").write_text(json.dumps(rows))
    suite = open_suite(name, tmp_path)
    items = suite.items()
    assert [item.id for item in items] == [str(n) for n in range(1, 1001)]
    bad = good.replace("1", "0").replace("2", "0")
    answers = {(item.id, 0): good if item.tag == "CULTURE" else bad for item in items}
    found = suite.score(answers, items)
    assert found.weights["CULTURE"] == 0.4 and sum(found.weights.values()) == pytest.approx(1)
    assert found.metrics["overall"] == pytest.approx(0.4) and found.metrics["categories"]["TIME"] == 0
    some = [item for item in items if item.tag != "TIME"]
    found = suite.score(answers, some)
    assert found.weights is None and found.metrics["overall"] is None and len(found.values) == len(some)
    lost = suite.score({key: answer for key, answer in answers.items() if key[0] != "1"}, items)
    assert lost.metrics["overall"] is None


def test_imgedit(tmp_path):
    source = save(tmp_path / "Benchmark/singleturn/animal/1.jpg")
    table = {"7": {"id": "animal/1.jpg", "prompt": "make it blue", "edit_type": "adjust"}}
    (tmp_path / "Benchmark/singleturn/singleturn.json").write_text(json.dumps(table))
    (tmp_path / "judge_prompt.json").write_text(json.dumps({"adjust": "Judge: <edit_prompt>"}))
    suite = open_suite("imgedit", tmp_path)
    (item,) = suite.items()
    assert item.source == source
    (tmp_path / "judge_prompt.json").write_text(json.dumps({"adjust": "Judge again: <edit_prompt>"}))
    (other,) = suite.items()
    assert other.input_digest == item.input_digest and other.digest != item.digest  # judged again, not edited again

    class Judge:
        def reply(self, text, images):
            assert (text, images) == ("Judge: make it blue", [source, tmp_path / "7.png"])
            return "A: 4\nB: 5\nC: 5"

    answer = suite.ask(Judge(), item, tmp_path / "7.png")
    assert suite.score({("7", 0): answer}, [item]).metrics == {"types": {"adjust": 4.67}, "overall": 4.67}
    (tmp_path / "result.json").write_text(json.dumps({"7": answer, "8": {"error": "x"}}))
    assert suite.import_answers(tmp_path / "result.json", [item]) == {("7", 0): answer}
    lines = tmp_path / "result.jsonl"  # of the release: made again after a stop, and half-written at the end
    made = "".join(json.dumps({"key": "7", "result": r}) + "\n" for r in ("x", answer)) + '{"k'
    lines.write_bytes(made.encode() + TORN)
    assert suite.import_answers(lines, [item]) == {("7", 0): answer}


def test_gedit(tmp_path):
    save(tmp_path / "images/a.png")
    rows = [
        {"key": f"k{n}", "task_type": "ps_human", "instruction": "smile", "instruction_language": language,
         "Intersection_exist": True, "source": "images/a.png"}
        for n, language in enumerate(("en", "cn"))
    ]  # fmt: skip
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    suite = open_suite("gedit", tmp_path)
    (item,) = suite.items()
    assert suite.path(item, 0) == "fullset/ps_human/en/k0.png"
    assert list(suite.companions(item)) == ["fullset/ps_human/en/k0_SRCIMG.png"]
    result = tmp_path / "k0.png"
    Image.new("L", (9, 9)).save(result)

    class Judge:
        def reply(self, text, images):
            assert images[-1].size == (4, 4) and images[-1].mode == "RGB"
            return '{"score": [8, 6]}' if "smile" in text else '{"score": [4]}'

    answer = suite.ask(Judge(), item, result)
    score = suite.score({("k0", 0): answer}, [item])
    assert score.values[0].value == pytest.approx(24**0.5)
    assert score.metrics["quality"]["ps_human"] == 4 and score.metrics["overall"]["avg_overall"] is None
    # A reply without marks fails: the public script would draw a random one.
    failed = suite.score({("k0", 0): answer | {"quality": "very good"}}, [item]).failed
    assert "about quality contains no marks: 'very good'" in failed[0][1]
    path = tmp_path / "theirs/m_ps_human_gpt_score.csv"
    path.parent.mkdir()
    path.write_bytes(
        b"source_image,edited_image,instruction,sementics_score,quality_score,intersection_exist,instruction_language\n"
        b"s,/x/k0.png,smile,9,4,True,en\ns,/x/k0.png,smile" + TORN
    )
    imported = suite.import_answers(path.parent, [item])
    assert suite.score(imported, [item]).values[0].value == 6


def test_gedit_as_the_hub_has_it(tmp_path):
    save(tmp_path / "a.png", "red")
    row = {
        "key": "k0", "task_type": "ps_human", "instruction": "smile", "instruction_language": "en",
        "Intersection_exist": True, "input_image": {"bytes": b"", "path": None},
        "input_image_raw": {"bytes": (tmp_path / "a.png").read_bytes(), "path": None},
    }  # fmt: skip
    (tmp_path / "data").mkdir()
    table = tmp_path / "data/train-00000-of-00001.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([row, row | {"key": "k1", "instruction_language": "cn"}]), table)
    (item,) = open_suite("gedit", tmp_path).items()
    assert (item.id, item.prompt, item.metadata["intersection"]) == ("k0", "smile", True)
    assert item.source.read_bytes() == (tmp_path / "a.png").read_bytes()
    table.unlink()
    assert open_suite("gedit", tmp_path).items() == [item]  # the tables are read once
    (tmp_path / "items.jsonl").unlink()
    table.write_bytes(b"PAR1")
    with pytest.raises(EvaluationError, match=r"is not a table of GEdit-Bench .*hf download"):
        open_suite("gedit", tmp_path).items()
    assert not (tmp_path / "items.jsonl").exists()


class Answerer(Painter):
    abilities, longest = frozenset({"answer"}), set()

    def answer(self, images, questions, max_new_tokens=100):
        self.longest.add(max_new_tokens)
        Painter.made += len(images)
        return ["Yes, it does." if "red" in question else "no" for question in questions]


def test_mme_and_pope_by_the_models_own_answers(tmp_path, painter, monkeypatch):
    from reca.eval import targets

    monkeypatch.setattr(targets.Target, "load", lambda *_: Answerer())
    for number in range(2):
        save(tmp_path / f"mme/color/{number}.png")
        truth = ("Yes", "No") if number == 0 else ("No", "No")
        lines = [f"Is it {c}? Please answer yes or no.\t{t}" for c, t in zip(("red", "blue"), truth, strict=True)]
        (tmp_path / f"mme/color/{number}.txt").write_text("\n\n".join(lines) + "\n")
    found = reca.evaluate("mme", painter, data=tmp_path / "mme")
    assert found["overall"]["value"] == pytest.approx((200 + 50) / 2) and found["overall"]["unit"] == "points"
    assert found["metrics"] == {"perception": 125, "cognition": None}
    wrong = "Is it red? Please answer yes or no. -> Yes, it does."
    assert [image["reason"] for row in found["items"] for image in row["images"]] == ["", wrong]
    assert len((painter / "eval/000002/mme/answers.jsonl").read_text().splitlines()) == 4 and Painter.made == 4
    reca.evaluate("mme", painter, data=tmp_path / "mme")
    assert Painter.made == 4
    half = reca.evaluate("mme", painter, data=tmp_path / "mme", limit=1)  # of images, with both questions
    assert half["counts"]["items"] == 1 and half["overall"]["value"] == 200
    short = {"sampling": {"max_new_tokens": 5}, "out": tmp_path / "short"}
    assert reca.evaluate("mme", painter, data=tmp_path / "mme", **short)["sampling"]["max_new_tokens"] == 5
    assert Answerer.longest == {16, 5}

    save(tmp_path / "pope/val2014/1.jpg")
    for category in ("random", "popular", "adversarial"):
        rows = [{"question_id": n, "image": "1.jpg", "text": f"Is there a {c}?", "label": "yes"}
                for n, c in enumerate(("red car", "cup"))]  # fmt: skip
        (tmp_path / f"pope/coco_pope_{category}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = reca.evaluate("pope", painter, data=tmp_path / "pope")
    assert found["overall"]["value"] == 0.5 and found["metrics"]["mean_f1"] == pytest.approx(2 / 3)
    assert [image["reason"] for row in found["items"] for image in row["images"]] == ["", "no"] * 3
    (tmp_path / "pope/val2014/1.jpg").unlink()
    with pytest.raises(EvaluationError, match=r"1 of the 1 input images of pope do not exist: .*1.jpg. Use a"):
        reca.evaluate("pope", painter, data=tmp_path / "pope", out=tmp_path / "again")
    beside = save(tmp_path / "pope/1.jpg")  # of the questions
    assert {item.source for item in open_suite("pope", tmp_path / "pope").items()} == {beside}


@pytest.mark.parametrize("behind", ["", " Answer the question using a single word or phrase."])
def test_mme_reads_the_files_of_its_script_and_of_the_release(tmp_path, behind):
    save(tmp_path / "mme/color/0.jpg")
    (tmp_path / "mme/color/0.txt").write_text("Is it red?\tYes\nIs it red? Or blue?\tNo\n")
    suite = open_suite("mme", tmp_path / "mme")
    (tmp_path / "theirs").mkdir()
    rows = [("Is it red? Or blue?", "No", "no"), ("Is it red?", "Yes", "yes\tit is"), ("Is it green?", "Yes", "yes")]
    lines = [f"0.jpg\t{question}{behind}\t{truth}\t{reply}\n" for question, truth, reply in rows]
    (tmp_path / "theirs/color.txt").write_bytes("".join(lines).encode() + b"0.jpg\tIs it" + TORN)
    found = suite.import_answers(tmp_path / "theirs", suite.items())
    assert found == {("color/0/1", 0): "no", ("color/0/0", 0): "yes\tit is"}
    for last, count in (("yes", 2), ("Ye", 1), ("", 1)):  # cut off, or only without a line feed
        (tmp_path / "theirs/color.txt").write_text(f"{lines[0]}0.jpg\tIs it red?{behind}\tYes\t{last}")
        assert len(suite.import_answers(tmp_path / "theirs", suite.items())) == count


@pytest.mark.parametrize("names", [("question", "answer"), ("prompt", "text")])
def test_pope_reads_the_answers_of_its_script_and_of_llavas(names, tmp_path):
    asked = ["Is there a cup?", "Is there a cup on it?", "Is there a cup?"]
    for category in ("random", "popular"):
        rows = [{"question_id": n, "image": f"{n}.jpg", "text": text, "label": "yes"} for n, text in enumerate(asked)]
        (tmp_path / f"coco_pope_{category}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    suite, theirs = open_suite("pope", tmp_path), tmp_path / "theirs/random.jsonl"
    theirs.parent.mkdir()
    lines = [json.dumps(dict(zip(names, (f"{text}\nAnswer in a word.", reply), strict=True))) + "\n"
             for text, reply in zip(asked, ("No.", "yes\u2028no", ""), strict=True)]  # fmt: skip
    theirs.write_bytes("".join([lines[0], lines[1][:20] + "\n", lines[2]]).encode() + lines[1][:20].encode() + TORN)
    found = {("random/0", 0): "No.", ("random/2", 0): ""}
    for path in (theirs, theirs.parent):
        assert suite.import_answers(path, suite.items()) == found
    assert suite.import_answers(theirs, suite.items()[2:]) == {("random/2", 0): ""}
    assert suite.import_answers(tmp_path / "coco_pope_random.json", suite.items()) is None  # questions, no answers
    for wrong, line in ((lines[1:], 1), ([*lines, lines[0]], 4)):
        theirs.write_text("".join(wrong))
        with pytest.raises(EvaluationError, match=f"random.jsonl, line {line}, answers 'Is there a cup"):
            suite.import_answers(theirs, suite.items())
    theirs.write_text("".join(lines))
    given = {"records": theirs.parent, "out": tmp_path / "out", "steps": ["score"]}
    scored = reca.evaluate("pope", "show_o_tiny", data=tmp_path, **given, partial=True)
    assert scored["metrics"]["random"]["accuracy"] == pytest.approx(2 / 3) and scored["counts"]["missing"] == 3
    (theirs.parent / "other_random.jsonl").touch()
    with pytest.raises(EvaluationError, match="theirs contains other_random.jsonl, random.jsonl; keep only the one"):
        suite.import_answers(theirs.parent, suite.items())


def test_the_rule_of_pope():
    assert [read_answer(reply) for reply in ("No, none", "There is not. Yes", "yes", "Know", "no")] == [
        "no", "no", "yes", "yes", "no",
    ]  # fmt: skip
    assert measures([("yes", "yes"), ("yes", "no"), ("no", "no"), ("no", "yes")]) == {
        "accuracy": 0.5, "precision": 0.5, "recall": 0.5, "f1": 0.5, "yes": 0.5,
    }  # fmt: skip
    assert measures([("no", "yes")]) == {"accuracy": 0, "precision": None, "recall": 0, "f1": 0, "yes": 0}


# ---- edits ----


def test_edits_depend_on_their_item_and_lie_beside_their_source(tmp_path, painter, monkeypatch):
    from reca.eval import checks, evaluation, targets

    class Editor(Painter):
        abilities, strengths = frozenset({"edit"}), []

        def edit(self, images, instructions, seeds, *, strength: float = 1.0):
            self.strengths.append(strength)
            return [
                image + torch.tensor(seed % 7, dtype=torch.uint8) for image, seed in zip(images, seeds, strict=True)
            ]

    test_gedit(tmp_path)
    row = json.loads((tmp_path / "items.jsonl").read_text().splitlines()[0])
    save(tmp_path / "images/b.png", (10, 20, 30))
    with (tmp_path / "items.jsonl").open("a") as file:
        file.write(json.dumps(row | {"key": "k2", "source": "images/b.png"}) + "\n")
    monkeypatch.setattr(targets.Target, "load", lambda *_: Editor())
    for module in (checks, evaluation):
        monkeypatch.setattr(module, "umm_package", lambda _: type("package", (), {"Adapter": Editor}))
    reca.evaluate("gedit", painter, data=tmp_path, steps=["generate"], sampling={"strength": 0.5})
    made = {path.name: path for path in (painter / "eval/000002/gedit/images").rglob("*.png")}
    assert sorted(made) == ["k0.png", "k0_SRCIMG.png", "k2.png", "k2_SRCIMG.png"] and Editor.strengths == [0.5]
    for item in open_suite("gedit", tmp_path).items():
        source, edited = (torch.from_numpy(np.array(Image.open(p))) for p in (item.source, made[f"{item.id}.png"]))
        assert torch.equal(edited, source + torch.tensor(image_seed("gedit", item.id, 0) % 7, dtype=torch.uint8))
        assert made[f"{item.id}_SRCIMG.png"].read_bytes() == item.source.read_bytes()
