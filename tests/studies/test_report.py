"""What the report of a study says, from results that are given."""

import io
import json

import pytest
from tqdm import tqdm

from reca.demo.measure import Rate
from reca.processes import side_by_side
from reca.studies import report, runner
from reca.studies.plan import plan
from reca.studies.study import StudyError, load_study
from reca.studies.task import Asked

STUDY = """
question: Does it help?
toy: Too small.
paper: [{says: it does, source: Table 0}]
variants:
  RECA: {about: images alone}
  SFT: {about: captions, toy: {bagel: []}}
  SFT-RECA: {about: one after the other, after: SFT}
claims:
  - {says: it helps, measure: seen, variant: RECA, than: before}
  - {says: captions help, measure: seen, variant: SFT, than: before}
"""


def summary(tmp_path, results):
    (tmp_path / "a.yaml").write_text(STUDY)
    study, asked = load_study(str(tmp_path / "a.yaml")), Asked("show_o", (0,), tmp_path / "out")
    tasks, omitted = plan(study, asked)
    return report.summarize(study, asked, "reca study a", tasks, results, omitted)


def measured(hits, **more):
    measures = {"seen": {"value": float(hits), "hits": hits, "trials": 100}, **more}
    return {"measures": measures, "curve": [], "seconds": 1.0}


def test_the_text_has_every_mean_and_claim_and_why_variants_are_missing(tmp_path):
    tag = {"value": 7.0, "interval": [6.0, 8.0]}
    ready = {"measures": {}, "curve": [], "seconds": 1.0}
    results = {"0/pretrained": ready, "0/RECA": measured(90, **{"toy/tag": tag}), "0/before": measured(50)}
    found = summary(tmp_path, results)
    assert found["setting"] == "toy" and found["dataset"] == "shapes" and found["toy"] == "Too small."
    assert found["failed"] == []
    means = {variant["name"]: variant["means"]["seen"] for variant in found["variants"]}
    for name, hits in (("before", 50), ("RECA", 90)):
        interval = [100 * bound for bound in Rate(hits, 100).wilson()]
        assert means[name] == {"value": hits, "interval": pytest.approx(interval)}
    assert found["omitted"] == {
        "SFT": "show_o has no such variant on the toy dataset 'shapes'",
        "SFT-RECA": "it continues from SFT",
    }
    lines = report.text(found).splitlines()
    assert lines[0].split() == ["seen"]  # measures of single tags are on no line
    assert [line.split() for line in lines[1:3]] == [
        ["before", "50.0", "[40.4,", "59.6]"],
        ["RECA", "90.0", "[82.6,", "94.5]"],
    ]
    assert lines[3:] == [
        "not with show_o: SFT (show_o has no such variant on the toy dataset 'shapes')",
        "not with show_o: SFT-RECA (it continues from SFT)",
        "",
        "the paper: it does (Table 0)",
        "agrees: it helps: RECA - before, seen +40.0 [+27.8, +50.6]",
        "not measured: captions help: SFT - before",
    ]


def test_the_page_has_curves_and_the_images_of_the_first_seed(tmp_path):
    from PIL import Image

    results = {"0/pretrained": {"failed": "OSError: no space"}, "0/RECA": measured(90)}
    results["0/before"] = {"failed": "ValueError: no"}
    results["0/RECA"]["curve"] = [(10, 2.0), (20, 1.0)]
    found = summary(tmp_path, results)
    assert found["failed"] == ["0/pretrained: OSError: no space"]
    assert {"0/pretrained: OSError: no space", "before, seed 0: ValueError: no"} <= set(report.text(found).splitlines())
    variant = found["variants"][1]
    folder = tmp_path / variant["results"][0]["folder"]
    folder.mkdir(parents=True)
    Image.new("RGB", (6, 2)).save(folder / "images.png")
    (folder / "images.json").write_text('[{"prompt": "a red square", "hit": true}]')
    shown = report._images(found)
    assert shown[""] == [{"prompt": "a red square", "hit": True}] and shown.keys() == {"", "RECA"}
    assert shown["RECA"]["width"] == 6 * report.ENLARGED and shown["RECA"]["source"].startswith("data:image/png")
    assert report._chart(variant) is not None and report._chart(found["variants"][0]) is None
    report.write(found, tmp_path)
    page = (tmp_path / "study.html").read_text()
    assert "a red square" in page and shown["RECA"]["source"] in page and "82.6" in page
    for damaged in ("", "{", "3", '{"prompt": "a"}', "[{}]", '[{"prompt": null}]', "[" * 100_000):
        (folder / "images.json").write_text(damaged)
        with pytest.raises(StudyError, match=f"{folder}/images.json has no list of prompts: remove .*/images.png"):
            report._images(found)
    variant["results"][0]["failed"] = "it"
    assert report._images(found) == {}


