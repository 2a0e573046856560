"""A study of two variants from its file to its page, what is done twice, and what its figures are taken to say."""

import errno
import json
import os
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

from reca import exits
from reca.cli import main
from reca.config.recipe_files import load_recipe, save_recipe
from reca.demo import experiment
from reca.demo.measure import measure
from reca.estimate.meta_model import build_meta
from reca.models import UMMS, umm_package
from reca.optim.trained import freeze
from reca.options.fields import RecipeError
from reca.processes import side_by_side
from reca.processes.side_by_side import Failure
from reca.studies import judge, published, report, runner, toy, work
from reca.studies.check import check
from reca.studies.plan import plan
from reca.studies.study import Claim, StudyError, load_study, study_names
from reca.studies.task import Asked, Evaluations, Task
from reca.toy_datasets.dataset import load_dataset

SCALE = ["--scale", "0.004"]
PUBLISHED = ("show_o_512", "harmon_1_5b", "open_uni_l_512", "bagel_7b", "janus_pro_1b", "janusflow_1_3b")
CLAIM = "says: x, measure: y, variant: a, than: before"
STUDY = """
question: Does it run?
paper: [{says: it does, source: Table 0}]
variants:
  RECA: {about: images alone}
  SFT: {about: captions, overrides: [objective.reca.weight=0, objective.t2i.weight=1],
        toy: ["data.captions={unlabeled}&caption_detail=full"]}
  SFT-RECA: {about: one after the other, after: SFT}
  never: {about: not with this model, toy: {bagel: [model.hv_source=vae]}}
claims:
  - {says: they draw alike, measure: {toy: seen, published: toy}, variant: RECA, than: SFT, expect: equal, margin: 100}
  - {says: it needs a thousand images, measure: {published: toy}, variant: RECA, than: before}
"""


@pytest.fixture
def study(tmp_path):
    path = tmp_path / "does_it_run.yaml"
    path.write_text(STUDY)
    return str(path)


@pytest.fixture
def in_this_process(monkeypatch):
    """Make the jobs one after the other, here. Returns the names of those that were made."""
    made = []

    def run(jobs, slots, on_end, on_wait, on_start):
        for job in jobs:
            on_start(job)
            made.append(job.name)
            on_wait()
            try:
                on_end(job, job.work(*job.given))
            except Exception as error:
                on_end(job, Failure(error))

    monkeypatch.setattr(side_by_side, "run", run)
    return made


def test_two_variants_run_once_and_make_a_page(study, tmp_path, in_this_process, monkeypatch, capsys):
    command = ["study", study, "--out", str(tmp_path / "out"), *SCALE]
    assert main(command) == 0
    assert in_this_process == ["0/pretrained", "0/RECA", "0/SFT", "0/SFT-RECA", "0/before"]
    printed = capsys.readouterr().out
    assert "not with show_o: never (show_o has no such variant on the toy dataset 'shapes')" in printed
    page = tmp_path / "out/does_it_run-show_o-shapes/study.html"
    assert printed.splitlines()[-1] == str(page)
    text = page.read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", text) and "Its figures mean nothing" in text and "Table 0" in text

    found = json.loads(page.with_suffix(".json").read_text())
    assert [variant["name"] for variant in found["variants"]] == ["before", "RECA", "SFT", "SFT-RECA"]
    for variant in found["variants"]:
        measures = variant["results"]["0"]["measures"]
        assert {"overall", "seen", "held-out", "understanding"} <= measures.keys()
        assert ("loss" in measures) == (variant["name"] != "before")
    verdicts = [(claim["verdict"], claim["measure"]) for claim in found["claims"]]
    assert verdicts == [("agrees", "seen"), ("not measured", None)] and found["verdict"] == "agrees in part"
    second = found["variants"][3]["results"]["0"]["folder"]
    first = found["variants"][2]["results"]["0"]["folder"]
    assert load_recipe(f"{second}/recipe.yaml").train.init_from == str(Path(first).resolve())

    # Nothing is left to do; an variant that was trained but not measured is not trained again.
    assert main(command) == 0
    assert in_this_process[5:] == []
    next(Path(first).glob("measured-*.json")).unlink()
    monkeypatch.setattr(work, "Trainer", None)
    assert main(command) == 0
    assert in_this_process[5:] == ["0/SFT"]
    assert json.loads(page.with_suffix(".json").read_text())["variants"] != []
    assert main([*command, "--task", "0/SFT"]) == 0
    assert "0/SFT: overall " in capsys.readouterr().out

    # Another study has the variants that are the same, and a changed variant is another one.
    other = tmp_path / "other.yaml"
    other.write_text(STUDY.replace("RECA:", "same:").replace("variant: RECA", "variant: same"))
    asked = Asked("show_o", (0,), tmp_path / "out", scale=0.004)
    done = {task.variant: work.done(task) is not None for task in plan(load_study(str(other)), asked)[0]}
    assert done == {"pretrained": True, "same": True, "SFT": True, "SFT-same": True, "before": True}
    changed = Asked("show_o", (0,), tmp_path / "out", scale=0.004, of_variant={"SFT": ("optim.lr=0.5",)})
    done = {task.variant: work.done(task) is not None for task in plan(load_study(study), changed)[0]}
    assert done == {"pretrained": True, "RECA": True, "SFT": False, "SFT-RECA": False, "before": True}


