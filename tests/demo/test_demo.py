"""The whole experiment at a minuscule budget, for every UMM: it runs, and its report says what the run showed."""

import re
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch

from reca.cli import main
from reca.demo import before_after, experiment, measure, report
from reca.demo.arms import Outcome
from reca.demo.captions import caption
from reca.demo.pretrain import DEMO_UMMS, demo_setup
from reca.demo.pretrain.language import WORDS as FACT_WORDS
from reca.demo.scene import Scene
from reca.recipe_files import load_recipe
from reca.toy_world import WORDS
from reca.toy_world.scenes import SIDE, all_pairs, held_out_pairs

SCALE = 0.004
ROWS = ["before", "RECA", "SFT", "RECA-other", "SFT-half", "SFT-full"]


def serial(umm, out):
    """What `run` does, in this process."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        experiment.pretrain(umm, 0, out, SCALE)
        done = {experiment.BEFORE: experiment.measure_start(umm, 0, out, SCALE)}
        for arm in experiment.arms(demo_setup(umm)):
            done[arm.name] = experiment.post_train(umm, 0, out, SCALE, arm)
    finally:
        torch.set_num_threads(threads)
    return {0: done}


@pytest.mark.parametrize("umm", DEMO_UMMS)
def test_the_experiment_runs_to_its_report(umm, tmp_path, monkeypatch):
    (tmp_path / "seed0").mkdir()
    quick = {name: min(value, 10) for name, value in demo_setup(umm).sampling.items() if name.endswith("steps")}
    faster = replace(demo_setup(umm), sampling=demo_setup(umm).sampling | quick)
    monkeypatch.setattr(import_module(f"reca.demo.pretrain.{umm}"), "SETUP", faster)
    results = serial(umm, tmp_path)
    setup = demo_setup(umm)
    wanted = [*ROWS[:3], *([setup.generation_arm[0]] if setup.generation_arm else []), *ROWS[3:]]
    assert list(results[0]) == wanted

    table = report.table(results)
    lines = table.splitlines()
    assert [line.split()[0] for line in lines[2 : 2 + len(wanted)]] == wanted
    page = report.write(results, experiment.arms(setup), umm, tmp_path, SCALE).read_text()
    assert f"--umm {umm} " in page and "Its numbers mean nothing" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)  # one file, nothing fetched
    assert (tmp_path / "before_after.png").is_file()
    for name in wanted:
        assert f"<h3>{name}</h3>" in page
    for outcome in results[0].values():
        assert {"seen", "held-out", "understanding"} <= outcome.measured.rates.keys()
        assert all(image.shape == (3, SIDE, SIDE) for _, image, _ in outcome.measured.samples)
        assert len(outcome.curve) or outcome is results[0]["before"]
    assert setup.generation_arm is not None or setup.omitted_arms
    for reason in setup.omitted_arms.values():
        assert reason in page.replace("&#39;", "'")


@pytest.mark.parametrize("umm", DEMO_UMMS)
def test_the_start_is_where_post_training_starts(umm, tmp_path):
    """A run of no steps has the weights that pre-training left."""
    setup = demo_setup(umm)
    recipe = load_recipe(setup.recipe)
    model = setup.pretrain(recipe, 3, tmp_path / "before", SCALE, lambda *_: None)
    from reca.models import umm_package
    from reca.runs import load_parent

    again = load_recipe(setup.recipe, [setup.init_override.format(folder=tmp_path / "before")])
    loaded = umm_package(umm).Adapter.load(again.model)
    load_parent(loaded, again)
    own = dict(model.named_parameters())
    assert all(torch.equal(p, own[name]) for name, p in loaded.named_parameters())


@pytest.mark.parametrize("umm", DEMO_UMMS)
def test_recipes_know_every_word(umm):
    words = set(load_recipe(demo_setup(umm).recipe).model.words)
    assert set(WORDS) - {"USER", "ASSISTANT", ":", "\n"} <= words
    if umm == "open_uni":
        assert set(FACT_WORDS) <= words


def test_processes_and_the_command_line(tmp_path, capsys, monkeypatch):
    two = experiment.arms(demo_setup("open_uni"))[:2]
    monkeypatch.setattr(experiment, "arms", lambda setup: two)
    assert main(["demo", "--umm", "open_uni", "--scale", str(SCALE), "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "images that show what was asked, % (seeds 0)" in out and "seed 0: held-out RECA - SFT" in out
    assert (tmp_path / "report.html").exists()
    *_, said, page = out.splitlines()
    assert said.startswith("pairs that captions never showed, drawn right, %: RECA ")
    assert page == str(tmp_path / "comparison.html") and "toy world" in (tmp_path / "comparison.html").read_text()


@pytest.mark.parametrize("arguments", [["--umm", "nonsense"], ["--scale", "2"], ["--scale", "0"], ["--seeds", "0"]])
def test_what_cannot_be_run_is_said(arguments, capsys, tmp_path):
    assert main(["demo", "--out", str(tmp_path), *arguments]) == 3
    said = capsys.readouterr().err
    assert (
        "nonsense" in said and "bagel, harmon, janus, open_uni, show_o" in said
        if "nonsense" in arguments
        else "must lie in (0, 1]" in said
    )


def test_the_picture_shows_what_was_drawn_for_held_out_prompts():
    rng = torch.Generator().manual_seed(0)
    prompts = [prompt.text for prompt in measure.prompts(0)]

    def outcome() -> Outcome:
        images = torch.randint(0, 256, (len(prompts), 3, SIDE, SIDE), dtype=torch.uint8, generator=rng)
        return Outcome(measure.Measured({}, 0.0, [(p, x, True) for p, x in zip(prompts, images, strict=True)]), [], 0.0)

    outcomes = {name: outcome() for name in ("before", "RECA", "SFT")}
    sheet = torch.from_numpy(np.array(before_after.before_after(outcomes, 0))).permute(2, 0, 1)
    held_out = [caption(Scene((pair,))) for pair in all_pairs() if pair in held_out_pairs(0)]
    assert len(held_out) == 18 and sheet.shape == (3, 34 + 3 * 108, 92 + 9 * 108)
    for column, prompt in enumerate(held_out[1::2]):
        place = max(i for i, text in enumerate(prompts) if text == prompt)
        for row, name in enumerate(("before", "SFT", "RECA")):
            x, y = 92 + 108 * column, 34 + 108 * row
            found = sheet[:, y : y + 100 : 5, x : x + 100 : 5]
            assert torch.equal(found, outcomes[name].measured.samples[place][1]), (prompt, name)
