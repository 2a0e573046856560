"""`reca best-of`: what is kept, how it goes on after a kill, shares of ranks, and training on it."""

import contextlib
import json
import math
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

import reca
from reca import checkpoint, distributed
from reca.cli import main
from reca.commands import best_of, inference
from reca.config.recipe_files import load_recipe, save_recipe
from reca.data.sources.factory import open_source
from reca.io import jsonl
from reca.models.common.likelihood import LogLikelihood

PROMPTS = ["a red square", "a blue circle", "a green ring", "a red square", "a white cross"]


class Model:
    """Draws grey images whose level is seed % 7, which is how well they fit, and fails when it is told to."""

    def __init__(self, last=10**9):
        self.last, self.drawn = last, []

    def generate(self, prompts, seeds, **_):
        if max(seeds) > self.last:
            raise KeyboardInterrupt
        self.drawn += seeds
        return [torch.full((3, 4, 4), seed % 7, dtype=torch.uint8) for seed in seeds]

    def log_likelihood(self, images, questions, answers):
        assert set(questions) == {best_of.QUESTION} and len(answers) == len(images)
        return [
            LogLikelihood(float(image[0, 0, 0]) - 10, len(text.split()) + 1)
            for image, text in zip(images, answers, strict=True)
        ]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(best_of, "TOGETHER", 3)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_weights_that_were_loaded_are_recorded(tmp_path):
    """A run that goes on saves another checkpoint between the start and the loading."""
    choice = best_of.Choice(2, model="first")

    def load():
        choice.model = "second"
        return Model()

    best_of.choose(load, PROMPTS[:1], choice, tmp_path)
    assert json.loads((tmp_path / "best_of.json").read_text())["model"] == "second"
    choice.model = "second"

    def load_third():
        choice.model = "third"
        return Model()

    with pytest.raises(ValueError, match="model was 'second' and is 'third'"):
        best_of.choose(load_third, PROMPTS[:2], choice, tmp_path)


def test_the_best_is_kept_with_its_prompt_and_scores(tmp_path):
    records = best_of.choose(Model, PROMPTS, best_of.Choice(3, seed=5), tmp_path)
    for number, (record, prompt) in enumerate(zip(records, PROMPTS, strict=True)):
        seeds = [5 + 3 * number + k for k in range(3)]
        levels = [seed % 7 for seed in seeds]
        assert record == {
            "number": number, "image": f"{number:06d}.png", "prompt": prompt, "kept": levels.index(max(levels)),
            "seeds": seeds, "log_likelihood": [level - 10.0 for level in levels], "tokens": len(prompt.split()) + 1,
        }  # fmt: skip
        with Image.open(tmp_path / record["image"]) as image:
            assert image.getpixel((0, 0)) == (max(levels),) * 3
    source = open_source(str(tmp_path), "t2i")
    assert [source[i].text for i in range(5)] == PROMPTS
    lines = best_of.report(records, tmp_path)
    assert (
        lines[0].startswith("kept 5 of 15 images in") and f"data.captions={tmp_path} objective.t2i.weight=1" in lines[1]
    )
    assert sorted(contents(tmp_path).keys() - {f"{i:06d}.{s}" for i in range(5) for s in ("png", "txt")}) == [
        "best_of.json", "scores.jsonl"
    ]  # fmt: skip


