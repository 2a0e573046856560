"""`import reca`: load and train, as the command line does."""

import json
import logging
import re
import shutil
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

import reca
from reca import api, cli
from reca.checkpoint import MARKER, CheckpointError
from reca.config.recipe_files import load_recipe, recipe_names, reread, save_recipe
from reca.eval.errors import EvaluationError
from reca.options.fields import RecipeError
from reca.runs.lineage import recipe_of, trained_source
from tests.driver.toy import ToyAdapter, ToyConfig, write_images, write_recipe

SMALL = ["data.workers=0", "objective.i2t.weight=0", "objective.reca.batch_size=4", "log.tensorboard=false"]


def test_importing_reca_is_light():
    heavy = (
        "import sys, reca; assert reca.__version__; print([m for m in ('torch', 'numpy', 'yaml') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_what_reca_offers():
    assert reca.load is api.load and reca.train is api.train
    with pytest.raises(AttributeError, match="'reca' has no attribute 'lode'; it offers .*load, train"):
        reca.lode  # noqa: B018


def test_what_reca_offers_is_completed():
    """`dir` is what a notebook completes from, and the functions are loaded by the first access."""
    assert set(reca.__all__) <= set(dir(reca))


@pytest.mark.parametrize(
    "given, said",
    [
        ({"sampling": "steps=8"}, "sampling='steps=8' must be a dict, such as {'steps': 8}"),
        ({"judge_options": ["workers=2"]}, "judge_options=['workers=2'] must be a dict"),
        ({"limit": 2.5}, "limit=2.5 must be a whole number"),
        ({"images_per_item": "4"}, "images_per_item='4' must be a whole number"),
        ({"seed": None}, "seed=None must be a whole number"),
    ],
)
def test_arguments_of_another_type_are_named(given, said, tmp_path):
    with pytest.raises(EvaluationError, match=re.escape(said)):
        reca.evaluate("toy", "show_o_tiny", out=tmp_path, **given)


@pytest.mark.parametrize(
    "given, said",
    [
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"images_per_item": 0}, "images_per_item must be at least 1, got 0"),
        ({"steps": ["draw"]}, "steps 'draw': unknown; the steps are generate,"),
        ({"seed": -1}, "seed -1 is outside 0 to 2**56 - 1"),
    ],
)
def test_values_of_arguments_are_checked_by_their_names_in_python(given, said, tmp_path):
    with pytest.raises(ValueError, match=f"^{re.escape(said)}"):
        reca.evaluate("toy", "show_o_tiny", out=tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_a_recipe_changed_in_python_has_its_paths_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    trained = []
    monkeypatch.setattr(api, "Trainer", lambda recipe, model: trained.append(recipe) or SimpleNamespace(run=int))
    recipe = load_recipe("show_o_tiny", {"run_dir": tmp_path / "run"})
    recipe.model.weights, recipe.data.images = "~/weights", [{"source": "~/photos", "weight": 1}]
    reca.train(recipe)
    assert trained[0].model.weights == f"{tmp_path}/weights" and recipe.model.weights == "~/weights"
    assert trained[0].data.images == [{"source": f"{tmp_path}/photos", "weight": 1}]
    recipe.model.weights = "~nobody-of-this-name/weights"
    with pytest.raises(RecipeError, match="model.weights in the recipe: .* there is no such user"):
        reca.train(recipe)


@pytest.mark.parametrize(
    ("group", "name", "value", "said"),
    [
        ("optim", "lr", -1, "optim.lr=-1 must be at least 0"),
        ("optim", "lr", "fast", "optim.lr='fast' in the recipe: expected a number"),
        ("optim", "name", "sgd", "optim.name='sgd' is not one of 'adamw'"),
        ("train", "steps", None, "train.steps in the recipe cannot be null"),
        ("train", "steps", object(), "train.steps in the recipe has an object of type object"),
        ("train", "lr", 1e-3, "unknown key 'train.lr' in the recipe; did you mean optim.lr?"),
        ("checkpoint", "keep_every", 3, "checkpoint.keep_every=3 must be a multiple of checkpoint.every=0"),
        (None, "umm", "bagel", "unknown key 'model.clip_weights' in the recipe for umm=bagel"),
        (None, "optim", 1e-3, "optim in the recipe is a group of keys"),
    ],
)
def test_a_recipe_changed_in_python_is_checked_as_one_that_is_read(group, name, value, said, tmp_path):
    recipe = load_recipe("show_o_tiny", {"run_dir": tmp_path / "run"})
    setattr(getattr(recipe, group) if group else recipe, name, value)
    with pytest.raises(RecipeError, match=f"^{re.escape(said)}"):
        reca.train(recipe)
    assert not (tmp_path / "run").exists()


def test_a_recipe_that_is_read_again_is_the_same():
    texts = ['a, "b"', " c ", "null", "x\ny", "it's", "{a: b}", "[x", "-1"]
    for name in recipe_names():
        recipe = load_recipe(name)
        recipe.log.prompts, recipe.optim.betas, recipe.optim.lr = texts, (0.1, 1 / 3), np.float64(0.1)
        again = reread(recipe)
        assert again == load_recipe(name, {"log.prompts": texts, "optim.betas": [0.1, 1 / 3], "optim.lr": 0.1})
        assert type(again.optim.lr) is float


def test_a_run_is_trained_continued_and_loaded(tmp_path, caplog, monkeypatch):
    folder = tmp_path / "run"
    given = {"run_dir": folder, "train": {"steps": 1, "threads": 1}, "data.workers": 0, "objective.i2t.weight": 0}
    given |= {"objective.reca.batch_size": 4, "log.tensorboard": False}
    run = reca.train("show_o_tiny", given)
    assert run == (folder, 1, True)
    assert reca.train("show_o_tiny", given) == (folder, 1, False)
    assert reca.train(load_recipe("show_o_tiny", given | {"train.steps": 2})) == (folder, 2, True)
    model, start = reca.load(folder), reca.load("show_o_tiny")
    assert not model.training and model.name == "show_o"
    assert not torch.equal(model.showo.lm_head.weight, start.showo.lm_head.weight)
    image = model.generate(["a red square"], seeds=[0], steps=2)[0]
    assert image.shape == (3, 20, 20) and torch.equal(
        image, reca.load(str(folder)).generate(["a red square"], [0], steps=2)[0]
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    with torch.device("meta"):  # the caller's default
        again = reca.load("~/run")
    assert torch.equal(again.showo.lm_head.weight, model.showo.lm_head.weight)
    found = reca.evaluate("toy", "~/run", limit=1, sampling={"steps": 1}, out="~/found")
    assert found == json.loads((tmp_path / "found/results.json").read_text())
    with pytest.raises(RecipeError, match=rf"is inside the run folder '{folder}': pass that folder.*: 000001, 000002"):
        reca.load(folder / "checkpoints" / "000003")
    assert "is the recipe of a run" not in caplog.text
    assert torch.equal(reca.load(folder / "recipe.yaml").showo.lm_head.weight, start.showo.lm_head.weight)
    assert f"loads the model before training; for the trained model pass the folder {folder}" in caplog.text


@pytest.fixture
def toys(monkeypatch):
    """The toy model as an importable umm."""
    module = ModuleType("toys.model")
    module.Config, module.Adapter = ToyConfig, ToyAdapter
    monkeypatch.setitem(sys.modules, "toys", ModuleType("toys"))
    monkeypatch.setitem(sys.modules, "toys.model", module)
    return "umm=toys.model"


def test_a_model_of_ones_own_is_trained(tmp_path, toys):
    recipe, model = write_recipe(tmp_path, write_images(tmp_path / "images")), ToyAdapter()
    before = model.layers[0].weight.detach().clone()
    assert reca.train(recipe, [toys, "train.steps=2"], model=model).steps == 2
    assert not torch.equal(model.layers[0].weight, before)


def test_a_model_of_another_class_is_not_trained(tmp_path):
    """Its run could not be loaded, resumed from the command line or exported."""
    recipe = write_recipe(tmp_path, write_images(tmp_path / "images"))
    with pytest.raises(RecipeError, match=r"is a tests.driver.toy.ToyAdapter, and the recipe's umm is show_o"):
        reca.train(recipe, ["train.steps=2"], model=ToyAdapter())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_a_caller_that_has_switched_gradients_off_can_train(tmp_path, toys, off):
    recipe, model = write_recipe(tmp_path, write_images(tmp_path / "images")), ToyAdapter()
    with off():
        assert reca.train(recipe, [toys, "train.steps=1"], model=model).steps == 1
        assert not torch.is_grad_enabled()


def test_a_caller_with_another_default_device_evaluates_alike(tmp_path):
    """The judge of the toy dataset took its tensors for images of another size."""

    def results(out):
        return reca.evaluate("toy", "show_o_tiny", limit=1, sampling={"steps": 1}, out=out)["overall"]

    wanted = results(tmp_path / "a")
    with torch.device("meta"):
        assert results(tmp_path / "b") == wanted


def test_a_model_of_other_keys_is_not_trained(tmp_path):
    """Its run would be loaded with the recipe's keys: as another model, or with other frozen weights."""
    small = {"model": {"phi": {"num_hidden_layers": 1}, "seed": 3}}
    model = reca.load("show_o_tiny", small)
    given = {"run_dir": tmp_path / "run", "train": {"steps": 1}, "data.workers": 0, "log.tensorboard": False}
    with pytest.raises(RecipeError, match=r"\(model.phi.num_hidden_layers 1, not 3; model.seed 3, not 0\)"):
        reca.train("show_o_tiny", given, model=model)
    assert not (tmp_path / "run").exists()
    assert reca.train("show_o_tiny", given | small, model=model).steps == 1
    assert torch.equal(reca.load(tmp_path / "run").showo.lm_head.weight, model.showo.lm_head.weight)


def test_attention_is_listed_as_it_ran_in_this_run(tmp_path, monkeypatch, capsys):
    for number, impl in enumerate(("sdpa", "dense")):
        monkeypatch.setenv("RECA_ATTENTION", impl)
        reca.train("show_o_tiny", [*SMALL, "train.steps=1", f"run_dir={tmp_path / str(number)}"])
        (line,) = [line for line in "".join(capsys.readouterr()).splitlines() if "attention  " in line]
        assert re.findall("sdpa|dense", line) == [impl]


def test_overrides_have_two_forms():
    given = {"optim": {"lr": 3e-4, "betas": (0.8, 0.9)}, "train.init_from": None, "log.prompts": ["a, b", "null"]}
    texts = ["optim.lr=3e-4", "optim.betas=[0.8, 0.9]", "train.init_from=null", 'log.prompts=["a, b", "null"]']
    assert load_recipe("show_o_tiny", given) == load_recipe("show_o_tiny", texts)
    with pytest.raises(RecipeError, match="overrides='train.steps=3' must be a list of key=value, or a dict"):
        load_recipe("show_o_tiny", "train.steps=3")
    with pytest.raises(RecipeError, match="did you mean train.steps"):
        load_recipe("show_o_tiny", {"train": {"step": 3}})
    with pytest.raises(TypeError, match="change the Recipe itself"):
        reca.train(load_recipe("show_o_tiny"), SMALL)


def test_sources_that_are_none(tmp_path):
    with pytest.raises(RecipeError, match="is not a run folder .*, and there is no recipe"):
        reca.load(tmp_path)
    with pytest.raises(RecipeError, match="'show_oo' is not a run folder"):
        reca.load("show_oo")


def test_the_folder_of_a_run_is_no_recipe(tmp_path, monkeypatch):
    save_recipe(load_recipe("show_o_tiny"), tmp_path / "recipe.yaml")
    (tmp_path / "bagel_tiny").mkdir()
    shutil.copy(tmp_path / "recipe.yaml", tmp_path / "bagel_tiny")
    monkeypatch.chdir(tmp_path)  # as where a run has the name of its recipe, and the command is given beside it
    assert load_recipe("bagel_tiny").umm == "bagel"
    for name in (tmp_path, f"{tmp_path}/"):
        with pytest.raises(RecipeError, match=f"is a run folder; its recipe is {tmp_path}/recipe.yaml"):
            reca.train(name, ["train.steps=1"])


def test_an_export_is_said_to_be_loaded_by_its_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exported").mkdir()
    with pytest.raises(RecipeError, match=r"'exported' is not a run .* with model.weights=exported\), and there"):
        reca.load("exported")
    with pytest.raises(RecipeError, match="init_from=exported .* an export, write model.weights=exported instead"):
        reca.train("show_o_tiny", {"train.init_from": "exported"})


def test_a_random_model_is_said_to_be_one(caplog):
    with caplog.at_level(logging.WARNING, logger="reca"):
        reca.load("show_o_tiny")
    assert "show_o_tiny names no weights" in caplog.text


def test_the_command_line_has_no_second_way(monkeypatch, tmp_path, capsys):
    calls = []
    monkeypatch.setattr(api, "train", lambda recipe: calls.append(recipe) or api.TrainedRun(tmp_path, 7, True))
    assert cli.main(["train", "show_o_tiny", f"run_dir={tmp_path}"]) == 0
    assert calls[0].run_dir == str(tmp_path) and "7 steps done" in capsys.readouterr().out
    monkeypatch.setattr(api, "load", lambda *given, ema: calls.append(given) or 1 / 0)
    for command in (
        ["generate", "--prompt", "a"],
        ["export", "--out", str(tmp_path)],
    ):
        cli.main([command[0], "show_o_tiny", "model.seed=1", *command[1:]])
        assert calls[-1] == ("show_o_tiny", ["model.seed=1"])
    monkeypatch.setattr(api, "evaluate", lambda *given, **options: calls.append((given, options["limit"])))
    assert cli.main(["eval", "toy", "show_o_tiny", "model.seed=1", "--limit", "3"]) == 0
    assert calls[-1] == (("toy", "show_o_tiny", ["model.seed=1"]), 3)


def test_an_earlier_checkpoint_is_loaded_evaluated_exported_and_compared(tmp_path):
    """What checkpoint.keep_every keeps, such as that of the best held-out loss."""
    run = tmp_path / "run"
    given = {"run_dir": run, "train": {"steps": 2, "threads": 1}, "data.workers": 0, "objective.i2t.weight": 0}
    given |= {"objective.reca.batch_size": 4, "log.tensorboard": False, "checkpoint": {"every": 1, "keep_every": 1}}
    reca.train("show_o_tiny", given)
    first, last = (reca.load(run / "checkpoints" / step) for step in ("000001", "000002"))
    assert first.state["step"] == 1 and not torch.equal(first.showo.lm_head.weight, last.showo.lm_head.weight)
    assert torch.equal(last.showo.lm_head.weight, reca.load(run).showo.lm_head.weight)
    options = {"limit": 1, "sampling": {"steps": 1}, "against": "base"}
    scores = [reca.evaluate("toy", source, **options) for source in (run / "checkpoints/000001", run)]
    assert [found["model"]["step"] for found in scores] == [1, 2]
    assert scores[0] == json.loads((run / "eval/000001/toy/results.json").read_text())
    earlier = str(run / "checkpoints/000001")
    assert cli.main(["export", earlier, "--out", str(tmp_path / "out"), "--card"]) == 0
    exported = reca.load("show_o_tiny", {"model.weights": tmp_path / "out"})
    assert torch.equal(exported.showo.lm_head.weight, first.showo.lm_head.weight)
    assert "after 1 steps of" in (tmp_path / "out/README.md").read_text()
    assert cli.main(["compare", earlier, str(run), "--reconstructions", "0"]) == 0
    compared = json.loads((run / "comparison/comparison.json").read_text())
    assert [compared[side]["step"] for side in ("before", "after")] == [1, 2] and compared["suites"]
    assert cli.main(["compare", "base", f"{earlier}/", "--reconstructions", "0"]) == 0
    assert json.loads((run / "comparison/comparison.json").read_text())["after"]["step"] == 1


def test_a_checkpoint_is_named_by_any_path_to_it(tmp_path, monkeypatch):
    run = tmp_path / "run"
    folder = run / "checkpoints/000002"
    folder.mkdir(parents=True)
    save_recipe(load_recipe("show_o_tiny"), run / "recipe.yaml")
    (tmp_path / "best").symlink_to(folder)
    for place, name in [(tmp_path, "run/checkpoints/000002/"), (tmp_path, "best"), (run, "checkpoints/000002")]:
        monkeypatch.chdir(place)
        assert [path.resolve() for path in trained_source(name)] == [run, folder]
    for place, name in [(folder.parent, "000002"), (folder, "."), (folder / "..", "000002/../000002")]:
        monkeypatch.chdir(place)
        assert trained_source(name) == (run, folder)
    with pytest.raises(CheckpointError, match=f"{folder} is not a complete checkpoint"):
        reca.load(folder)


def test_a_checkpoint_that_is_gone_names_its_run(tmp_path, monkeypatch):
    save_recipe(load_recipe("show_o_tiny"), tmp_path / "recipe.yaml")
    monkeypatch.chdir(tmp_path)
    for source in (tmp_path / "checkpoints" / "000002", "checkpoints/000002"):
        with pytest.raises(RecipeError, match="is inside the run folder .*: pass that folder"):
            recipe_of(source)
    with pytest.raises(RecipeError, match="there is no recipe 'show_o_tyny'"):
        recipe_of("show_o_tyny")
    for step in ("000004", "000006"):
        (tmp_path / "checkpoints" / step).mkdir(parents=True)
        (tmp_path / "checkpoints" / step / MARKER).touch()
    for place in ("checkpoints", "checkpoints/000004"):
        monkeypatch.chdir(tmp_path / place)
        with pytest.raises(RecipeError, match=rf"'000002' is inside .*'{tmp_path}': .*there are: 000004, 000006"):
            recipe_of("000002")


def test_objects_in_place_of_names(tmp_path):
    """A dataset was read as a folder named by its repr, a model as a path too long for the disk."""
    for images in (object(), [object()], [{"source": object(), "weight": 1}]):
        with pytest.raises(RecipeError, match=r"data.images in the overrides has an object of type object .*:FUNCTION"):
            load_recipe("show_o_tiny", {"data.images": images})
    plain = {"data.images": [tmp_path, "a"], "optim.lr": np.float32(0.5), "data.shuffle": np.bool_(False)}
    assert load_recipe("show_o_tiny", plain).optim.lr == 0.5
    model = reca.load("show_o_tiny")
    for call in (lambda: reca.load(model), lambda: reca.evaluate("toy", model), lambda: reca.load(None)):
        with pytest.raises(RecipeError, match="named by a recipe or a run folder, got an object of type"):
            call()
    with pytest.raises(ValueError, match="judge must be a text, NAME or NAME:ARGUMENT, got function"):
        reca.evaluate("geneval", "show_o_tiny", judge=lambda image: 1)
