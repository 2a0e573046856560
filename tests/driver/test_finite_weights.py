"""Weights that hold NaN or infinity are named before a step is made or an image drawn."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from reca import api
from reca.config.recipe_files import load_recipe
from reca.trainer import Trainer
from reca.training.finite_weights import check_finite


@pytest.mark.parametrize(("value", "dtype"), [("nan", torch.float32), ("inf", torch.bfloat16), ("-inf", torch.float16)])
def test_a_parameter_that_is_not_finite(value, dtype):
    model = torch.nn.Linear(4, 4).to(dtype)
    check_finite(model)
    with torch.no_grad():
        model.weight[1, 2] = float(value)
    with pytest.raises(ValueError, match="NaN or infinity in 1 tensors, the first weight: "):
        check_finite(model)


def test_large_numbers_and_masks_are_sound():
    model = torch.nn.Linear(4, 4)
    with torch.no_grad():
        model.weight.fill_(3e38)  # their sum overflows
    model.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
    check_finite(model)
    model.register_buffer("mean", torch.tensor([float("nan")]))
    with pytest.raises(ValueError, match="the first mean"):
        check_finite(model)


def test_neither_training_nor_drawing_begins(tmp_path):
    folder = tmp_path / "exported"
    api.load("bagel_tiny").export(folder)
    state = load_file(folder / "ema.safetensors")
    state["llm2vae.weight"][0, 0] = float("nan")
    save_file(state, folder / "ema.safetensors")
    overrides = [f"model.weights={folder}", f"run_dir={tmp_path / 'run'}"]
    for use in (lambda: api.load("bagel_tiny", overrides), lambda: Trainer(load_recipe("bagel_tiny", overrides))):
        with pytest.raises(ValueError, match=r"in 1 tensors, the first llm2vae\.weight: their file is damaged, or"):
            use()
