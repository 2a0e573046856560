"""fp64 for tests: what models and libraries cast to fp32 stays fp64, and what never meets a weight stays fp32."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from reca import preflight
from reca.config.recipe_files import load_recipe
from reca.options.fields import RecipeError
from reca.precision import autocast, cast, check_usable
from tests.driver.toy import run_toy, weights

CPU = torch.device("cpu")
X = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
CASTS = {
    "float": lambda: X.float(),
    "to": lambda: X.to(torch.float32),
    "to by name": lambda: X.to(dtype=torch.float32),
    "to another": lambda: X.to(torch.zeros(1)),
    "type_as": lambda: X.type_as(torch.zeros(1)),
    "sum": lambda: X.sum(dtype=torch.float32),
    "softmax": lambda: F.softmax(X, dim=-1, dtype=torch.float32),
    "product": lambda: torch.ones(2, 3) @ X,
    "linear": lambda: F.linear(torch.ones(2, 4), X),
    "norm": lambda: F.layer_norm(torch.ones(2, 4), (4,), X[0]),
    "sum of both": lambda: torch.ones(4) + X,
}


@pytest.mark.parametrize("name", CASTS)
def test_what_meets_fp64_is_fp64(name):
    with autocast("fp64", CPU):
        assert CASTS[name]().dtype == torch.float64
    if name not in ("product", "linear", "norm", "sum of both"):
        assert CASTS[name]().dtype == torch.float32


def test_other_numbers_keep_their_types():
    with autocast("fp64", CPU):
        assert torch.arange(3).float().dtype == torch.float32
        assert torch.zeros(3, dtype=torch.float32).dtype == torch.float32
        assert X.to(torch.bfloat16).dtype == torch.bfloat16 and X.half().dtype == torch.float16
        assert (torch.zeros(2, 3) @ torch.zeros(3, 2)).dtype == torch.float32


def test_a_mask_of_attention_stays_boolean():
    """As a number, it would be added to the scores."""
    keys, mask = X[None, None], torch.tensor([[True, False, True]])
    expected = F.scaled_dot_product_attention(keys, keys, keys, mask)
    with autocast("fp64", CPU):
        found = F.scaled_dot_product_attention(keys, keys, keys, attn_mask=mask)
        mixed = F.scaled_dot_product_attention(keys, keys, torch.ones(1, 1, 3, 4), mask)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(mixed, torch.ones_like(X)[None, None])


def test_a_norm_of_transformers_keeps_all_digits():
    """It computes in fp32 whatever it is given."""
    norm = cast(Qwen2RMSNorm(4), "fp64")
    exact = X / (X.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    with autocast("fp64", CPU):
        assert (norm(X) - exact).abs().max() < 1e-15
    assert (norm(X) - exact).abs().max() > 1e-9


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_other_precisions_change_no_weight(precision):
    layer = nn.Linear(2, 2)
    assert cast(layer, precision).weight.dtype == torch.float32
    with autocast(precision, CPU) as entered:
        assert torch.is_autocast_enabled("cpu") == (precision == "bf16") and entered is not None
        assert layer(torch.zeros(1, 2)).dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)


def test_a_gpu_without_bf16_is_refused_before_anything_is_loaded(monkeypatch):
    """On a V100 or T4 torch emulates it, and a kernel of Triton fails to compile in the first step."""
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(preflight, "usable_device", lambda device: gpu)
    recipe = load_recipe("show_o_tiny", ["train.precision=bf16"])
    with pytest.raises(RecipeError, match=r"bf16 needs a GPU of .* 8\.0 .* has 7\.5: .* train\.precision=fp32"):
        preflight.check(recipe, ["reca"], 1, 1)
    check_usable("fp32", gpu)
    check_usable("bf16", CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    check_usable("bf16", gpu)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_autocast_of_the_caller_is_not_that_of_a_run(precision, recipe, tmp_path):
    """It rounded a run in fp32, and kept the weights of the first step, rounded to bf16, for all later ones."""

    def trained(name):
        keys = f"train.precision={precision}", "objective.reca.micro_batch=8", "train.steps=3"
        return weights(run_toy(recipe(f"run_dir={tmp_path}/{name}", *keys)).adapter)

    usual = trained("usual")
    for dtype, enabled in ((torch.bfloat16, True), (torch.float16, True), (torch.bfloat16, False)):
        with torch.autocast("cpu"), torch.autocast("cpu", dtype, enabled=enabled):
            found = trained(f"{dtype}-{enabled}")
            assert torch.is_autocast_enabled("cpu") == enabled
            assert F.linear(torch.ones(2, 2), torch.ones(2, 2)).dtype == (dtype if enabled else torch.float32)
        assert not torch.is_autocast_enabled("cpu") and torch.autocast_increment_nesting() == 1
        torch.autocast_decrement_nesting()
        assert all(torch.equal(value, found[name]) for name, value in usual.items()), (dtype, enabled)