@pytest.mark.parametrize("last", [4, 7, 13])
def test_an_interrupted_command_goes_on(tmp_path, last):
    choice = best_of.Choice(3)
    best_of.choose(Model, PROMPTS, choice, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        best_of.choose(lambda: Model(last), PROMPTS, choice, tmp_path / "cut")
    again = Model()
    best_of.choose(lambda: again, PROMPTS, choice, tmp_path / "cut")
    assert contents(tmp_path / "whole") == contents(tmp_path / "cut")
    assert min(again.drawn) == last // 3 * 3
    best_of.choose(lambda: pytest.fail("there is nothing to do"), PROMPTS, choice, tmp_path / "cut")
    best_of.choose(Model, [*PROMPTS, "a ring"], choice, tmp_path / "cut")  # prompts may be appended
    assert len(open_source(str(tmp_path / "cut"), "t2i")) == 6
    (tmp_path / "cut" / "000001.png").unlink()
    gone = Model()
    best_of.choose(lambda: gone, [*PROMPTS, "a ring"], choice, tmp_path / "cut")
    assert gone.drawn == [3, 4, 5]


def test_a_record_that_a_full_disk_tore_takes_no_other_with_it(tmp_path, monkeypatch):
    def write(handle, data, whole=os.write):
        return whole(handle, data[:20] if b'"number": 1' in data else data)

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(OSError, match="free disk space and repeat the command"):
        best_of.choose(Model, PROMPTS, best_of.Choice(2), tmp_path)
    monkeypatch.undo()
    records = best_of.choose(Model, PROMPTS, best_of.Choice(2), tmp_path)
    assert [record["prompt"] for record in records] == PROMPTS


DAMAGED = [
    *((key, ...) for key in best_of.RECORD),
    *[("number", "1"), ("number", -1), ("image", 1), ("prompt", None), ("kept", 2), ("kept", -1), ("kept", "0")],
    *[("seeds", {}), ("log_likelihood", []), ("log_likelihood", [None, 0.0]), ("tokens", "2")],
]


@pytest.mark.parametrize(("key", "value"), DAMAGED)
def test_a_damaged_record_is_made_again(tmp_path, key, value):
    choice = best_of.Choice(2)
    whole = best_of.choose(Model, PROMPTS, choice, tmp_path)
    damaged = {name: one for name, one in whole[1].items() if name != key} | ({} if value is ... else {key: value})
    lines = [whole[0], damaged, *whole[2:]]
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(record) + "\n" for record in lines))
    again = Model()
    assert best_of.choose(lambda: again, PROMPTS, choice, tmp_path) == whole and again.drawn == [2, 3]


def test_ranks_share_the_prompts(tmp_path, monkeypatch):
    """One after the other here: with three ranks, two of which were killed, then with two."""
    choice = best_of.Choice(2)
    best_of.choose(Model, PROMPTS, choice, tmp_path / "one")
    merge, drawn = best_of.merge, []

    def run(rank, world, last=10**9):
        model = Model(last)
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: world)
        monkeypatch.setattr(best_of, "merge", lambda out: None if rank < world - 1 else merge(out))
        with contextlib.suppress(KeyboardInterrupt):
            best_of.choose(lambda: model, PROMPTS, choice, tmp_path / "many")
        drawn.append(sorted(model.drawn))

    run(0, 3, last=1)
    monkeypatch.setattr(best_of, "open_folder", lambda *_: {0: None})  # as the ranks saw it that started together
    run(1, 2)
    monkeypatch.undo()
    assert drawn == [[0, 1], [4, 5, 8, 9]]
    monkeypatch.setattr(best_of, "TOGETHER", 3)
    rest = Model()
    best_of.choose(lambda: rest, PROMPTS, choice, tmp_path / "many")
    assert rest.drawn == [2, 3, 6, 7] and contents(tmp_path / "many") == contents(tmp_path / "one")


@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_load_the_model_or_none(tmp_path, monkeypatch, rank):
    """The checkpoint of a run is read by all of them together, and there may be fewer prompts than ranks."""
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(best_of, "merge", lambda out: None)
    (tmp_path / "best_of.json").write_text(json.dumps(best_of.Choice(2).settings()))
    (tmp_path / best_of.SCORES).touch()
    models = []
    best_of.choose(lambda: models.append(Model()) or models[-1], PROMPTS[:1], best_of.Choice(2), tmp_path)
    assert [len(model.drawn) for model in models] == [0 if rank else 2]


def test_a_score_that_is_no_number_is_not_kept(tmp_path, monkeypatch):
    scores = [float("nan"), -3.0, float("nan")]
    monkeypatch.setattr(Model, "log_likelihood", lambda *_: [LogLikelihood(score, 2) for score in scores])
    (record,) = best_of.choose(Model, PROMPTS[:1], best_of.Choice(3), tmp_path)
    assert record["kept"] == 1