def test_a_variant_may_be_longer_than_the_others(tmp_path):
    def steps(**given):
        asked = Asked("show_o", (0,), tmp_path, **given)
        tasks = {task.variant: task for task in plan(load_study("seen"), asked)[0]}
        return [work.steps(tasks[name]) for name in ("RECA", "replay", "longer")]

    assert steps() == [200, 200, 400] and steps(scale=0.1) == [20, 20, 40]
    assert steps(common=("train.steps=300",)) == [300, 300, 600]
    assert steps(of_variant={"longer": ("train.steps=7",)}) == [200, 200, 7]


@pytest.mark.parametrize("umm, usual", [("show_o", 4e-3), ("open_uni", 2e-3)])
def test_a_variant_may_have_another_rate_than_the_others(umm, usual, tmp_path):
    def rates(**given):
        asked = Asked(umm, (0,), tmp_path, dataset="emoji", **given)
        tasks = {task.variant: task for task in plan(load_study("limits"), asked)[0]}
        return [load_recipe(tasks[name].recipe, tasks[name].overrides).optim.lr for name in ("SFT", "SFT-faster")]

    assert rates() == [usual, 3 * usual] and rates(common=("optim.lr=0.5",)) == [0.5, 1.5]
    assert rates(of_variant={"SFT-faster": ("optim.lr=7",)}) == [usual, 7]


def test_a_variant_that_fails_is_named_and_stops_no_other(study, tmp_path, in_this_process, capsys):
    for name in ("unreadable/a.jpg", "unreadable/a.txt"):
        (tmp_path / "unreadable").mkdir(exist_ok=True)
        (tmp_path / name).write_text("no image")
    command = ["study", study, f"SFT:data.captions={tmp_path}/unreadable", "--out", str(tmp_path / "out"), *SCALE]
    assert main(command) == 1
    printed = capsys.readouterr().out
    assert "SFT, seed 0: DataError: " in printed and "unreadable" in printed
    assert printed.count(": begins\n") == len(in_this_process)
    found = json.loads((tmp_path / "out/does_it_run-show_o-shapes/study.json").read_text())
    assert [variant["name"] for variant in found["variants"] if variant["means"]] == ["before", "RECA"]
    assert found["claims"][0]["verdict"] == "not measured"


@pytest.mark.usefixtures("in_this_process")
def test_pre_training_that_fails_is_named_beside_what_needs_it(study, tmp_path, monkeypatch, capsys):
    def broken(task, progress):
        raise OSError("no space")

    monkeypatch.setattr(work.toy, "pretrain", broken)
    assert main(["study", study, "--out", str(tmp_path / "out"), *SCALE]) == 1
    printed = capsys.readouterr().out
    assert "0/pretrained: OSError: no space" in printed and "RECA, seed 0: " in printed


def test_at_real_size_variants_are_recipes_and_measures_are_suites(study, tmp_path, in_this_process):
    options = ["--recipe", "show_o_tiny", "--suite", "toy", "--limit", "5", "--seeds", "1"]
    command = ["study", study, "train.steps=1", "data.workers=0", *options, "--out", str(tmp_path / "out")]
    assert main(command) == 0
    found = json.loads((tmp_path / "out/does_it_run-show_o_tiny/study.json").read_text())
    assert found["setting"] == "published" and "never" in [variant["name"] for variant in found["variants"]]
    for variant in found["variants"]:
        measure = variant["results"]["0"]["measures"]["toy"]
        assert 0 <= measure["value"] <= 100 and len(measure["interval"]) == 2
    assert [claim["verdict"] for claim in found["claims"]] == ["agrees", "open"]


def test_all_that_a_recipe_file_gives_lies_in_the_folder_of_studies(study, tmp_path):
    """An absolute path once led the runs to beside the file."""
    save_recipe(load_recipe("show_o_tiny"), tmp_path / "mine.yaml")
    asked = Asked("show_o", (0,), tmp_path / "out", recipe=str(tmp_path / "mine.yaml"))
    folders = {task.folder.parent for task in plan(load_study(study), asked)[0]}
    assert folders == {tmp_path / "out/variants"}
    assert report.folder(load_study(study), asked) == tmp_path / "out/does_it_run-mine"


@pytest.mark.parametrize("unit, scale, high", [("fraction", 100, 100), ("percent", 1, 100), ("points", 1, 200)])
def test_the_scores_of_a_suite_are_shares_or_points(unit, scale, high, tmp_path, monkeypatch):
    """Of shares no interval over seeds holds more than 100 %; the points of a benchmark may be any number."""
    values = {0: 90.0, 1: 100.0, 2: 80.0}

    def evaluate(*_, seed, **__):
        row = {"value": values[seed] / scale, "interval": [values[seed] / scale / 2, None]}
        return {"overall": row | {"unit": unit}, "tags": {"counting": row}}

    monkeypatch.setattr(published.api, "evaluate", evaluate)
    given = (
        ("variant", "published", "shapes", "show_o"),
        ("show_o_tiny", (), tmp_path, tmp_path, 1.0, Evaluations(("s",))),
    )
    seeds = [published.measured(Task(f"{seed}/a", *given[0], seed, *given[1])) for seed in values]
    assert [seeds[0][name]["interval"] for name in ("s", "s/counting")] == [[45, None]] * 2
    for name in ("s", "s/counting"):
        found = judge.mean([measures[name] for measures in seeds])
        assert found == pytest.approx((90, 90 - 24.84, min(high, 90 + 24.84)), abs=1e-2)


