"""The whole experiment at a minuscule budget, for every UMM: it runs, and its report says what the run showed."""

import html
import json
import re
import subprocess
import sys
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
import torch

from reca import exits
from reca.cli import main
from reca.config.recipe_files import load_recipe, save_recipe
from reca.data.pixels import read_image
from reca.demo import before_after, experiment, measure, report
from reca.demo.pretrain import demo_setup
from reca.demo.pretrain.language import WORDS as FACT_WORDS
from reca.demo.variants import Outcome, pretrained_models, variants
from reca.models.common.efficientnet import imagenet_weights
from reca.models.common.weight_files import read_tensors
from reca.processes import side_by_side
from reca.processes.side_by_side import Failure
from reca.runs import folder_lock
from reca.toy_datasets import shapes
from reca.toy_datasets.captions import caption
from reca.toy_datasets.dataset import load_dataset
from reca.toy_datasets.scene import Scene
from reca.toy_datasets.shapes.scenes import SIDE, all_pairs, held_out_pairs
from tests.toy_datasets.artwork import needs_artwork, needs_weights

SCALE = 0.004
SHAPES = shapes.DATASET
ROWS = {
    "shapes": ["before", "RECA", "SFT", "RECA-other", "SFT-half", "SFT-full"],
    "emoji": ["before", "RECA", "SFT", "RECA-other", "SFT-none", "SFT-full", "before-random", "RECA-random"],
}
DEMOS = [
    pytest.param(load_dataset(name), umm, marks=[needs_artwork] if name == "emoji" else [], id=f"{name}-{umm}")
    for name in ROWS  # jitter has the setups of shapes
    for umm in load_dataset(name).umms
    if (name, umm) != ("emoji", "open_uni")  # below, in less time
]


def serial(umm, dataset, out):
    """What `run` does, in this process."""
    case, setup = experiment.Case(umm, dataset.name, 0, out, SCALE), demo_setup(umm, dataset)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        done = {}
        for pretrained in pretrained_models(setup):
            experiment.pretrain(case, pretrained)
            done[pretrained.name] = experiment.measure_pretrained(case, pretrained)
            for variant in variants(dataset, setup):
                if variant.pretrained == pretrained.name:
                    done[variant.name] = experiment.post_train(case, variant, pretrained)
    finally:
        torch.set_num_threads(threads)
    return {0: done}


@pytest.mark.parametrize(("dataset", "umm"), DEMOS)
def test_the_experiment_runs_to_its_report(dataset, umm, tmp_path, monkeypatch):
    (tmp_path / "seed0").mkdir()
    setup = demo_setup(umm, dataset)
    quick = {name: min(value, 10) for name, value in setup.sampling.items() if name.endswith("steps")}
    faster = replace(setup, sampling=setup.sampling | quick)
    if dataset.name == "emoji":  # a codebook and images of this size would take a minute
        small = load_recipe(setup.recipe, ["model.patches.entries=64", "model.efficientnet.image_size=32"])
        save_recipe(small, tmp_path / "small.yaml")
        faster = replace(faster, recipe=str(tmp_path / "small.yaml"))
    monkeypatch.setitem(import_module(f"reca.demo.pretrain.{umm}").SETUPS, dataset.name, faster)
    results = serial(umm, dataset, tmp_path)
    rows = ROWS[dataset.name]
    wanted = [*rows[:3], *([setup.generation_variant[0]] if setup.generation_variant else []), *rows[3:]]
    assert list(results[0]) == wanted

    table = report.table(results)
    lines = table.splitlines()
    assert [line.split()[0] for line in lines[2 : 2 + len(wanted)]] == wanted
    page = report.write(results, umm, dataset, tmp_path, SCALE).read_text()
    assert f"--umm {umm} " in page and "Its numbers mean nothing" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)  # one file, nothing fetched
    assert (tmp_path / "before_after.png").is_file()
    for name in wanted:
        assert f"<h3>{name}</h3>" in page
    for outcome in results[0].values():
        assert {"seen", "held-out", "understanding"} <= outcome.measured.rates.keys()
        side = dataset.splits["unseen"](0).image(0).shape[-1]
        assert all(image.shape == (3, side, side) for _, image, _ in outcome.measured.samples)
        assert len(outcome.curve) or any(
            outcome is results[0][pretrained.name] for pretrained in pretrained_models(setup)
        )
    for said in (*setup.omitted_variants.values(), *setup.assumptions, *dataset.assumptions, *dataset.credits):
        assert said in page.replace("&#39;", "'").replace("&#34;", '"')

    case = experiment.Case(umm, dataset.name, 0, tmp_path, SCALE)
    last = experiment.compare(case, results[0]["before"], results[0]["RECA"])
    assert last == tmp_path / "comparison.html"
    found = json.loads((tmp_path / "comparison.json").read_text())
    assert [suite["protocol"] for suite in found["suites"]] == [dataset.title]
    triplets = found["reconstructions"]
    assert triplets["source"] == dataset.spec("unseen", 0) and len(triplets["rows"]) == 8
    for number, row in enumerate(triplets["rows"]):
        images = [read_image(tmp_path / row[name]) for name in ("input", "before", "after")]
        assert all(image.shape == images[0].shape for image in images)
        assert torch.equal(images[0], dataset.splits["unseen"](0).image(number))
    assert last.read_text().count("reconstructed after: ") == 8