@pytest.mark.parametrize(
    ("value", "interval", "written"),
    [(0.5, [0.4, None], "0.500"), (0.5, [None, 0.6], "0.500"), (1.0, [1.0, 1.0], "1.0 [1.0, 1.0]")],
)
def test_a_half_known_interval_is_left_out(value, interval, written):
    """Of a suite whose scores have a bound on one side only."""
    assert report.cell({"value": value, "interval": interval}) == written


@pytest.mark.parametrize(
    "value, low, high, written",
    [
        (85.0, 81.74, 87.66, "85.0 [81.7, 87.7]"),
        (0.0113, 0.00894, 0.0141, "0.0113 [0.0089, 0.0141]"),
        (0.386, 0.37, 0.41, "0.386 [0.370, 0.410]"),
        (0.0, 0.0, 0.3, "0.0 [0.0, 0.3]"),
        (0.5, None, None, "0.500"),
        (float("nan"), None, None, "nan"),
    ],
)
def test_an_interval_has_the_digits_of_its_value(value, low, high, written):
    assert report.cell({"value": value, "interval": [low, high]}) == written


def test_a_difference_is_written_with_its_sign():
    gap = {"difference": -0.725, "interval": [-3.217, 1.741]}
    assert report.change(gap) == "-0.7 [-3.2, +1.7]"
    assert report.change({"difference": -0.29, "interval": [None, None]}) == "-0.290 (no interval)"
    assert report.change({"difference": None}) == ""


@pytest.mark.parametrize(
    "result, written",
    [
        ({"failed": "ValueError: no"}, "FAILED, ValueError: no"),
        ({"measures": {}, "seconds": 61.2}, "ready (61 s)"),
        (measured(90.0, **{"toy/tag": {"value": 7.0}}, loss={"value": 0.12345}), "seen 90, loss 0.123 (1 s)"),
    ],
)
def test_a_task_is_said_in_one_line(result, written):
    assert runner.line(result) == written


@pytest.fixture
def pretrained(tmp_path):
    """A study whose pre-training is done, with its tasks."""
    (tmp_path / "a.yaml").write_text(STUDY)
    study, asked = load_study(str(tmp_path / "a.yaml")), Asked("show_o", (0,), tmp_path / "out")
    tasks = plan(study, asked)[0]
    tasks[0].result.parent.mkdir(parents=True)
    tasks[0].result.write_text('{"measures": {}, "curve": [], "seconds": 1.0}')
    return study, asked, tasks


def test_what_is_done_is_neither_run_nor_waited_for(pretrained, monkeypatch):
    study, asked, (_, variant, _) = pretrained
    said, waits_for, counted, bars = [], {}, [], []

    def bar(**given):
        bars.append(tqdm(**given | {"disable": False, "file": io.StringIO()}))
        return bars[0]

    def run(jobs, slots, on_end, on_wait, on_start):
        for step in (0, 60, 140, 300):  # a run that is resumed with more steps than the recipe has now
            variant.folder.mkdir(parents=True, exist_ok=True)
            (variant.folder / ".steps").write_text(str(step))
            on_wait()
            counted.append(bars[0].n)
        for job in jobs:
            waits_for[job.name] = job.after
            on_end(job, measured(90))

    monkeypatch.setattr(runner, "check", lambda *_, **__: None)
    monkeypatch.setattr(runner, "COUNT_SECONDS", -1)
    monkeypatch.setattr(runner, "tqdm", bar)
    monkeypatch.setattr(side_by_side, "run", run)
    found = runner.run(study, asked, [None], "reca study a", said.append)
    assert waits_for == {"0/RECA": (), "0/before": ()}
    assert said == ["1 of 3 tasks were already done", "0/RECA: seen 90 (1 s)", "0/before: seen 90 (1 s)"]
    assert bars[0].total == 200 and counted == [0, 60, 140, 200]
    assert json.loads((report.folder(study, asked) / "study.json").read_text()) == json.loads(json.dumps(found))


def test_a_report_tells_what_has_not_run(pretrained):
    study, asked, _ = pretrained
    found = runner.report_of(study, asked, "reca study a --report")
    assert {v["name"]: v["results"][0]["failed"] for v in found["variants"]} == dict.fromkeys(
        ("before", "RECA"), "not run yet"
    )
    assert found["failed"] == [] and (report.folder(study, asked) / "study.html").is_file()
