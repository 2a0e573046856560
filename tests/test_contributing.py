"""What CONTRIBUTING promises: a new model and a new op are a folder each, and nothing else is edited."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import reca
from reca.cli import main
from reca.config.recipe_files import load_recipe
from tests.driver.toy import write_images
from tests.models.conftest import pytest_configure

ROOT = Path(__file__).parents[1]


def test_a_model_outside_is_trained_drawn_with_exported_and_loaded(tmp_path, monkeypatch):
    """The example, copied into a package that this repository knows nothing of."""
    package = tmp_path / "elsewhere"
    package.mkdir()
    shutil.copy(ROOT / "examples/custom_model.py", package / "denoiser.py")
    monkeypatch.syspath_prepend(tmp_path)
    images = write_images(tmp_path / "images")
    recipe = tmp_path / "denoiser.yaml"
    recipe.write_text(
        f"umm: elsewhere.denoiser\nrun_dir: {tmp_path / 'run'}\nmodel: {{width: 32}}\n"
        f"data: {{images: {images}, captions: {images}, workers: 0}}\n"
        "objective: {reca: {weight: 1, batch_size: 8, micro_batch: 4}, t2i: {weight: 0.5, batch_size: 4}}\n"
        "optim: {lr: 0.01}\ntrain: {steps: 2, threads: 1}\nlog: {every: 1, tensorboard: false}\n"
    )
    assert reca.train(recipe) == (tmp_path / "run", 2, True)
    model = reca.load(tmp_path / "run")
    start = reca.load(recipe)
    roles = model.roles()
    for (name, ours), theirs in zip(model.named_parameters(), start.parameters(), strict=True):
        assert torch.equal(ours, theirs) == (roles[name] == "und_encoder"), name
    image = model.generate(["a"], seeds=[3])[0]
    assert image.shape == (3, 8, 8) and not torch.equal(image, start.generate(["a"], [3])[0])
    model.export(tmp_path / "exported")
    again = reca.load(recipe, {"model.weights": tmp_path / "exported"})
    assert torch.equal(again.generate(["a"], [3])[0], image)
    with pytest.raises(ValueError, match="unknown key 'model.widht'.*did you mean model.width"):
        load_recipe(recipe, ["model.widht=3"])


def test_the_command_line_takes_a_model_outside(tmp_path, monkeypatch, capsys):
    images, run = write_images(tmp_path / "images"), tmp_path / "run"
    recipe = tmp_path / "denoiser.yaml"
    recipe.write_text(
        f"umm: examples.custom_model\nrun_dir: {run}\ndata: {{images: {images}, workers: 0}}\n"
        "objective: {reca: {batch_size: 4}}\ntrain: {steps: 1, threads: 1}\nlog: {tensorboard: false}\n"
    )
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str) -> str:
        assert main(list(arguments)) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    assert "1 step done" in command("train", str(recipe))
    assert "a-cat.png" in command("generate", str(run), "--prompt", "a cat", "--sampling", "steps=2")
    assert "denoiser.safetensors" in command("export", str(run), "--out", str(tmp_path / "exported"))
    command("export", str(run), "--out", str(tmp_path / "exported"), "--card")
    assert "set `model.weights=FOLDER`" in (tmp_path / "exported/README.md").read_text()
    assert "comparison.html" in command("compare", "base", str(run))
    assert main(["compare", "base", str(run), "--reconstructions", "2"]) == 3
    assert "examples.custom_model cannot reconstruct images: set --reconstructions 0" in capsys.readouterr().err
    assert "gen_head" in command("check", str(recipe), "--gpus", "2")
    assert main(["edit", str(run), "--image", "a.png", "--instruction", "b"]) == 3
    assert "examples.custom_model cannot edit; recipes of bagel and open_uni can" in capsys.readouterr().err


def test_a_model_outside_is_held_to_the_contract(tmp_path):
    """The example keeps it, but for what it cannot do."""
    recipe, shapes = tmp_path / "denoiser.yaml", "reca.toy_datasets.shapes:unlabeled?seed=0"
    recipe.write_text(
        f"umm: examples.custom_model\nmodel: {{width: 256}}\ndata: {{images: '{shapes}', captions: '{shapes}'}}\n"
    )
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/models/test_contract.py"]
    done = subprocess.run([*tests, "--recipe", str(recipe)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 40


def test_a_wrong_recipe_for_the_contract_is_refused(tmp_path):
    config = SimpleNamespace(getoption=lambda name, default: tmp_path / "none.yaml")
    with pytest.raises(pytest.UsageError, match=r"--recipe: no recipe .*none\.yaml"):
        pytest_configure(config)


@pytest.mark.parametrize(
    ("module", "adapter", "said"),
    [
        ("stranger", "class Adapter:\n    name = 'a'", "Adapter must inherit from reca.models.base.Adapter"),
        (
            "lacking",
            "class Adapter(base.Adapter):\n    name, tasks = 'a', frozenset()",
            "Adapter lacks trainable_roles, condition_keys (see reca/models/base.py)",
        ),
        (
            "roleless",
            "class Adapter(custom_model.Adapter):\n    roles = lambda self: {'encoder.weight': 'und_encoder'}",
            "denoiser: roles() gives encoder.bias None; expected one of und_encoder, ",
        ),
        (
            "untrained",
            "class Adapter(custom_model.Adapter):\n    trainable_roles = frozenset({'shared_lm'})",
            "nothing is trained: no parameter has a role to train (shared_lm), or train.frozen",
        ),
    ],
)
def test_what_an_adapter_lacks_is_named(tmp_path, monkeypatch, capsys, module, adapter, said):
    lab = tmp_path / f"lab_{module}"  # a namespace package, whose name is not imported twice
    lab.mkdir()
    head = "from examples import custom_model\nfrom examples.custom_model import Config\nfrom reca.models import base\n"
    (lab / f"{module}.py").write_text(head + adapter)
    monkeypatch.syspath_prepend(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"umm: lab_{module}.{module}\ndata: {{images: {write_images(tmp_path / 'images')}}}\n")
    assert main(["check", str(recipe)]) == 3
    assert said in capsys.readouterr().err


USE = """
import torch
from reca_kernels import backend_report, dispatch, native
from reca_kernels.row_rms.op import row_rms

assert "row_rms" in dispatch.OPS and "row_rms on cpu" in backend_report()
assert dispatch.choose("row_rms", torch.zeros(1)) == ("cpu" if native.module else "reference")
assert not dispatch.has_backend("row_rms", "cuda")
x = torch.randn(5, 3, requires_grad=True)
compiled = torch.compile(row_rms, backend="aot_eager", fullgraph=True)
wanted = torch.autograd.grad(row_rms(x, backend="reference").sum(), x)[0]
for run in (row_rms, compiled):
    torch.testing.assert_close(torch.autograd.grad(run(x).sum(), x)[0], wanted)
torch.set_default_dtype(torch.bfloat16)
assert row_rms(x).dtype == torch.float32
try:
    row_rms(x, backend="cuda")
except RuntimeError as error:
    print(error)
"""


def test_an_op_is_one_folder(tmp_path):
    """The example in a copy of the library: dispatch, autograd and torch.compile know it, and no file was edited."""
    library = tmp_path / "reca_kernels"
    shutil.copytree(ROOT / "reca_kernels", library, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "examples/row_rms", library / "row_rms")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", USE], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "row_rms: backend 'cuda' was asked for, but it does not implement row_rms" in done.stdout