@needs_artwork
@needs_weights
def test_open_uni_trains_and_draws_emoji(tmp_path, monkeypatch):
    emoji, small = load_dataset("emoji"), ["model.codebook.entries=64", "model.efficientnet.image_size=32"]
    setup = demo_setup("open_uni", emoji)
    save_recipe(load_recipe(setup.recipe, small), tmp_path / "small.yaml")
    faster = replace(setup, recipe=str(tmp_path / "small.yaml"), sampling={"steps": 2, "guidance": 1.0})
    monkeypatch.setitem(import_module("reca.demo.pretrain.open_uni").SETUPS, "emoji", faster)
    case, towers = experiment.Case("open_uni", "emoji", 0, tmp_path, SCALE), []
    case.folder().mkdir()
    for pretrained in pretrained_models(faster):
        experiment.pretrain(case, pretrained)
        towers.append(read_tensors(case.folder(pretrained.name) / "frozen.safetensors"))
    entry = "mllm.model.vision_tower._conv_stem.weight"
    assert torch.equal(towers[0][entry], imagenet_weights()["_conv_stem.weight"])
    assert not torch.equal(towers[1][entry], towers[0][entry])
    assert all(tower["mllm.model.multi_modal_projector.scale"].std() > 0 for tower in towers)  # fitted

    outcome = experiment.post_train(case, variants(emoji, faster)[0], pretrained_models(faster)[0])
    assert outcome.curve and {"seen", "held-out", "understanding"} <= outcome.measured.rates.keys()
    assert all(image.shape == (3, 64, 64) for _, image, _ in outcome.measured.samples)


def test_every_model_has_the_variant_of_its_generation_side_or_says_why_not():
    for umm in SHAPES.umms:
        setup = demo_setup(umm, SHAPES)
        assert setup.generation_variant is not None or setup.omitted_variants


@pytest.mark.parametrize("umm", SHAPES.umms)
def test_post_training_starts_from_the_saved_weights(umm, tmp_path):
    """A run of no steps has the weights that pre-training left."""
    setup = demo_setup(umm, SHAPES)
    recipe = load_recipe(setup.recipe)
    model = setup.pretrain(recipe, 3, tmp_path / "before", SCALE, lambda *_: None)
    from reca.models import umm_package
    from reca.runs.lineage import load_parent

    again = load_recipe(setup.recipe, [setup.init_override.format(folder=tmp_path / "before")])
    loaded = umm_package(umm).Adapter.load(again.model)
    load_parent(loaded, again)
    own = dict(model.named_parameters())
    assert all(torch.equal(p, own[name]) for name, p in loaded.named_parameters())


