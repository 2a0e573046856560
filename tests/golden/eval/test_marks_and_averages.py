"""WISE, ImgEdit, GEdit, MME, DPG-Bench and GenEval 2 against figures recorded from their public scripts."""

import json
import math

import pytest
import torch

from reca.eval.suites import Item, dpg, gedit, geneval2, imgedit, mme, wise_rules

RECORDED = {
    "dpg_file": "dpg.json",
    "geneval2_file": "geneval2.json",
    "wise_file": "wise.json",
    "imgedit_file": "imgedit.json",
    "gedit_file": "gedit.json",
    "mme_file": "mme.json",
}


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def same(ours, wanted, tolerance=1e-6):
    """Compare trees of numbers."""
    if isinstance(wanted, dict):
        assert ours.keys() == wanted.keys()
        for key in wanted:
            same(ours[key], wanted[key], tolerance)
    elif isinstance(wanted, list):
        assert len(ours) == len(wanted)
        for a, b in zip(ours, wanted, strict=True):
            same(a, b, tolerance)
    elif isinstance(wanted, float):
        assert ours == pytest.approx(wanted, abs=tolerance, rel=1e-9)
    else:
        assert ours == wanted


# ---- DPG-Bench ----


def test_dpg(dpg_file):
    for suite in read(dpg_file)["suites"]:
        wanted = suite["expect"]
        questions = dpg.read_questions(suite["table"])
        images = [
            (i["file"], i["item_id"], [{int(q): a for q, a in cell.items()} for cell in i["answers"]])
            for i in suite["images"]
        ]
        scores = dpg.score_images(questions, images)
        repeats = 4 if suite["script"] == "release" else 1  # how often the release counts a cell, of which it has one
        assert sorted(scores.failed) == sorted(wanted["failed"]), suite["name"]
        per_image = {f: {"scores": s * repeats, "average": sum(s) / len(s)} for f, s in scores.per_image.items()}
        same(per_image, wanted["per_image"])
        same(scores.level1, wanted["level1"])
        same(scores.level2, wanted["level2"])
        same(scores.final, wanted["final"])


# ---- GenEval 2 ----


class Logits:
    """A judge with the recorded logits of every question, in their order."""

    def __init__(self, cases):
        self.logits = iter([logits for item in cases["items"] for logits in item["logits"]])
        self.vocabulary, self.first = cases["vocabulary"], cases["first_token_of"]

    def first_token_probability(self, text, images, accepted):
        probabilities = torch.tensor(next(self.logits), dtype=torch.float64).softmax(0)
        return sum(float(probabilities[self.vocabulary.index(self.first[string])]) for string in accepted)


def test_geneval2(geneval2_file):
    cases, suite = read(geneval2_file), geneval2.GenEval2()
    for word, digits in cases["number_words"].items():
        assert geneval2.DIGITS.get(word, "other") == digits
    items = [
        Item(str(number), "", "", metadata=row | {"questions": row["vqa_list"]})
        for number, row in enumerate(cases["items"])
    ]
    judge = Logits(cases)
    answers = {(item.id, 0): suite.ask(judge, item, None) for item in items}
    arithmetic, geometric = cases["expect"]["soft_tifa_am"], cases["expect"]["soft_tifa_gm"]
    same(list(answers.values()), arithmetic["score_lists"])
    score = suite.score(answers, items)
    same([value.value / 100 for value in score.values], geometric["per_prompt"])
    same(score.metrics["soft_tifa_am"], arithmetic["total"])
    same(score.metrics["soft_tifa_gm"], geometric["total"])
    rows = [(row["atom_count"], row["skills"], s) for row, s in zip(cases["items"], answers.values(), strict=True)]
    analysis = geneval2.analyse(rows)
    wanted = cases["expect"]["analysis"]
    same({k: v for k, v in analysis.per_skill.items() if v is not None}, wanted["per_skill"])
    counts = {str(n): {"total": t, "accuracy": a} for n, (t, a) in analysis.per_atom_count.items() if t}
    same(counts, wanted["per_atomicity"])


def test_geneval2_without_data_and_with_foreign_data():
    analysis = geneval2.analyse([(3, ["object", "object", "count"], [1.0, 1.0, 0.0])])
    assert analysis.per_skill == {"object": 100, "attribute": None, "count": 0, "position": None, "verb": None}
    assert analysis.per_atom_count[3] == (1, 0.0) and analysis.per_atom_count[4] == (0, None)
    for row in ((2, ["object"], [1.0]), (3, ["smell"], [1.0])):
        with pytest.raises(ValueError, match="is not of GenEval 2"):
            geneval2.analyse([row])


# ---- WISE ----


def test_wise_marks(wise_file):
    cases = read(wise_file)
    for case in cases["parse_three_marks"]:
        found = wise_rules.legacy_marks(case["reply"])
        assert found == case["upstream_legacy"], case
        assert (len(found) == 3) == case["upstream_accepted"], case
    for case in cases["parse_binary"]:
        assert wise_rules.verified_mark(case["reply"]) == case["verified"].get("score"), case