def test_evaluations_with_other_options_have_folders_of_their_own(tmp_path, monkeypatch):
    """So that one study can be measured again, and by two suites at once."""
    folders = []

    def evaluate(suite, source, keys, *, out, **options):
        folders.append(out)
        return {"overall": {"value": 0.5, "interval": [0, 1], "unit": "fraction"}, "tags": {}}

    monkeypatch.setattr(published.api, "evaluate", evaluate)
    suites = ("toy", "toy?dataset=emoji")

    def measured(**common):
        asked = Evaluations(suites, {"": common, "toy": {"judge": "toy"}})
        return published.measured(
            Task(
                "0/a", "variant", "published", "shapes", "show_o", 0, "show_o_tiny", (), tmp_path, tmp_path, 1.0, asked
            )
        )

    assert tuple(measured(sampling={})) == suites
    assert tuple(measured(sampling={"steps": 3})) == suites
    measured(sampling={})
    assert len(set(folders)) == 4 and folders[4:] == folders[:2]
    assert all(folder.parent == tmp_path / "eval" and folder.name.startswith("toy-") for folder in folders)


def test_what_another_process_does_is_waited_for(study, tmp_path, monkeypatch):
    """Two studies share their pre-trained model and their variants, and each may be begun while the other one runs."""
    (task, *_), _ = plan(load_study(study), Asked("show_o", (0,), tmp_path))
    other = """if True:
        import sys, time
        from pathlib import Path
        from reca.runs.folder_lock import alone
        lock, result = map(Path, sys.argv[1:])
        with alone(lock, "it"):
            print("begun", flush=True)
            time.sleep(3)  # longer than a killed process is waited for
            result.parent.mkdir()
            result.write_text('{"measures": {}, "curve": [], "seconds": 5}')
    """
    lock = task.folder.with_name(f".{task.folder.name}.lock")
    monkeypatch.setattr(toy, "pretrain", lambda *_: 1 / 0)
    with subprocess.Popen([sys.executable, "-c", other, lock, task.result], stdout=subprocess.PIPE, text=True) as doing:
        assert doing.stdout.readline() == "begun\n"
        assert work.work(task)["seconds"] == 5
    task.result.unlink()
    with pytest.raises(ZeroDivisionError):  # it is done here, where no process does it
        work.work(task)


def test_a_torn_line_of_a_log_ends_no_variant(tmp_path):
    """A disk that is full for a moment tears one, and the run goes on."""
    lines = ['{"step": 1, "loss": 4.0}', '{"step": 2, "lo', '{"step": 3, "loss": 2.0, "reca/loss": 1.0}']
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")
    assert work._curve(tmp_path) == [(1, 4.0), (3, 1.0)]
    assert experiment._curve(tmp_path) == [(1, 4.0), (3, 2.0)]


def test_slurm_submits_each_task_once_after_those_it_needs(study, tmp_path, monkeypatch, capsys):
    arguments = ["study", study, "--out", str(tmp_path / "out"), *SCALE]
    monkeypatch.setattr("sys.argv", ["reca", *arguments, "--slurm"])
    assert main([*arguments, "--slurm"]) == 0
    script = Path(capsys.readouterr().out.split()[-1])
    stub = tmp_path / "bin/sbatch"
    stub.parent.mkdir()
    stub.write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/calls; wc -l < {tmp_path}/calls\n')
    stub.chmod(0o755)
    subprocess.run([script], check=True, env=os.environ | {"PATH": f"{stub.parent}:{os.environ['PATH']}"}, timeout=20)
    calls = (tmp_path / "calls").read_text().splitlines()
    here = script.parent
    assert calls[0] == f"--parsable --array=0-0 {here}/task.sbatch {here}/tasks0.txt"
    # Of a whole array: one task that fails would keep all others, and the report, waiting for good with afterok.
    assert calls[1] == f"--parsable --dependency=afterany:1 --array=0-2 {here}/task.sbatch {here}/tasks1.txt"
    assert (here / "tasks1.txt").read_text().split() == ["0/RECA", "0/SFT", "0/before"]
    assert (here / "tasks2.txt").read_text().split() == ["0/SFT-RECA"]
    assert calls[3].startswith("--dependency=afterany:3") and calls[3].endswith("--report")
    assert "--slurm" not in (here / "task.sbatch").read_text()

    assert main([*arguments, "--task", "0/RECA"]) == exits.RECIPE
    assert "depends on 0/pretrained, which is not done" in capsys.readouterr().err


