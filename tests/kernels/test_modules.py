"""Modules give what the ops give with the same options, eager and compiled."""

import copy
import inspect

import pytest
import torch

import reca_kernels
from reca_kernels import (
    DiffusionLoss,
    FlowMatchingLoss,
    MaskedCrossEntropy,
    MaskedLinearCrossEntropy,
    Philox,
    diffusion_add_noise,
    diffusion_loss,
    diffusion_schedule,
    flow_matching_add_noise,
    flow_matching_loss,
    masked_cross_entropy,
    masked_linear_cross_entropy,
)


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


LABELS, CHANNELS = torch.tensor([1, 0, 3, 5]), 8
NOISE, NOISES = (Philox(torch.tensor(7), torch.arange(n) + 3, 1) for n in (2, 4))
X0, LEVEL, WEIGHT = draw(2, 3, 4, 4), torch.tensor([0.3, 0.9]), torch.tensor([1.0, 0.5])
CLEAN, STEPS, ROWS = draw(2, CHANNELS), torch.tensor([0, 1, 50, 99]), torch.tensor([0, 0, 1, 1])
CROSS_ENTROPY = {"ignore_index": 0, "label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 5.0, "reduction": "none"}

# module, what it is called with, the same by the op
CASES = {
    "cross-entropy": (
        MaskedCrossEntropy(**CROSS_ENTROPY),
        (draw(4, 9), LABELS),
        lambda z, y: masked_cross_entropy(z, y, **CROSS_ENTROPY),
    ),
    "linear": (
        MaskedLinearCrossEntropy(**CROSS_ENTROPY, chunk_rows=1),
        (draw(4, CHANNELS), draw(9, CHANNELS), LABELS, draw(9), 3),
        lambda h, w, y, b, n: masked_linear_cross_entropy(h, w, y, b, max_labelled=n, chunk_rows=1, **CROSS_ENTROPY),
    ),
    "flow": (
        FlowMatchingLoss(patch=2, reduction="sample"),
        (draw(8, 12), X0, LEVEL, NOISE, WEIGHT),
        lambda p, x, t, e, w: flow_matching_loss(p, x, t, e, weight=w, patch=2, reduction="sample"),
    ),
    "diffusion": (
        DiffusionLoss(steps=100, reduction="none"),
        (draw(4, 2 * CHANNELS), CLEAN, STEPS, NOISES, ROWS),
        lambda o, x, t, e, r: diffusion_loss(o, x, t, e, diffusion_schedule(100), rows=r, reduction="none"),
    ),
}


@pytest.mark.parametrize("name", list(CASES))
def test_a_module_is_its_op(name):
    module, (first, *others), op = CASES[name]
    results = []
    for run in (module, copy.deepcopy(module).half(), torch.compile(module, backend="aot_eager", fullgraph=True), op):
        leaf = first.clone().requires_grad_()
        loss = run(leaf, *others)
        results.append((loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]))
    for got in results[:-1]:
        assert all(torch.equal(a, b) for a, b in zip(got, results[-1], strict=True))
    assert results[0][0].shape != () and not list(module.parameters()) and not module.state_dict()


def test_noise_is_added_with_the_options_of_the_loss():
    flow, diffusion = CASES["flow"][0], CASES["diffusion"][0]
    assert torch.equal(flow.add_noise(X0, LEVEL, NOISE), flow_matching_add_noise(X0, LEVEL, NOISE, patch=2))
    got = diffusion.add_noise(CLEAN, STEPS, NOISES, rows=ROWS, out_dtype=torch.bfloat16)
    want = diffusion_add_noise(CLEAN, STEPS, NOISES, diffusion_schedule(100), rows=ROWS, out_dtype=torch.bfloat16)
    assert torch.equal(got, want)


def test_options_are_printed():
    assert "softcap=5.0, reduction='none'" in repr(CASES["cross-entropy"][0])
    assert repr(CASES["diffusion"][0]) == "DiffusionLoss(steps=100, kind='cosine', reduction='none', backend=None)"


@pytest.mark.parametrize("name", list(CASES))
def test_losses_of_fp64_are_fp64(name):
    _, inputs, op = CASES[name]
    wide = [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs]
    assert op(*wide).dtype == torch.float64 and op(*inputs).dtype == torch.float32


@pytest.mark.parametrize(
    ("module", "function"),
    [
        (reca_kernels.MaskedCrossEntropy, reca_kernels.masked_cross_entropy),
        (reca_kernels.MaskedLinearCrossEntropy, reca_kernels.masked_linear_cross_entropy),
        (reca_kernels.FlowMatchingLoss, reca_kernels.flow_matching_loss),
        (reca_kernels.DiffusionLoss, reca_kernels.diffusion_loss),
        (reca_kernels.DiffusionLoss, reca_kernels.diffusion_schedule),
    ],
)
def test_defaults_are_those_of_the_function(module, function):
    own, others = inspect.signature(module).parameters, inspect.signature(function).parameters
    shared = own.keys() & others.keys()
    assert shared and {name: own[name].default for name in shared} == {name: others[name].default for name in shared}


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        *((name, "reduction", "x") for name in CASES),
        *((name, "label_smoothing", 1.5) for name in ("cross-entropy", "linear")),
        ("linear", "chunk_rows", 0),
        ("flow", "patch", -1),
        ("diffusion", "kind", "x"),
        ("diffusion", "steps", 0),
    ],
)
def test_wrong_options_are_refused_at_construction(name, option, value):
    with pytest.raises(ValueError, match=f"{option} must be"):
        type(CASES[name][0])(**{option: value})
