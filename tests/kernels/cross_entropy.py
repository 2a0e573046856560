"""Problems and comparisons that the tests of both cross-entropies share."""

import pytest
import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 1e-2},
    "softcap": {"softcap": 3.0},
    "all": {"label_smoothing": 0.2, "z_loss": 1e-3, "softcap": 5.0},
}
IGNORED = -100
# Every option with a mean; none and all of them with every reduction.
CASES = [
    pytest.param(options, reduction, id=f"{name}-{reduction}")
    for name, options in OPTIONS.items()
    for reduction in ("mean", "sum", "none")
    if reduction == "mean" or name in ("plain", "all")
]


def problem(rows=6, classes=77, width=24, labelled=0.6, dtype=torch.float32, seed=3, device="cpu"):
    """Leaves (hidden [rows, width], weight [classes, width], bias [classes]) and labels, some of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator)
    weight = torch.randn(classes, width, generator=generator) * 0.3
    bias = torch.randn(classes, generator=generator)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) >= labelled] = IGNORED
    return [x.to(device, dtype).requires_grad_() for x in (hidden, weight, bias)], labels.to(device)


def logits_of(leaves):
    hidden, weight, bias = (x.detach() for x in leaves)
    return (3 * (hidden @ weight.T + bias)).requires_grad_()


def exact(leaves):
    return [x.detach().double().requires_grad_() for x in leaves]


def gradients(loss, leaves, seed=9):
    """Gradients for an upstream gradient that is not 1."""
    upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.autograd.grad(loss, leaves, upstream.to(loss.device, loss.dtype))


def close(got, want, relative):
    assert float((got.double() - want.double()).norm()) <= relative * float(want.double().norm()) + 1e-9
