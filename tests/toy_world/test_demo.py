"""The whole experiment at a minuscule budget, for every UMM: it runs, and its report says what the run showed."""

import re
from dataclasses import replace
from importlib import import_module

import pytest
import torch

from reca.cli import main
from reca.config import load_recipe
from reca.toy_world import experiment, report
from reca.toy_world.captions import WORDS
from reca.toy_world.pretrain import UMMS, start
from reca.toy_world.pretrain.language import WORDS as FACT_WORDS
from reca.toy_world.scenes import SIDE

SCALE = 0.004
ROWS = ["before", "RECA", "SFT", "RECA-other", "SFT-half", "SFT-full"]


def serial(umm, out):
    """What `run` does, in this process."""
    threads = torch.get_num_threads()
    try:
        done = {experiment.BEFORE: experiment._start(umm, 0, out, SCALE)}
        for arm in experiment.arms(start(umm)):
            done[arm.name] = experiment._post_train(umm, 0, out, arm, SCALE)
    finally:
        torch.set_num_threads(threads)
    return {0: done}


@pytest.mark.parametrize("umm", UMMS)
def test_the_experiment_runs_to_its_report(umm, tmp_path, monkeypatch):
    (tmp_path / "seed0").mkdir()
    quick = {name: min(value, 10) for name, value in start(umm).sampling.items() if name.endswith("steps")}
    faster = replace(start(umm), sampling=start(umm).sampling | quick)
    monkeypatch.setattr(import_module(f"reca.toy_world.pretrain.{umm}"), "START", faster)
    results = serial(umm, tmp_path)
    begin = start(umm)
    wanted = [*ROWS[:3], *([begin.generation[0]] if begin.generation else []), *ROWS[3:]]
    assert list(results[0]) == wanted

    table = report.table(results)
    lines = table.splitlines()
    assert [line.split()[0] for line in lines[2 : 2 + len(wanted)]] == wanted
    page = report.write(results, umm, tmp_path, SCALE).read_text()
    assert f"--umm {umm} " in page and "Its numbers mean nothing" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)  # one file, nothing fetched
    for name in wanted:
        assert f"<h3>{name}</h3>" in page
    for outcome in results[0].values():
        assert {"seen", "held-out", "understanding"} <= outcome.measured.rates.keys()
        assert all(picture.shape == (3, SIDE, SIDE) for _, picture, _ in outcome.measured.samples)
        assert len(outcome.curve) or outcome is results[0]["before"]
    assert begin.generation is not None or begin.left_out
    for reason in begin.left_out.values():
        assert reason in page.replace("&#39;", "'")


@pytest.mark.parametrize("umm", UMMS)
def test_the_start_is_where_post_training_starts(umm, tmp_path):
    """A run of no steps has the weights that pre-training left."""
    begin = start(umm)
    recipe = load_recipe(begin.recipe)
    model = begin.pretrain(recipe, 3, tmp_path / "before", SCALE, lambda *_: None)
    from reca.models import umm_package
    from reca.runs import inherit

    again = load_recipe(begin.recipe, [begin.begins_at.format(folder=tmp_path / "before")])
    loaded = umm_package(umm).Adapter.load(again.model)
    inherit(loaded, again)
    own = dict(model.named_parameters())
    assert all(torch.equal(p, own[name]) for name, p in loaded.named_parameters())


@pytest.mark.parametrize("umm", UMMS)
def test_recipes_know_every_word(umm):
    words = set(load_recipe(start(umm).recipe).model.words)
    assert set(WORDS) - {"USER", "ASSISTANT", ":", "\n"} <= words
    if umm == "open_uni":
        assert set(FACT_WORDS) <= words


def test_processes_and_the_command_line(tmp_path, capsys, monkeypatch):
    two = experiment.arms(start("open_uni"))[:2]
    monkeypatch.setattr(experiment, "arms", lambda begin: two)
    assert main(["demo", "--umm", "open_uni", "--scale", str(SCALE), "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "pictures that show what was asked, % (seeds 0)" in out and "seed 0: held-out RECA - SFT" in out
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize("arguments", [["--umm", "nonsense"], ["--scale", "2"], ["--scale", "0"], ["--seeds", "0"]])
def test_what_cannot_be_run_is_said(arguments, capsys, tmp_path):
    assert main(["demo", "--out", str(tmp_path), *arguments]) == 3
    said = capsys.readouterr().err
    assert (
        "nonsense" in said and "show_o, harmon, open_uni" in said
        if "nonsense" in arguments
        else "must lie in (0, 1]" in said
    )