@pytest.mark.parametrize("umm", SHAPES.umms)
def test_recipes_know_every_word(umm):
    words = set(load_recipe(demo_setup(umm, SHAPES).recipe).model.words)
    assert set(shapes.WORDS) - {"USER", "ASSISTANT", ":", "\n"} <= words
    if umm == "open_uni":
        assert set(FACT_WORDS) <= words


def test_processes_and_the_command_line(tmp_path, capsys, monkeypatch):
    two = variants(SHAPES, demo_setup("open_uni", SHAPES))[:2]
    monkeypatch.setattr(experiment, "variants", lambda dataset, setup: two)
    assert (
        main(["demo", "--umm", "open_uni", "--dataset", "shapes", "--scale", str(SCALE), "--out", str(tmp_path)]) == 0
    )
    out = capsys.readouterr().out
    assert "images that show what was asked, % (seeds 0)" in out and "seed 0: held-out RECA - SFT" in out
    assert (tmp_path / "report.html").exists()
    *_, said, page = out.splitlines()
    assert said.startswith("correct images for pairs that no caption shows, %: RECA ")
    assert page == str(tmp_path / "comparison.html") and "Reconstructions" in (tmp_path / "comparison.html").read_text()


def test_a_variant_that_fails_is_reported_while_others_go_on(tmp_path, capsys, monkeypatch):
    failed = Failure(ValueError("no such key"))

    def run(jobs, slots, ended, wait):
        ended(jobs[1], failed)
        assert "0/RECA FAILED, ValueError: no such key" in capsys.readouterr().out
        return {jobs[1].name: failed}

    monkeypatch.setattr(side_by_side, "run", run)
    assert experiment.run("show_o", SHAPES, range(1), tmp_path, SCALE) == ({}, {"0/RECA": failed})


@pytest.mark.parametrize("missing", ["before", "RECA", "SFT"])
def test_what_finished_is_reported_beside_a_variant_that_failed(missing, tmp_path, capsys, monkeypatch):
    one = drawn(SHAPES)
    results = {0: {name: made for name, made in one.items() if name != missing}, 1: one}
    failed = {f"0/{missing}": Failure(ValueError("no such key")), "comparison": Failure(None, f"0/{missing}")}
    for seeds in ((0,), (0, 1)):
        monkeypatch.setattr(experiment, "run", lambda *_, s=seeds: ({seed: results[seed] for seed in s}, failed))
        command = ["demo", "--umm", "show_o", "--dataset", "shapes", "--seeds", str(len(seeds)), "--out", str(tmp_path)]
        assert main(command) == 3
        said, page = capsys.readouterr(), (tmp_path / "report.html").read_text()
        assert "no such key" in said.err and f"0/{missing} FAILED, ValueError: no such key" in said.out
        assert f"<li>0/{missing}: ValueError: no such key</li>" in page and page.count("<h3>") == 2
        assert (f"\n{missing} " in said.out) == (len(seeds) == 2) and (tmp_path / "before_after.png").is_file()


def test_pages_of_an_earlier_call_do_not_stand_beside_the_runs_of_one_that_failed(tmp_path, monkeypatch):
    for name in ("report.html", "before_after.png", "comparison.html"):
        (tmp_path / name).touch()
    monkeypatch.setattr(experiment, "run", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        experiment.demo("show_o", SHAPES, 1, tmp_path, SCALE)
    assert [path.name for path in tmp_path.iterdir()] == [folder_lock.FILE]


def test_a_second_demo_leaves_the_folder_of_the_first_alone(tmp_path, capsys):
    (tmp_path / "seed0").mkdir()
    code = """if True:
        import pathlib, sys
        from reca.demo import experiment
        experiment.run = lambda *_: print("began", flush=True) or sys.stdin.read()
        experiment.demo("show_o", None, 1, pathlib.Path(sys.argv[1]))
    """
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as first:
        assert first.stdout.readline() == b"began\n"
        assert main(["demo", "--umm", "show_o", "--dataset", "shapes", "--out", str(tmp_path)]) == exits.IN_USE
        first.stdin.close()
    assert f"{tmp_path} is in use by process {first.pid} on " in capsys.readouterr().err
    assert (tmp_path / "seed0").is_dir()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--umm nonsense", "is one of bagel, harmon, janus, janusflow, open_uni, show_o"),
        ("--dataset nonsense", "is one of emoji, shapes"),
        ("--dataset emoji --umm bagel", "on the toy dataset 'emoji'; --umm (UMM= of make) is one of open_uni, show_o"),
        ("--scale 2", "must lie in (0, 1]"),
        ("--scale 0", "must lie in (0, 1]"),
        ("--seeds 0", "must lie in (0, 1]"),
    ],
)
def test_what_cannot_be_run_is_said(arguments, message, capsys, tmp_path):
    assert main(["demo", "--out", str(tmp_path), *arguments.split()]) == 3
    assert message in capsys.readouterr().err