def test_a_question_that_leaves_no_room_for_the_prompt_is_named(tmp_path, monkeypatch):
    """Nothing of it is kept, as every image would be as good."""
    monkeypatch.setattr(Model, "log_likelihood", lambda *_: [LogLikelihood(-math.inf, 0)] * 3)
    with pytest.raises(ValueError, match="--question 'Describe this image.' takes up .* 'a red square' is scored"):
        best_of.choose(Model, PROMPTS[:1], best_of.Choice(3), tmp_path)
    assert not list(tmp_path.glob("*.png"))
    old = {"tokens": 0, "log_likelihood": [-0.0, -0.0], "kept": 0}  # such records were kept once
    assert "per token -inf" in best_of.report([old], tmp_path)[0]


@pytest.mark.parametrize("content", ["", "{", "[", "[]", "[1]", '"text"', "3", "[" * 10**5])
def test_damaged_settings_are_refused(content, tmp_path):
    (tmp_path / "best_of.json").write_text(content)
    with pytest.raises(ValueError, match="best_of.json cannot be read|made with other settings"):
        best_of.open_folder(tmp_path, best_of.Choice(2), PROMPTS)


def test_other_settings_and_prompts_are_refused(tmp_path):
    best_of.choose(Model, PROMPTS, best_of.Choice(2), tmp_path)
    with pytest.raises(
        ValueError, match=r"made with other settings: candidates was 2 and is 3; seed was 0 and is 1. Give another"
    ):
        best_of.choose(Model, PROMPTS, best_of.Choice(3, seed=1), tmp_path)
    with pytest.raises(ValueError, match="made from other prompts: number 0 was 'a red square'"):
        best_of.choose(Model, PROMPTS[1:], best_of.Choice(2), tmp_path)
    (tmp_path / "best_of.json").write_text("{")
    with pytest.raises(ValueError, match=r"best_of.json cannot be read .* remove it"):
        best_of.choose(Model, PROMPTS, best_of.Choice(2), tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), (b" \n\n", "contains no prompt"), (b"\xff\xfe\xff", "is not UTF-16")],
)
def test_prompts_that_cannot_be_read(tmp_path, content, message):
    if content is not None:
        (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        best_of.read_prompts(tmp_path / "prompts.txt")


def test_images_of_two_runs_do_not_mix(tmp_path, monkeypatch, capsys):
    """Both have made as many steps by the same recipe, but for their seeds."""
    (tmp_path / "prompts.txt").write_text("a red square\n")
    for name, weights in (("a", "of a"), ("b", "of b")):
        folder = tmp_path / name / "checkpoints/000007"
        folder.mkdir(parents=True)
        (folder / checkpoint.MARKER).write_text(weights)
        save_recipe(load_recipe("show_o_tiny", {"run_dir": str(tmp_path / "run")}), tmp_path / name / "recipe.yaml")

    def load(options, _):
        model = Model()
        model.state = {"step": 7, "digest": checkpoint.digest(Path(options.recipe))}
        return model

    monkeypatch.setattr(inference, "_model", load)
    monkeypatch.setattr(Model, "tokenizer", None, raising=False)
    monkeypatch.setattr("reca.models.common.inference.warn_of_unknown_words", lambda *_: None)
    monkeypatch.setattr("reca.inference.generate", lambda model, texts, seeds, **_: model.generate(texts, seeds))

    def run(name):
        return main(["best-of", str(tmp_path / name), str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "out")])

    assert run("a") == 0
    before = contents(tmp_path / "out")
    assert run("b") == 3 and contents(tmp_path / "out") == before
    assert "made with other settings: model was {'umm': 'show_o', 'step': 7, " in capsys.readouterr().err
    (tmp_path / "a").rename(tmp_path / "moved")
    assert run("moved") == 0 and contents(tmp_path / "out") == before


