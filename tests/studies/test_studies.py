"""A study of two variants from its file to its page, and what is done twice."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reca import exits
from reca.cli import main
from reca.config.recipe_files import load_recipe, save_recipe
from reca.demo import experiment
from reca.demo.measure import measure
from reca.studies import judge, published, report, slurm, toy, work
from reca.studies.plan import plan
from reca.studies.study import StudyError, load_study, study_names
from reca.studies.task import Asked, Evaluations, Task
from reca.toy_datasets.dataset import load_dataset
from tests.studies.conftest import SCALE, STUDY


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


def test_a_variant_is_evaluated_by_its_folder_and_what_it_starts_from_by_its_recipe(tmp_path, monkeypatch):
    seen = []
    row = {"value": 0.5, "interval": [0, 1], "unit": "fraction"}

    def evaluate(suite, source, keys, **options):
        seen.append((source, tuple(keys), options["seed"]))
        return {"overall": row, "tags": {}}

    monkeypatch.setattr(published.api, "evaluate", evaluate)
    (variant, *_, before), _ = plan(
        load_study("main"), Asked("show_o", (3,), tmp_path, "show_o_tiny", evaluations=Evaluations(("toy",)))
    )
    assert before.kind == "before" and variant.kind == "variant"
    published.measured(variant), published.measured(before)
    assert seen == [(variant.folder, (), 3), ("show_o_tiny", before.overrides, 3)]


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
        lock.parent.mkdir()
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


def test_a_task_is_done_once_and_tells_its_steps_meanwhile(study, tmp_path, monkeypatch):
    (task, *_), _ = plan(load_study(study), Asked("show_o", (0,), tmp_path))
    counts = [work.steps_done(task)]

    def pretrain(task, progress):
        for step in (10, 20):
            progress(step)
            counts.append(work.steps_done(task))
        return [[20, 1.0]]

    monkeypatch.setattr(toy, "pretrain", pretrain)
    result = work.work(task)
    assert counts == [0, 10, 20] and 0 < result["seconds"] < 60
    assert {key: result[key] for key in ("measures", "curve")} == {"measures": {}, "curve": [[20, 1.0]]}
    monkeypatch.setattr(toy, "pretrain", lambda *_: 1 / 0)
    assert work.work(task) == work.done(task) == result


def test_steps_that_cannot_be_told_do_not_end_a_run(study, tmp_path):
    (task, *_), _ = plan(load_study(study), Asked("show_o", (0,), tmp_path))
    (task.folder / work.PROGRESS).mkdir(parents=True)  # as a full disk, it refuses the write
    work._progress(task)(10)
    assert work.steps_done(task) == 0


@pytest.mark.parametrize("content", ["", "{", "[" * 10**5])
def test_a_damaged_result_is_named(content, study, tmp_path):
    (task, *_), _ = plan(load_study(study), Asked("show_o", (0,), tmp_path))
    task.result.parent.mkdir(parents=True)
    task.result.write_text(content)
    with pytest.raises(StudyError, match=f"{task.result.name} is not JSON .* remove it to run 0/pretrained"):
        work.done(task)


@pytest.mark.parametrize(
    ("place", "found"),
    [
        ("a JSON object", [1]),
        ("measures", {"curve": [], "seconds": 1}),
        ("measures.overall.value", {"measures": {"overall": {"value": None}}, "curve": [], "seconds": 1}),
        (r"curve\[1\]", {"measures": {}, "curve": [[1, 2.0], [2]], "seconds": 1}),
        ("seconds", {"measures": {}, "curve": []}),
    ],
)
def test_a_result_of_another_shape_is_named(place, found, study, tmp_path):
    (task, *_), _ = plan(load_study(study), Asked("show_o", (0,), tmp_path))
    task.result.parent.mkdir(parents=True)
    task.result.write_text(json.dumps(found))
    with pytest.raises(StudyError, match=f"{task.result.name} is not the result of a task .{place} is missing, or is"):
        work.done(task)


def test_steps_are_of_training_alone(tmp_path):
    tasks, _ = plan(load_study("encoder"), Asked("show_o", (0,), tmp_path, scale=0.1))
    steps = {task.variant: work.steps(task) for task in tasks}
    assert steps == {
        "pretrained": 80, "pretrained-red_is_blue": 0, "RECA": 20, "red-is-blue": 20, "other": 20, "before": 0,
    }  # fmt: skip


@pytest.mark.parametrize("count, value", [(0, None), (1, 1.0), (4, 4.0), (14, 14.0), (40, 38.5)])
def test_the_loss_of_a_variant_is_that_of_the_last_tenth(count, value):
    found = work._loss([(10 * i, float(i)) for i in range(1, count + 1)])
    assert found == ({} if value is None else {"loss": {"value": value}})


def test_a_torn_line_of_a_log_ends_no_variant(tmp_path):
    """A disk that is full for a moment tears one, and the run goes on."""
    lines = ['{"step": 1, "loss": 4.0}', '{"step": 2, "lo', '{"step": 3, "loss": 2.0, "reca/loss": 1.0}']
    lines += ['{"loss": 5.0}', '{"step": "4", "loss": 6.0}', '{"step": 5, "loss": "7.0"}']  # of a damaged file
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")
    assert work._curve(tmp_path) == [(1, 4.0), (3, 1.0)]
    assert experiment._curve(tmp_path) == [(1, 4.0), (3, 2.0)]


def test_a_step_that_is_not_finite_is_no_point_of_a_curve(tmp_path):
    """It is skipped, and its losses are null in the log."""
    lines = [
        {"step": 1, "loss": 4.0, "reca/loss": 3.0},
        {"step": 2, "loss": None, "reca/loss": 2.0, "i2t/loss": None},
        {"step": 3, "loss": None, "reca/loss": None},
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert work._curve(tmp_path) == [(1, 3.0), (2, 2.0)]
    assert experiment._curve(tmp_path) == [(1, 4.0)]


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
    job = (here / "task.sbatch").read_text()
    assert "--slurm" not in job and "gpu" not in job and "OMP_NUM_THREADS=1\n" in job
    assert "#SBATCH --cpus-per-task=1\n" in job

    # Written again after the pre-training: without it.
    tasks, _ = plan(load_study(study), Asked("show_o", (0,), tmp_path / "out", scale=0.004))
    tasks[0].result.parent.mkdir(parents=True)
    tasks[0].result.write_text('{"measures": {}, "curve": [], "seconds": 1}')
    assert slurm.levels(tasks) == [["0/RECA", "0/SFT", "0/before"], ["0/SFT-RECA"]]
    job = slurm.write(tasks, ["reca"], here, gpus=True, name="a").with_name("task.sbatch").read_text()
    assert "#SBATCH --gpus-per-task=1\n" in job and "#SBATCH --cpus-per-task=8\n" in job
    assert "OMP_NUM_THREADS=8\n" in job
    assert "--array=0-2 " in (here / "submit.sh").read_text().splitlines()[5]
    tasks[0].result.unlink()

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
