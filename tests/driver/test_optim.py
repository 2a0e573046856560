"""The learning rate, and the norm of gradients and what is done to them with it."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from reca.optim import gradient_norm, lr_at


def module(*gradients):
    holder = nn.Module()
    for i, gradient in enumerate(gradients):
        holder.register_parameter(str(i), nn.Parameter(torch.zeros_like(gradient)))
        holder.get_parameter(str(i)).grad = gradient.clone()
    holder.register_parameter("idle", nn.Parameter(torch.zeros(3)))  # no gradient reached it
    return holder


def drawn(dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(n, generator=generator) * scale).to(dtype) for n in (5, 300, 4096)]


def exact(gradients):
    return float(torch.cat([g.double() for g in gradients]).norm())


class Writes(TorchDispatchMode):
    """Collects the operators that write into a tensor."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.is_mutable:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def test_without_clip_the_norm_is_computed_and_nothing_written():
    gradients = drawn()
    holder = module(*gradients)
    with Writes() as writes:
        norm = gradient_norm(holder, None)
    assert norm == pytest.approx(exact(gradients), rel=1e-6) and writes.found == []
    for clip in (1.02 * norm, 1e9):
        with Writes() as writes:
            assert gradient_norm(holder, clip) == norm and writes.found == []  # nothing is to be clipped
    with Writes() as writes:
        gradient_norm(holder, 0.98 * norm)
    assert writes.found  # the checks above can fail


def test_without_clip_infinite_gradients_stay_what_they_are():
    holder = module(torch.tensor([1.0, torch.inf, 2.0]))
    assert gradient_norm(holder, None) == torch.inf
    assert holder.get_parameter("0").grad.tolist() == [1.0, torch.inf, 2.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 3e4])  # a norm above 65504, which fp16 cannot hold
def test_norm_and_clipping_in_every_dtype(dtype, scale):
    if dtype == torch.float16:
        scale /= 4  # so that every gradient is finite
    gradients = drawn(dtype, scale)
    holder = module(*gradients)
    norm = exact(gradients)
    assert gradient_norm(holder, 0.5) == pytest.approx(norm, rel=1e-5)
    clipped = [p.grad for p in holder.parameters() if p.grad is not None]
    assert all(g.dtype == dtype for g in clipped)
    assert exact(clipped) == pytest.approx(0.5, rel=1e-2)


def test_mixed_dtypes_and_none_at_all():
    gradients = [drawn()[0], drawn(torch.bfloat16)[1], drawn(torch.float16)[2]]
    assert gradient_norm(module(*gradients), None) == pytest.approx(exact(gradients), rel=1e-6)
    for clip in (None, 1.0):
        assert gradient_norm(module(), clip) == 0.0


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.775, 0.325]),
        ("cosine", [0.5, 1.0, 1.0, 0.868198, 0.231802]),
    ],
)
def test_learning_rate(recipe, schedule, expected):
    """10 steps: 2 of warm-up, then decay to a tenth."""
    config = recipe(f"optim.schedule={schedule}", "optim.lr=1", "optim.warmup_steps=2", "optim.min_lr_ratio=0.1").optim
    got = [lr_at(u, 10, config) for u in (0, 1, 2, 4, 8)]
    assert got == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("schedule", "middle"), [("linear", 0.55), ("cosine", 0.55), ("constant", 1.0)])
def test_learning_rate_is_stable_before_its_decay(recipe, schedule, middle):
    """20 steps: 4 of warm-up, at the peak up to 12, then decay; a run that goes on stays at the end of it."""
    keys = f"optim.schedule={schedule} optim.lr=1 optim.warmup_steps=4 optim.min_lr_ratio=0.1 optim.stable_fraction=0.6"
    config = recipe(*keys.split()).optim
    last = 1.0 if schedule == "constant" else 0.1
    assert [lr_at(u, 20, config) for u in (0, 3, 4, 9, 12)] == [0.25, 1, 1, 1, 1]
    assert [lr_at(u, 20, config) for u in (16, 20, 30)] == pytest.approx([middle, last, last])


def test_learning_rate_is_stable_for_a_fraction_that_binary_numbers_lack(recipe):
    """0.29 * 100 is 28.999999999999996."""
    config = recipe("optim.schedule=linear", "optim.lr=1", "optim.stable_fraction=0.29").optim
    assert [lr_at(u, 100, config) for u in (28, 29, 30)] == pytest.approx([1, 1, 70 / 71])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(("keys", "peak"), [("warmup_steps=4", 3), ("warmup_steps=6", 5), ("stable_fraction=1", 3)])
def test_learning_rate_is_at_its_minimum_after_a_schedule_without_decay(recipe, schedule, keys, peak):
    """The schedule ends at step 4, and the warm-up or the stable part lasts as long or longer."""
    config = recipe(f"optim.schedule={schedule}", "optim.lr=1", "optim.min_lr_ratio=0.1", f"optim.{keys}").optim
    assert [lr_at(u, 4, config) for u in range(peak, peak + 3)] == pytest.approx([1, 0.1, 0.1])