def test_a_damaged_checkpoint_is_not_replaced_by_the_one_before_it(tmp_path, monkeypatch, capsys):
    """The same command would then be refused, as its folder has images of another step than the newest."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a red square\n")
    keys = ["train.steps=1", "run_dir=run", "log.tensorboard=false", "log.reconstructions=0", "data.workers=0"]
    assert main(["train", "show_o_tiny", *keys]) == 0
    newest = Path(shutil.copytree("run/checkpoints/000001", "run/checkpoints/000002"))
    weights = next((newest / "weights").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    command = ["best-of", "run", "prompts.txt", "--candidates", "2", "--out", "kept", "--sampling", "steps=2"]
    for _ in range(2):
        assert main(command) == 3
        assert "run/checkpoints/000002 is damaged" in capsys.readouterr().err
    shutil.rmtree(newest)
    for _ in range(2):
        assert main(command) == 0
    assert json.loads(Path("kept/best_of.json").read_text())["model"]["step"] == 1


@pytest.mark.parametrize("umm", ["show_o", "harmon", "open_uni", "bagel"])
def test_the_command_and_training_on_what_it_kept(tmp_path, umm, capsys, monkeypatch):
    """Scores in the file are those of the images in the folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a red square\n\na blue circle\n")
    fast = ["--sampling", "diffusion_steps=2"] if umm == "harmon" else []
    options = {"diffusion_steps": 2} if fast else {}
    command = [
        "best-of",
        f"{umm}_tiny",
        "prompts.txt",
        "--candidates",
        "2",
        "--out",
        "kept",
        "--sampling",
        "steps=2",
        *fast,
    ]
    given, initialize = [], distributed.initialize
    monkeypatch.setattr(distributed, "initialize", lambda minutes: given.append(minutes) or initialize(minutes))
    assert main([*command, "--question", "what is this"]) == 0
    assert given == [60 * distributed.HOURS]  # ranks draw alone
    assert "kept 2 of 4 images in kept" in capsys.readouterr().out
    records, model = jsonl.read(tmp_path / "kept" / "scores.jsonl"), reca.load(f"{umm}_tiny")
    for record in records:
        drawn = model.generate([record["prompt"]] * 2, record["seeds"], steps=2, **options)
        scores = model.log_likelihood(drawn, ["what is this"] * 2, [record["prompt"]] * 2)
        assert [score.sum for score in scores] == pytest.approx(record["log_likelihood"], rel=1e-4)
        assert record["kept"] == max(range(2), key=lambda k, record=record: record["log_likelihood"][k])
        with Image.open(tmp_path / "kept" / record["image"]) as image:
            assert image.size == tuple(drawn[0].shape[1:])
    keys = ["data.captions=kept", "objective.t2i.weight=1", "objective.reca.weight=0", "objective.i2t.weight=0"]
    keys += [
        "train.steps=1",
        "objective.t2i.batch_size=2",
        "run_dir=sft",
        "log.tensorboard=false",
        "log.reconstructions=0",
    ]
    assert main(["train", f"{umm}_tiny", *keys]) == 0
    assert main(["best-of", "sft", "prompts.txt", "--candidates", "2", "--out", "kept", "--sampling", "steps=2"]) == 3
    assert "made with other settings: model was" in capsys.readouterr().err
    assert main([*command[:4], "0", *command[5:]]) == 3 and json.loads((tmp_path / "kept/best_of.json").read_text())


def test_a_model_without_i2t_generates_and_cannot_score(tmp_path, capsys, monkeypatch):
    """It is said before the first image, of which none could be scored; nothing else offers it what it cannot do."""
    from reca.models.show_o import Adapter, Config

    module = ModuleType("own.model")
    module.Config, module.Adapter = Config, type("Own", (Adapter,), {"tasks": frozenset({"t2i"})})
    monkeypatch.setitem(sys.modules, "own", ModuleType("own"))
    monkeypatch.setitem(sys.modules, "own.model", module)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a red square\n")
    assert main(["best-of", "show_o_tiny", "prompts.txt", "umm=own.model", "--out", "kept"]) == 3
    assert "reca: own.model cannot score prompts: it has no i2t task" in capsys.readouterr().err
    assert not list((tmp_path / "kept").iterdir())
    module.Adapter.abilities = frozenset({"reconstruct"})
    keys = [f"objective.{task}.weight={int(task == 't2i')}" for task in ("reca", "i2t", "t2i")]
    keys += ["train.steps=1", "objective.t2i.batch_size=2", "run_dir=run", "log.tensorboard=false", "data.workers=0"]
    assert main(["train", "show_o_tiny", "umm=own.model", *keys]) == 0
    assert "1 step done.\n" in capsys.readouterr().out
    assert main(["compare", "base", "run", "--out", "compared"]) == 0 and "mme" not in capsys.readouterr().out
