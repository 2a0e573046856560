"""FP8 matmuls, emulated as no CPU has them: which layers, how far from the exact ones, and what is refused."""

import importlib.util

import pytest
import torch

from reca.config.recipe_files import load_recipe
from reca.data.batch import Batch, task_rng
from reca.models import umm_package
from reca.options.fields import RecipeError
from reca.training import float8, lora

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")


def gradient(adapter) -> tuple[float, torch.Tensor]:
    """A RECA loss, and the gradient of all parameters."""
    views, random = adapter.views("reca"), torch.Generator().manual_seed(0)

    def pixels(view):
        return view and list(torch.randint(0, 256, (4, 3, view.size, view.size), dtype=torch.uint8, generator=random))

    batch = Batch("reca", torch.arange(4), ["describe it"] * 4, gen=pixels(views.gen), und=pixels(views.und))
    term = adapter(batch, task_rng(0, "reca"))
    loss = term.sum / term.weight
    loss.backward()
    return float(loss), torch.cat([p.grad.flatten() for p in adapter.parameters() if p.grad is not None])


@needs_torchao
@pytest.mark.parametrize("umm", ["bagel", "open_uni"])
def test_the_gradient_is_that_of_fp32_to_a_few_percent(umm):
    """Seen: losses 0.1 % apart, gradients 3.5 % (BAGEL) and 4.2 % (OpenUni) at random weights; names as before."""
    recipe = load_recipe(f"{umm}_tiny")
    exact, rounded = (umm_package(umm).Adapter.load(recipe.model) for _ in range(2))
    names = list(rounded.state_dict())
    assert float8.convert(rounded, emulate=True) > 10 and list(rounded.state_dict()) == names
    (loss, wanted), (other, found) = gradient(exact), gradient(rounded)
    assert other == pytest.approx(loss, rel=5e-3) and other != loss
    assert 0.01 < (found - wanted).norm() / wanted.norm() < 0.08


@needs_torchao
def test_only_layers_of_blocks_whose_sizes_fit(monkeypatch):
    recipe = load_recipe("show_o_tiny")
    adapter = umm_package("show_o").Adapter.load(recipe.model)
    adapter.blocks()[0].mlp.fc1 = torch.nn.Linear(96, 100)
    float8.convert(adapter, emulate=True)
    kinds = {
        name: type(layer).__name__ for name, layer in adapter.named_modules() if isinstance(layer, torch.nn.Linear)
    }
    assert kinds["showo.model.layers.0.mlp.fc1"] == "Linear" and kinds["showo.lm_head"] == "Linear"
    assert kinds["showo.model.layers.1.mlp.fc1"] == "Float8Linear"
    monkeypatch.setattr(float8, "MULTIPLE", 1000)
    with pytest.raises(RecipeError, match="no linear layer in the blocks of show_o whose sizes are multiples of 1000"):
        float8.convert(umm_package("show_o").Adapter.load(recipe.model), emulate=True)


@needs_torchao
@pytest.mark.parametrize("rank", [8, 16])
def test_the_matrices_of_lora_stay_as_they_are_at_any_rank(rank):
    pytest.importorskip("peft")
    recipe = load_recipe("show_o_tiny", [f"lora.rank={rank}"])
    adapter = umm_package("show_o").Adapter.load(recipe.model)
    wanted = float8.convert(umm_package("show_o").Adapter.load(recipe.model), emulate=True)
    lora.choose_trained(adapter, recipe)
    assert float8.convert(adapter, emulate=True) == wanted
    assert not any(".lora_" in name for name, layer in adapter.named_modules() if "Float8" in type(layer).__name__)


def test_what_is_refused(monkeypatch):
    with pytest.raises(RecipeError, match=r"train\.float8=true .* set train\.precision=bf16, not fp32"):
        load_recipe("show_o_tiny", ["train.float8=true"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"needs torchao, which is not installed: pip install 'reca\[float8\]'"):
        float8.check_usable(torch.device("cpu"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    with pytest.raises(RecipeError, match=r"compute capability 8\.9 or newer .* there is none"):
        float8.check_usable(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(RecipeError, match=r"this one has 8\.0"):
        float8.check_usable(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    float8.check_usable(torch.device("cuda"))