def test_the_image_shows_what_was_drawn_for_held_out_prompts():
    rng = torch.Generator().manual_seed(0)
    prompts = [prompt.text for prompt in SHAPES.prompts(0)]

    def outcome() -> Outcome:
        images = torch.randint(0, 256, (len(prompts), 3, SIDE, SIDE), dtype=torch.uint8, generator=rng)
        return Outcome(measure.Measured({}, 0.0, [(p, x, True) for p, x in zip(prompts, images, strict=True)]), [], 0.0)

    outcomes = {name: outcome() for name in ("before", "RECA", "SFT")}
    sheet = torch.from_numpy(np.array(before_after.before_after(outcomes, SHAPES, 0))).permute(2, 0, 1)
    held_out = [caption(Scene((pair,))) for pair in all_pairs() if pair in held_out_pairs(0)]
    assert len(held_out) == 18 and sheet.shape == (3, 40 + 3 * 108, 92 + 9 * 108)
    for column, prompt in enumerate(held_out[1::2]):
        place = max(i for i, text in enumerate(prompts) if text == prompt)
        for row, name in enumerate(("before", "SFT", "RECA")):
            x, y = 92 + 108 * column, 40 + 108 * row
            found = sheet[:, y : y + 100 : 5, x : x + 100 : 5]
            assert torch.equal(found, outcomes[name].measured.samples[place][1]), (prompt, name)


def drawn(dataset, held_out=(0, 0, 0)):
    """What a run's results are like. held_out: hits of 288 of before, RECA and SFT."""
    names = ["seen", "understanding", *(f"{name}, all" for name in dataset.categories)]
    rest = dict.fromkeys(names, measure.Rate(40, 48))
    samples = [(prompt.text, torch.zeros(3, SIDE, SIDE, dtype=torch.uint8), True) for prompt in dataset.prompts(0)]
    return {
        name: Outcome(measure.Measured(rest | {"held-out": measure.Rate(hits, 288)}, 0.5, samples), [], 0.0)
        for name, hits in zip(("before", "RECA", "SFT"), held_out, strict=True)
    }


@pytest.mark.parametrize(
    ("reca", "sft", "said"),
    [(143, 66, "+26.7 points, intervals apart"), (66, 143, "-26.7 points, intervals apart"), (66, 70, "OVERLAPPING")],
)
def test_intervals_are_apart_whoever_is_ahead(reca, sft, said):
    (sentence,) = report.verdicts({2: drawn(SHAPES, (0, reca, sft))})
    assert said in sentence


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("jitter", ["reca.toy_datasets.shapes.jitter:unlabeled?seed=0&caption_detail=sparse", "'steps': 20"]),
        ("emoji-shared", ["reca.toy_datasets.emoji.shared:understood?seed=0", "'size': 8, 'entries': 1024"]),
    ],
)
def test_the_report_has_the_settings_that_variants_ran_with(name, settings, tmp_path):
    dataset = load_dataset(name)
    page = html.unescape(report.write({0: drawn(dataset)}, "show_o", dataset, tmp_path, scale=0.1).read_text())
    assert all(text in page for text in (*settings, "all for 20 steps")) and "reca.toy_datasets.shapes:u" not in page