def test_the_list_of_studies_has_their_questions(capsys):
    assert main(["study", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"{name:<11} {load_study(name).question}" for name in study_names()]


def test_no_option_is_abbreviated(capsys):
    """SLURM's job of the report was a study's command with --slu, and so wrote scripts in place of the report."""
    with pytest.raises(SystemExit):
        main(["study", "main", "--slu"])
    assert "unrecognized arguments: --slu" in capsys.readouterr().err


@pytest.mark.parametrize("name", study_names())
def test_every_study_can_be_planned(name, tmp_path):
    study = load_study(name)
    assert study.paper and study.variants and study.claims
    planned = {}
    for umm in UMMS:
        asked = Asked(umm, (3,), tmp_path, dataset=study.datasets[0] if study.datasets else "shapes")
        if not study.umms or umm in study.umms:
            planned[umm] = plan(study, asked)[0]
        else:
            with pytest.raises(StudyError, match="does not support"):
                plan(study, asked)
    assert "show_o" in planned
    for tasks in planned.values():
        assert {name for task in tasks for name in task.after} <= {task.name for task in tasks}
        assert all("seed=3" in " ".join(task.overrides) for task in tasks if task.kind != "pretrained")
    for recipe in ("show_o_512", "bagel_7b"):
        umm = load_recipe(recipe).umm
        if not study.umms or umm in study.umms:
            assert plan(study, Asked(umm, (0,), tmp_path, recipe))[0]


def test_a_key_of_the_pretrained_model_holds_for_pre_training_and_all_variants(tmp_path):
    """Another image tokenizer is another model, whose pre-training is not shared with that of the usual one."""
    asked, key = {"umm": "show_o", "seeds": (0,), "out": tmp_path}, "model.patches.entries=99"
    usual = {task.name: task for task in plan(load_study("encoder"), Asked(**asked))[0]}
    tasks, _ = plan(load_study("encoder"), Asked(**asked, of_variant={"pretrained": (key,)}))
    assert {task.folder for task in tasks}.isdisjoint(task.folder for task in usual.values())
    for task in tasks:
        made = load_recipe(task.recipe, task.of_pretraining if task.kind == "pretrained" else task.overrides)
        assert made.model.patches.entries == 99, task.name
        assert usual[task.name].of_pretraining == ()
    with pytest.raises(StudyError, match="'pretrained' is no variant"):
        plan(load_study("main"), Asked(**asked, recipe="show_o_512", of_variant={"pretrained": (key,)}))


def test_datasets_share_no_variant_whatever_data_is_given(tmp_path):
    """Their pre-trained models and prompts differ, though recipe and data be the same."""
    data = ("data.images=/a", "data.conversations=/b.json", "data.captions=/c")
    datasets = [Asked("show_o", (0,), tmp_path, dataset=name, common=data) for name in ("shapes", "jitter")]
    first, second = ({task.folder for task in plan(load_study("encoder"), asked)[0]} for asked in datasets)
    assert not first & second


@pytest.mark.parametrize("umm", load_study("encoder").umms)
def test_a_swapped_encoder_takes_red_for_blue(umm):
    """It reads an image whose channels changed places nearly as the other read the image; means differ by channel."""
    model = umm_package(umm).Adapter.load(load_recipe(f"{umm}_tiny").model).eval()
    roles, read = model.roles(), []
    for name, layer in model.named_modules():
        if roles.get(f"{name}.weight") == "und_encoder" and isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            layer.register_forward_hook(lambda _layer, _given, output: read.append(output))
            break  # the first layer
    image = torch.randint(0, 256, (3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    model.answer([image], ["what is this"], max_new_tokens=1)
    model.answer([image.flip(0)], ["what is this"], max_new_tokens=1)
    toy.swap_red_and_blue(model)
    model.answer([image.flip(0)], ["what is this"], max_new_tokens=1)
    right, other, swapped = read
    assert (swapped - right).norm() < 0.3 * (other - right).norm()


@pytest.mark.parametrize(
    "text, said",
    [
        ("variants: {}", "variants must map names"),
        ("- 1", "has no keys"),
        ("question: a\npaper: []\nvariants: {a: {}}", "about is missing"),
        ("question: a\nvariants: {a: {about: b, steps: 3}}", "unknown key steps"),
        ("question: a\nvariants: {a: captions}", "variants.a: expected a mapping"),
        ("question: a\nvariants: {a: {about: b, after: c}}", "must be a variant listed before it"),
        ("question: a\nvariants: {a: {about: b, longer: 0.5}}", "variants.a: expected a whole number"),
        ("question: a\nvariants: {a: {about: b, longer: 0}}", "longer=0 of a must be at least 1"),
        ("question: a\nvariants: {a: {about: b, rate: 0}}", "rate=0 of a must be above 0"),
        ("question: a\nvariants: {a: {about: b, rate: half}}", "variants.a: expected a number"),
        ("question: a\nvariants: {a: {about: b, rate: .nan}}", "variants.a: expected a finite number"),
        ("question: a\nvariants: {a: {about: b}, c: {about: d}, a: {about: e}}", "duplicate key 'a'"),
        ("question: a\nvariants: {a: {about: b, overrides: train.steps=3}}", "variants.a: expected a list"),
        ("question: a\nvariants: {a: {about: b, toy: {bagel: train.steps=3}}}", "toy.bagel='train.steps=3'"),
        (
            "question: a\nvariants: {a: {about: b}}\nclaims: [{says: x, measure: y, variant: a, than: a, margin: two}]",
            "margin='two'",
        ),
        ("question: a\nvariants: {a b: {about: b}}", "letters, digits"),
        ("question: a\nvariants: {pretrained: {about: b}}", "'pretrained' is reserved"),
        (
            "question: a\nvariants: {a: {about: b}}\nclaims: [{says: x, measure: y, variant: a, than: z}]",
            "names z, which",
        ),
        (
            "question: a\nvariants: {a: {about: b}}\nclaims: [{says: x, measure: y, variant: a, than: a, expect: x}]",
            "expect",
        ),
        ("question: a\nvariants: {a: {about: b}}\nclaims: {says: x}", "claims must be a list"),
        ("question: a\nvariants: {a: {about: b}}\nclaims: [{says: x, measure: y, variant: a, than: a}]", "with itself"),
        (f"question: a\nvariants: {{a: {{about: b}}}}\nclaims: [{{{CLAIM}, expect: equal, margin: -1}}]", "at least 0"),
        (f"question: a\nvariants: {{a: {{about: b}}}}\nclaims: [{{{CLAIM}, margin: 5}}]", "is for expect: equal"),
        (
            "question: a\nvariants: {a: {about: b}}\nclaims: [{says: x, measure: {toys: y}, variant: a, than: before}]",
            "claims[0].measure names 'toys', which is not one of toy, published",
        ),
        ("question: a\nvariants: {a: {about: b, toy: {shapez: []}}}", "variants.a.toy names 'shapez', which is not"),
        ("question: a\nvariants: {a: {about: b, published: {showo: []}}}", "variants.a.published names 'showo'"),
        ("question: a\nvariants: {a: {about: b}}\numms: [showo]", "umms names 'showo', which is not one of bagel"),
        ("question: a\nvariants: {a: {about: b}}\ndatasets: [shape]", "datasets names 'shape', which is not one of"),
        ("question: a\nvariants: {a: {about: b}}\nname: ../b", "the study name '../b', which names its folder, must"),
        ("question: [", "is not YAML"),
    ],
)
def test_a_study_that_is_none_is_refused(text, said, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(StudyError, match=re.escape(said)):
        load_study(str(path))


@pytest.mark.parametrize(
    "measure, recipe, said",
    [
        ("hold-out", None, "the measure 'hold-out' of 'x' does not exist; there are toy: overall, seen, held-out"),
        ("{toy: held_out}", "show_o_tiny", "the measure 'held_out' of 'x' does not exist; there are toy: overall"),
        ("{toy: seen, published: genevl/counting}", None, "'genevl' of 'x' does not exist; there are published: toy"),
        ("held-out", None, None),
        ("geneval/counting", None, None),
        ("{published: 'toy?dataset=emoji', toy: loss}", None, None),
    ],
)
def test_a_measure_that_no_variant_has_is_refused(measure, recipe, said, tmp_path):
    path = tmp_path / "a.yaml"
    claim = f"{{says: x, measure: {measure}, variant: a, than: before}}"
    path.write_text(f"question: a\nvariants: {{a: {{about: b}}}}\nclaims: [{claim}]")
    asked = Asked("show_o", (0,), tmp_path, recipe)
    if said is None:
        plan(load_study(str(path)), asked)
        return
    with pytest.raises(StudyError, match=re.escape(said)):
        plan(load_study(str(path)), asked)


@pytest.mark.parametrize(
    "override, said",
    [
        ("train.stps=4", "variant a: unknown key 'train.stps' in the overrides; did you mean train.steps?"),
        (
            "data.images={unlabelled}&size=9",
            "variant a: data.images={unlabelled}&size=9: there is no {unlabelled}; the",
        ),
        ("run_dir=b", "run_dir=b in a: a study sets run_dir itself; --out names"),
        ("train.seed=3", "train.seed=3 in a: a study sets train.seed itself; --seeds names"),
    ],
)
def test_an_override_that_a_study_cannot_use_is_refused_with_its_variant(override, said, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(f'question: a\nvariants: {{a: {{about: b, overrides: ["{override}"]}}}}')
    with pytest.raises(ValueError, match=re.escape(said)):
        plan(load_study(str(path)), Asked("show_o", (0,), tmp_path))


def test_a_study_file_that_cannot_be_read_is_not_called_missing(tmp_path, monkeypatch):
    path = tmp_path / "a.yaml"
    with pytest.raises(StudyError, match=r"no study '.*a.yaml': give a .yaml file, or one of blur"):
        load_study(str(path))

    def refused(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(StudyError, match=r"study .*a.yaml cannot be read \(Permission denied\)"):
        load_study(str(path))


def test_names_of_variants_are_texts_however_they_look(tmp_path):
    """YAML takes 64 for a number and no for false."""
    path = tmp_path / "a.yaml"
    claim = "{says: x, measure: y, variant: 64, than: no, expect: equal, margin: 1}"
    path.write_text(
        f"question: a\nvariants: {{64: {{about: b}}, no: {{about: c, after: 64}}}}\nclaims: [{claim}]\npaper:"
    )
    study = load_study(str(path))
    assert [(variant.name, variant.after) for variant in study.variants] == [("64", None), ("no", "64")]
    assert study.claims == (Claim("x", "y", "64", "no", "equal", 1.0),)


def test_a_variant_takes_a_group_of_keys_in_braces(tmp_path):
    path = tmp_path / "a.yaml"
    keys = 'overrides: ["model.patches={size: 4, entries: 99}"], toy: ["data.captions={unlabeled}&size=9"]'
    path.write_text(f"question: a\nvariants: {{a: {{about: b, {keys}}}}}")
    (task,) = (t for t in plan(load_study(str(path)), Asked("show_o", (3,), tmp_path))[0] if t.variant == "a")
    recipe = load_recipe(task.recipe, task.overrides)
    assert recipe.model.patches.entries == 99
    assert recipe.data.captions == "reca.toy_datasets.shapes:unlabeled?seed=3&size=9"


@pytest.mark.parametrize(("pretrained", "recipe"), [("blue_is_red", None), ("red_is_blue", "show_o_tiny")])
def test_a_modification_that_is_not_there_is_refused(pretrained, recipe, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(f"question: a\nvariants: {{a: {{about: b, pretrained: {pretrained}}}}}")
    with pytest.raises(
        StudyError, match=f"pretrained={pretrained} of a: only red_is_blue exists, and only on toy datasets"
    ):
        plan(load_study(str(path)), Asked("show_o", (0,), tmp_path, recipe=recipe))


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["encodr"], "no study 'encodr': did you mean encoder? Give a .yaml file, or one of blur"),
        (["nothing"], "no study 'nothing': give a .yaml file, or one of blur"),
        (["main", "--recipe", "show_o_512"], "--recipe needs --suite"),
        (["main", "--suite", "geneval"], "are for --recipe"),
        (["main", "--recipe", "show_o_512", "--suite", "geneval", "--data", "x"], "--data 'x' must be SUITE=..."),
        (["main", "--recipe", "show_o_512", "--suite", "geneval"], "name the suite: --judge geneval=..."),
        (["main", "--recipe", "show_o_512", "--suite", "gedit", "--judge", "gedit=local:x"], "gedit needs a model"),
        (["main", "--recipe", "show_o_512", "--suite", "toy", "--limit", "0"], "limit must be at least 1, got 0"),
        (["main", "--recipe", "show_o_512", "--suite", "toy", "--sampling", "stepz=1"], "no sampling option 'stepz'"),
        (["main", "--limit", "0"], "are for --recipe"),
        (["main", "--sampling", "steps=3"], "are for --recipe"),
        (["main", "--scale", "3"], "--scale must lie in (0, 1]"),
        (["main", "RECO:optim.lr=1"], "'RECO' is no variant of main with show_o; there are RECA"),
        (["main", "--jobs", "0"], "--jobs must be at least 1"),
        (["main", "--task", "7/RECA"], "no task 7/RECA; --task is SEED/VARIANT of seed 0 and pretrained, RECA, before"),
        (["main", "--seeds", "3,5,", "--task", "4/RECA"], "SEED/VARIANT of seeds 3, 5 and pretrained, RECA, before"),
        (["main", "--seeds", "5,", "--task", "4/RECA"], "SEED/VARIANT of seed 5 and pretrained, RECA, before"),
        (["main", "--images-per-prompt", "0"], "--images-per-prompt must be at least 1"),
        (
            ["main", "--recipe", "x", "--suite", "geneval", "--images-per-prompt", "2"],
            "--images-per-prompt is for toy datasets",
        ),
        (["blur", "--umm", "bagel"], "the study blur does not support bagel, only show_o"),
        (["limits"], "the toy dataset 'shapes': choose --dataset emoji|emoji-places|emoji-varied"),
        (["main", "--dataset", "sea"], "there is no toy dataset 'sea'"),
        (["main", "--dataset", "emoji", "--umm", "bagel"], "there is no demo of 'bagel' on the toy dataset 'emoji'"),
    ],
)
def test_what_cannot_be_run_is_said(arguments, said, tmp_path, capsys):
    assert main(["study", *arguments, "--out", str(tmp_path)]) in (exits.RECIPE, exits.DATA)
    assert said in capsys.readouterr().err


class Blank:
    """Draws nothing and knows nothing. seeds: of what it was asked for."""

    def __init__(self):
        self.seeds = []

    def generate(self, prompts, seeds):
        self.seeds += seeds
        return [torch.zeros(3, 20, 20, dtype=torch.uint8) for _ in prompts]

    def answer(self, images, questions, max_new_tokens):
        return [""] * len(images)


def test_every_prompt_is_drawn_as_often_as_asked_and_shown_once():
    once, more, shapes = Blank(), Blank(), load_dataset("shapes")
    first = measure(once, shapes, 0, {}, every=10)
    found = measure(more, shapes, 0, {}, every=10, draws=3)
    assert found.rates["seen"] == (0, 3 * first.rates["seen"].trials) and first.rates["seen"].trials > 0
    assert found.rates["understanding"] == first.rates["understanding"]
    assert more.seeds[: len(once.seeds)] == once.seeds and len(set(more.seeds)) == 3 * len(once.seeds)
    assert [text for text, _, _ in found.samples] == [text for text, _, _ in first.samples]


@pytest.mark.parametrize(
    "override, said",
    [
        ('SFT:train.frozen=["*nothing*"]', "variant SFT: train.frozen: no parameter matches '*nothing*'"),
        ('SFT-RECA:train.roles=["lora"]', "variant SFT-RECA: train.roles names 'lora', which is not a role"),
        ("RECA:objective.srum.weight=1", "variant RECA: show_o has no srum loss"),
        ("RECA:lora.rank=2 lora.targets=[nothing]", "variant RECA: lora.targets: no trained linear layer matches"),
        (
            "SFT:optim.fused_backward=true SFT:optim.max_grad_norm=null SFT:objective.t2i.micro_batch=1",
            "variant SFT: optim.fused_backward=true needs one backward pass per step",
        ),
        ("SFT:train.activation_checkpointing=99", "variant SFT: train.activation_checkpointing=99 recomputes"),
        ("SFT:data.template_count=1000", "variant SFT: data.template_count=1000, but there are 8 templates"),
        ("SFT:eval.every=1 SFT:eval.suite=nothing", "variant SFT: eval.suite='nothing'"),
        ("SFT:model.image_size=33", "variant SFT: model.image_size is 33 pixels"),
        (
            "RECA:model.patches.entries=99",
            "variant RECA: codec.codebook has the shape (99, 48), but (145, 48) in the pre-trained model",
        ),
        (
            "before:model.patches.entries=99",
            "variant before: codec.codebook has the shape (99, 48), but (145, 48) in the pre-trained model",
        ),
        ("--slurm SFT:train.frozen=[nothing]", "variant SFT: train.frozen: no parameter matches 'nothing'"),
        ("SFT:data.captions=nowhere/*.tar", "variant SFT: "),
        ("RECA:train.init_from=nowhere", "variant RECA: train.init_from=nowhere is not a run folder"),
    ],
)
def test_a_recipe_that_a_variant_cannot_run_is_refused_before_anything_runs(
    override, said, study, tmp_path, in_this_process, capsys
):
    out = tmp_path / "out"
    assert main(["study", study, "--out", str(out), *SCALE, *override.split(" ")]) in (exits.RECIPE, exits.DATA)
    assert said in capsys.readouterr().err
    assert in_this_process == [] and list(out.iterdir()) == []


@pytest.mark.parametrize("umm", UMMS)
def test_the_variants_of_the_catalogue_can_run(umm, tmp_path):
    check(plan(load_study("main"), Asked(umm, (0,), tmp_path))[0], here=True)


def test_variants_of_missing_parents_are_refused(study, tmp_path):
    asked = Asked("show_o", (0,), tmp_path, "show_o_tiny", of_variant={"SFT": (f"model.weights={tmp_path}/none",)})
    with pytest.raises(RecipeError, match=r"variant SFT: model.weights=.*none does not exist"):
        check(plan(load_study(study), asked)[0], here=True)


def rate(hits, trials=100):
    return {"value": 100 * hits / trials, "hits": hits, "trials": trials}


def test_intervals():
    assert judge.mean([rate(50)]) == pytest.approx((50.0, 40.383, 59.617), abs=1e-3)  # Wilson
    # Three values of mean 20 and deviation 10: Student's quantile with two degrees of freedom is 4.303.
    spread = judge.mean([{"value": v} for v in (10.0, 20.0, 30.0)])
    assert spread == pytest.approx((20.0, 20 - 24.84, 20 + 24.84), abs=1e-2)
    assert judge.mean([{"value": 3.0}]) == (3.0, None, None)
    for interval in (None, [None, 2.0], [0.0, None]):  # a loss has none, and one prompt tells none
        some, other = {0: {"value": 3.0, "interval": [2.0, 4.0]}}, {0: {"value": 1.0, "interval": interval}}
        assert judge.difference(some, other) == (2.0, None, None)
        assert judge.difference(other, some) == (-2.0, None, None)
    # Newcombe 1998, method 10, the first example of its table II: 56 of 70 against 48 of 80.
    gap = judge.difference({0: rate(56, 70)}, {0: rate(48, 80)})
    assert gap == pytest.approx((20.0, 5.24, 33.39), abs=1e-2)
    # Over seeds, differences are paired.
    variant, than = {s: rate(50 + 10 * s) for s in range(3)}, {s: rate(40 + 9 * s) for s in range(3)}
    assert judge.difference(variant, than) == pytest.approx((11.0, 11 - 2.484, 11 + 2.484), abs=1e-3)
    assert judge.difference({0: rate(1)}, {1: rate(1)}) is None


def test_seeds_without_spread_are_not_certain():
    """Where all seeds agree, the interval is that over the prompts of all of them: here no hit in 300, Wilson."""
    none, all_of_them = {s: rate(0) for s in range(3)}, {s: rate(100) for s in range(3)}
    assert judge.mean(list(none.values())) == pytest.approx((0.0, 0.0, 1.264), abs=1e-3)
    assert judge.difference(none, none) == pytest.approx((0.0, -1.264, 1.264), abs=1e-3)
    assert judge.difference(all_of_them, none) == pytest.approx((100.0, 98.212, 100.0), abs=1e-3)
    assert judge.mean([{"value": 3.0}, {"value": 3.0}]) == (3.0, None, None)
    # Suites count no hits. A model whose understanding is frozen gives the same answers on every seed.
    same, other = {"value": 60.0, "interval": [57, 64]}, {"value": 60.0, "interval": [None, None]}
    assert judge.mean([same, same]) == (60, 57, 64) and judge.mean([same, other]) == (60, None, None)
    assert (
        judge.difference({0: same}, {0: same}) == judge.difference({0: same, 1: same}, {0: same, 1: same}) == (0, -5, 5)
    )


def test_an_interval_over_seeds_holds_no_share_that_there_is_none_of():
    """Student's of 99, 100 and 95 % reaches to 104.6."""
    some, few = {s: rate(n) for s, n in enumerate((99, 100, 95))}, {s: rate(n) for s, n in enumerate((0, 2, 1))}
    assert judge.mean(list(some.values())) == pytest.approx((98.0, 91.427, 100.0), abs=1e-3)
    assert judge.difference(some, few) == pytest.approx((97.0, 90.427, 100.0), abs=1e-3)
    percent = [{"value": value, "percent": True} for value in (99.0, 100.0, 95.0)]
    assert judge.mean(percent).high == 100 and judge.mean([{"value": m["value"]} for m in percent]).high > 104


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
    "expect, interval, said",
    [
        ("higher", (5, 1, 9), "agrees"),
        ("higher", (-5, -9, -1), "disagrees"),
        ("higher", (5, -1, 9), "open"),
        ("higher", (5, 0, 9), "open"),
        ("higher", (-5, -9, 0), "open"),
        ("lower", (-5, -9, -1), "agrees"),
        ("lower", (5, 1, 9), "disagrees"),
        ("equal", (0, -3, 3), "agrees"),
        ("equal", (0, -2, 4), "open"),
        ("equal", (0, -4, 2), "open"),
        ("equal", (6, 4, 9), "disagrees"),
        ("equal", (-6, -9, -4), "disagrees"),
        ("not_lower", (-1, -3, 9), "agrees"),
        ("not_lower", (8, 5, 9), "agrees"),
        ("not_lower", (-2, -4, 9), "open"),
        ("not_lower", (-6, -9, -4), "disagrees"),
        ("not_higher", (-8, -9, 3), "agrees"),
        ("not_higher", (2, -9, 4), "open"),
        ("not_higher", (6, 4, 9), "disagrees"),
        ("higher", (5, None, None), "open"),
        ("higher", None, "not measured"),
    ],
)
def test_a_claim_agrees_only_if_its_whole_interval_does(expect, interval, said):
    claim = Claim("", "seen", "a", "b", expect, 3.0)
    assert judge.verdict(claim, interval and judge.Interval(*interval)) == said


def test_verdicts_together():
    assert judge.overall(["agrees", "not measured"]) == "agrees in part"
    assert judge.overall(["agrees", "agrees"]) == "agrees"
    assert judge.overall(["agrees", "open", "disagrees"]) == "disagrees"
    assert judge.overall(["agrees", "open"]) == "open" and judge.overall(["not measured"]) == "not measured"


def test_a_failed_task_is_said_in_one_line():
    assert runner.line({"failed": "ValueError: no"}) == "FAILED, ValueError: no"


@pytest.mark.parametrize("recipe", [*(f"{umm}_tiny" for umm in UMMS), "show_o_emoji_tiny", *PUBLISHED])
def test_whatever_a_variant_freezes_would_be_trained_without_it(recipe, tmp_path):
    """A pattern of frozen parameters alone changes nothing, so that the variant would be RECA under another name."""
    umm = load_recipe(recipe).umm
    dataset = "emoji" if "emoji" in recipe else "shapes"
    asked = Asked(umm, (0,), tmp_path, recipe if recipe in PUBLISHED else None, dataset)
    studies = [study for study in map(load_study, study_names()) if not study.umms or umm in study.umms]
    if asked.recipe is None:
        studies = [study for study in studies if not study.datasets or dataset in study.datasets]
    variants = [keys for study in studies for _, keys in study.of(asked)[0].values()]
    frozen = {
        tuple(key for key in keys if key.startswith("train.")) for keys in variants if "train.frozen" in str(keys)
    }
    assert frozen
    model = build_meta(load_recipe(recipe))[0]
    for keys in frozen:
        made = load_recipe(recipe, keys)
        freeze(model, made.train.roles)
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        for pattern in made.train.frozen:
            assert any(fnmatch(name, pattern) for name in trained), pattern