def wise_rows(case, names):
    """The lines that have a prompt_id; texts stand for lines as they are, some of which are no JSON."""
    for row in (row for file in case["files"] for row in file):
        if isinstance(row, list):
            yield dict(zip(("prompt_id", *names), row, strict=True))
        elif row.startswith("{") and "prompt_id" in (parsed := json.loads(row)):
            yield parsed


@pytest.mark.parametrize("kind", ["legacy", "verified"])
def test_wise_averages(wise_file, kind):
    for case in read(wise_file)[f"aggregate_{kind}"]:
        if kind == "legacy":
            names, protocol, value = wise_rules.MARKS, wise_rules.LEGACY, wise_rules.legacy_value
            wanted = case["expect"]["upstream_legacy"]
        else:
            names, protocol, value, wanted = ["score"], wise_rules.VERIFIED, wise_rules.verified_value, case["expect"]
        means, overall = wise_rules.average(wise_rows(case, names), protocol, value)
        if wanted["aborted"]:
            assert overall is None, case["name"]
        else:
            assert {name: f"{mean:.2f}" for name, mean in means.items()} == {
                name: figures["average"] for name, figures in wanted["categories"].items()
            }, case["name"]
            assert (overall and f"{overall:.2f}") == wanted["overall"], case["name"]
        exact = case["expect"].get("exact_means", {})
        same({name: means[name] for name in exact}, exact)


# ---- ImgEdit ----


def test_imgedit(imgedit_file):
    cases = read(imgedit_file)
    for case in cases["parse"]:
        if isinstance(case["upstream"], dict):
            with pytest.raises(ValueError):
                imgedit.read_marks(case["reply"])
        else:
            assert imgedit.read_marks(case["reply"]) == case["upstream"], case
    for case in cases["sets"]:
        found = {key: mark for key, reply in case["replies"].items() if (mark := imgedit.read_marks(reply)) is not None}
        scores = imgedit.aggregate(found, case["edit_types"])
        wanted = case["expect"]
        assert found == wanted["average"] and scores.types == wanted["types_upstream"]
        assert scores.types | {"overall": scores.overall} == wanted["types_release"]
        assert scores.overall == wanted["uge_average"]


# ---- GEdit ----


def test_gedit_replies(gedit_file):
    for case in read(gedit_file)["parse"]:
        first, found = case["first_try"], gedit.viescore_object(case["reply"])
        if first["parsed"] is True:
            assert found is not None and found.get("score", "absent") == first["score"], case
        else:
            assert found is None, case


def test_gedit_items(gedit_file):
    """The last round of the public script; what it guessed is refused here."""
    for case in read(gedit_file)["evaluate"]:
        last = {"semantics": case["sc_replies"][-1], "quality": case["pq_replies"][-1]}
        guessed = case["rounds"] > 1 and any("{" not in reply or "}" not in reply for reply in last.values())
        result = case["result"]
        if isinstance(result, dict):
            with pytest.raises(ValueError):  # marks that cannot be read, or are no numbers
                gedit.read_item(last)
        elif not guessed:
            assert gedit.read_item(last) == pytest.approx(result), case


def test_gedit_statistics(gedit_file):
    cases = read(gedit_file)
    assert list(gedit.GROUPS) == cases["groups"]
    for case in cases["statistics"]:
        groups = {name: [gedit.Marked(*row) for row in rows] for name, rows in case["groups"].items()}
        for language, wanted in case["expect"].items():
            ours = gedit.statistics(groups, language)
            flat = {k: v for table in ours.values() for k, v in table.items()}
            assert not any(isinstance(v, float) and math.isnan(v) for v in flat.values())
            same(ours, wanted)


# ---- MME ----


def test_mme(mme_file):
    cases = read(mme_file)
    assert cases["tasks"] == {"Perception": mme.PERCEPTION, "Cognition": mme.COGNITION}
    for case in cases["parse"]:
        assert mme.harness_answer(case["reply"]) == case["harness"], case
        assert mme.release_answer(case["reply"]) == case["release"], case
    for case in cases["sets"]:
        rows = [mme.Answered(*row) for row in case["rows"]]
        wanted = {n.removeprefix("mme_").removesuffix("_score"): v for n, v in case["expect"]["harness"].items()}
        if any(isinstance(value, dict) for value in wanted.values()):
            with pytest.raises(ValueError, match="2 questions"):
                mme.harness(rows)
        else:
            same(mme.harness(rows), wanted)
        if "error" in case["expect"].get("release", {}):
            with pytest.raises(ValueError, match="an even number, at least 2"):
                mme.release(rows)
        elif "release" in case["expect"]:
            same(mme.release(rows), case["expect"]["release"])
