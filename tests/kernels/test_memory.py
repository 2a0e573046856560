"""Kernels take addresses of plain memory only: all else goes through the dispatcher, or is refused in a sentence.

Each op runs under each way in which a tensor is not, or not yet, memory with its values in it. No way may end the
process or give another value than the op gives alone.
"""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from reca_kernels import (
    AttentionSpan,
    Philox,
    attention,
    attention_plan,
    diffusion_add_noise,
    diffusion_loss,
    diffusion_schedule,
    flow_matching_add_noise,
    flow_matching_loss,
    masked_cross_entropy,
    masked_linear_cross_entropy,
    native,
    philox_normal,
    template_concat,
)
from reca_kernels.attention import flex

pytestmark = [
    pytest.mark.skipif(native.module is None, reason=str(native.missing)),
    pytest.mark.filterwarnings("ignore"),
]

_g = torch.Generator().manual_seed(0)


def _r(*shape):
    return torch.randn(*shape, generator=_g)


LABELS, SRC = torch.tensor([1, -100, 3, 5]), torch.tensor([0, -1, 3, -2])
WEIGHT, VISUAL, X0, KEYS = _r(9, 8), _r(4, 8), _r(2, 3, 4, 4), _r(1, 7, 2, 8)
LEVEL, STEPS, CLEAN, TABLE = torch.tensor([0.3, 0.0]), torch.tensor([0, 1, 500, 999]), _r(4, 8), diffusion_schedule()
NOISE, NOISES = (Philox(torch.tensor(7), torch.arange(n) + 3, 1) for n in (2, 4))
PLAN = attention_plan([[AttentionSpan(3), AttentionSpan(2, "noise"), AttentionSpan(2)]])
ROWS, UNEVEN = KEYS[0], attention_plan([[AttentionSpan(3), AttentionSpan(2, "noise")], [AttentionSpan(2)]])


def linear(h, b, **options):
    return masked_linear_cross_entropy(h, WEIGHT, LABELS, backend=b, **options)


# name -> (op of its first tensor and a backend, that tensor)
OPS = {
    "cross-entropy": (lambda z, b: masked_cross_entropy(z, LABELS, backend=b), _r(4, 9)),
    "cross-entropies": (lambda z, b: masked_cross_entropy(z, LABELS, backend=b, reduction="none"), _r(4, 9)),
    "linear": (linear, _r(4, 8)),
    "linear-none": (lambda h, b: linear(h, b, reduction="none"), _r(4, 8)),
    "flow": (lambda p, b: flow_matching_loss(p, X0, LEVEL, NOISE, backend=b), _r(2, 3, 4, 4)),
    "flow-weights": (
        lambda p, b: flow_matching_loss(p, X0, LEVEL, NOISE, backend=b, weight=LEVEL, reduction="sample"),
        _r(2, 3, 4, 4),
    ),
    "flow-list": (
        lambda p, b: flow_matching_loss(p, [X0[0], X0[1][:, :2]], LEVEL, NOISE, backend=b, patch=2),
        _r(6, 12),
    ),
    "flow-prepare": (lambda x, b: flow_matching_add_noise(x, LEVEL, NOISE, backend=b), _r(2, 3, 4, 4)),
    "diffusion": (lambda o, b: diffusion_loss(o, CLEAN, STEPS, NOISES, TABLE, backend=b), _r(4, 16)),
    "diffusion-prepare": (lambda x, b: diffusion_add_noise(x, STEPS, NOISES, TABLE, backend=b), _r(4, 8)),
    "concat": (lambda t, b: template_concat(t, VISUAL, SRC, adds=[(t, SRC)], backend=b), _r(9, 8)),
    "philox": (lambda i, b: philox_normal(NOISE._replace(sample_ids=i), 6, backend=b), torch.tensor([3, 4])),
    "attention": (lambda q, b: attention(q, KEYS, KEYS, PLAN), _r(1, 7, 2, 8)),
    "attention-sdpa": (lambda q, b: attention(q, KEYS, KEYS, PLAN, impl="sdpa"), _r(1, 7, 2, 8)),
    "attention-packed": (lambda q, b: attention(q, ROWS, ROWS, UNEVEN, impl="dense"), _r(7, 2, 8)),
}
NO_GRADIENT = ("flow-prepare", "diffusion-prepare", "philox")


@pytest.fixture(params=list(OPS))
def case(request):
    op, x = OPS[request.param]
    differentiable = request.param not in NO_GRADIENT
    leaf = x.clone().requires_grad_(differentiable)
    out = op(leaf, "cpu")
    gradient = torch.autograd.grad(out.sum(), leaf)[0] if differentiable else None
    lists = request.param.startswith(("flow", "concat"))
    return SimpleNamespace(
        name=request.param, op=op, run=lambda x: op(x, "cpu"), x=x, out=out.detach(), gradient=gradient, lists=lists,
        other=torch.zeros_like(x) + 2,
    )  # fmt: skip


@pytest.fixture
def differentiable(case):
    if case.gradient is None:
        pytest.skip("no gradient")
    return case


def differentiated(case):
    leaf = case.x.clone().requires_grad_()
    return leaf, case.run(leaf)


# ---- tensors without memory, and graphs ----


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_fake_tensors(case, backend):
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    leaf = mode.from_tensor(case.x.clone().requires_grad_(case.gradient is not None))
    with mode:
        out = case.op(leaf, backend)
        assert out.shape == case.out.shape and out.dtype == case.out.dtype
        if case.gradient is not None:
            (gradient,) = torch.autograd.grad(out.sum(), leaf)
            assert gradient.shape == case.x.shape and gradient.dtype == case.x.dtype
    assert_close(case.run(case.x), case.out)  # nothing fake was kept


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic", "pre-dispatch"])
def test_make_fx(case, mode):
    before = mode == "pre-dispatch"
    options = {"tracing_mode": "real" if before else mode, "pre_dispatch": before, "_allow_non_fake_inputs": True}
    assert_close(make_fx(case.run, **options)(case.other)(case.x), case.out)


def test_make_fx_of_a_gradient(differentiable):
    case = differentiable

    def gradient(x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(case.run(x).sum(), x)[0]

    graph = make_fx(gradient, tracing_mode="fake", _allow_non_fake_inputs=True)(case.other)
    assert_close(graph(case.x), case.gradient)


def test_make_fx_of_the_backward_pass_alone(differentiable):
    leaf, out = differentiated(differentiable)
    up = torch.ones_like(out)
    graph = make_fx(lambda up: torch.autograd.grad(out, leaf, up, retain_graph=True)[0])(up)
    assert_close(graph(2 * up), 2 * differentiable.gradient)


def test_meta_tensors_and_real_ones(case):
    with pytest.raises(ValueError, match="on one device|where sample_ids are"):
        case.run(case.x.to("meta"))


def test_meta_tensors():
    logits, labels = torch.empty(4, 9, device="meta"), torch.empty(4, dtype=torch.int64, device="meta")
    assert masked_cross_entropy(logits, labels).device.type == "meta"
    assert masked_linear_cross_entropy(logits, logits, labels, reduction="none").shape == (4,)


def test_jit_trace_is_refused(case):
    with pytest.raises(RuntimeError, match=r"use torch\.export"):
        torch.jit.trace(case.run, (case.x,))


def test_export(case):
    class Module(torch.nn.Module):
        def forward(self, x):
            return case.run(x)

    assert_close(torch.export.export(Module(), (case.x,), strict=False).module()(case.x), case.out)


# ---- transforms ----


def test_vmap(case):
    both = torch.stack([case.x, case.other])
    if case.lists:
        with pytest.raises(RuntimeError, match="vmap cannot batch"):
            torch.func.vmap(case.run)(both)
    else:
        assert_close(torch.func.vmap(case.run)(both)[0], case.out)


@pytest.mark.parametrize("how", ["grad", "jvp", "vmap of grad", "dual numbers"])
def test_derivatives_that_kernels_do_not_have(differentiable, how):
    case, ones = differentiable, torch.ones_like(differentiable.x)
    if case.name.startswith("attention"):  # torch's own operations, which have no forward mode AD on CPUs
        if how == "grad":
            assert_close(torch.func.grad(lambda x: case.run(x).sum())(case.x), case.gradient)
        return

    def derivative(backend):
        summed = lambda x: case.op(x, backend).sum()  # noqa: E731
        if how == "grad":
            return torch.func.grad(summed)(case.x)
        if how == "vmap of grad":
            return torch.func.vmap(torch.func.grad(summed))(torch.stack([case.x, case.other]))[0]
        if how == "jvp":
            return torch.func.jvp(summed, (case.x,), (ones,))[1]
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(summed(forward_ad.make_dual(case.x, ones))).tangent

    with pytest.raises(RuntimeError, match="has no derivative for .* Use backend='reference' there|vmap cannot batch"):
        derivative("cpu")
    assert_close(derivative("reference"), case.gradient if "grad" in how else case.gradient.sum(), rtol=1e-4, atol=1e-5)


def test_a_level_of_forward_mode_without_tangents(case):
    with forward_ad.dual_level():
        assert_close(case.run(case.x), case.out)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_transforms_that_differentiate_something_else(case, backend):
    """What is multiplied with a constant result has a derivative: the sum of that result."""
    one, total = torch.tensor(1.0), case.out.sum()
    scaled = lambda a: a * case.op(case.x, backend).sum()  # noqa: E731
    if not case.name.startswith("attention"):  # torch's has no forward mode AD on CPUs
        assert_close(torch.func.jvp(scaled, (one,), (one,))[1], total, rtol=1e-4, atol=1e-5)
    assert_close(torch.func.grad(scaled)(one), total, rtol=1e-4, atol=1e-5)


def test_a_derivative_of_an_outer_transform_is_not_lost(differentiable):
    if differentiable.name.startswith("attention"):
        pytest.skip("torch's own operations")

    def outer(a):
        x = a * differentiable.x
        return torch.func.grad(lambda b: b * differentiable.run(x).sum())(torch.tensor(1.0))

    for derivative in (torch.func.grad, torch.func.jacfwd):
        with pytest.raises(RuntimeError, match="has no derivative for "):
            derivative(outer)(torch.tensor(1.0))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_no_gradient_is_lost_where_none_is_recorded(mode, backend):
    eps, four = X0.flip(0), CLEAN.flip(0)
    ops = (
        lambda x0, t, noise, *_: flow_matching_add_noise(x0, t, noise, backend=backend),
        lambda x0, t, noise, *_: flow_matching_add_noise(list(x0), t, noise.view(32, 3), backend=backend),
        lambda x0, t, noise, *_: flow_matching_loss(x0, x0, t, noise, backend=backend),
        lambda *x: diffusion_add_noise(x[3], STEPS, x[4], x[5], backend=backend),
        lambda *x: diffusion_loss(torch.cat((x[4], x[4]), 1), x[3], STEPS, x[4], x[5], backend=backend),
        lambda *x: masked_cross_entropy(x[4], LABELS, inplace=True, backend=backend),
    )
    constant = [X0, LEVEL, eps, CLEAN, four, TABLE]
    learning = [x.clone().requires_grad_() for x in constant]
    with mode():
        for op in ops:
            assert_close(op(*learning), op(*constant))


def test_batched_upstream_gradients(differentiable):
    leaf, out = differentiated(differentiable)
    (gradients,) = torch.autograd.grad(out, leaf, torch.ones(3, *out.shape), is_grads_batched=True)
    assert_close(gradients[2], differentiable.gradient)


def test_functionalize(case):
    assert_close(torch.func.functionalize(case.run)(case.x), case.out)


# ---- memory that means something else ----


def test_negated_views(case):
    if case.x.is_floating_point():
        assert_close(case.run((-case.x)._neg_view()), case.out)


def test_negated_views_beside_it(differentiable, monkeypatch):
    """Of every other tensor: the second backward pass makes again what the first gave away, from what was saved."""
    for name in ("WEIGHT", "VISUAL", "X0", "LEVEL", "CLEAN", "TABLE", "KEYS", "ROWS", "LABELS", "SRC", "STEPS"):
        with monkeypatch.context() as patch:
            patch.setitem(globals(), name, (-globals()[name])._neg_view())
            leaf, out = differentiated(differentiable)
            for _ in range(2):
                gradient = torch.autograd.grad(out.sum(), leaf, retain_graph=True)[0]
                assert_close(gradient, differentiable.gradient, msg=name)


def test_zero_tensors(case):
    zero = torch._efficientzerotensor(case.x.shape, dtype=case.x.dtype)
    assert_close(case.run(zero), case.run(torch.zeros_like(case.x)))


def test_negated_and_zero_upstream_gradients(differentiable):
    case = differentiable
    leaf, out = differentiated(case)
    ups = (-torch.ones_like(out))._neg_view(), torch._efficientzerotensor(out.shape)
    for up, want in zip(ups, (case.gradient, torch.zeros_like(case.gradient)), strict=True):
        assert_close(torch.autograd.grad(out, leaf, up, retain_graph=True)[0], want)


@pytest.mark.parametrize("kind", ["sparse_coo", "mkldnn", "quantized", "nested"])
def test_other_layouts_are_refused(case, kind):
    x = case.x
    if not x.is_floating_point():
        x = x.float()
    made = {
        "sparse_coo": lambda: x.to_sparse(),
        "mkldnn": lambda: x.to_mkldnn(),
        "quantized": lambda: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        "nested": lambda: torch.nested.nested_tensor([x, x], layout=torch.jagged),
    }
    with pytest.raises(TypeError, match=f"must be a dense tensor.*{kind}"):
        case.run(made[kind]())


def test_complex_numbers_are_refused(case):
    with pytest.raises((TypeError, ValueError), match="must be (fp32|int64)"):
        case.run(case.x.to(torch.complex64).conj())


def test_what_is_no_tensor(case):
    for nothing in ([1.0, 2.0], None):
        with pytest.raises(TypeError, match="must be a tensor"):
            case.run(nothing)


def test_what_is_no_address_of_noise():
    """Nor a plan, nor a weight, nor another tensor that is needed."""
    for op in (
        lambda: philox_normal(None, 6),
        lambda: flow_matching_add_noise(X0, LEVEL, None),
        lambda: flow_matching_loss(X0, X0, LEVEL, tuple(NOISE)),
        lambda: flow_matching_loss(X0, X0, None, NOISE),
        lambda: flow_matching_loss(X0, X0, LEVEL, NOISE, weight=[1.0, 1.0]),
        lambda: flow_matching_loss(X0, [X0[0], None], LEVEL, NOISE),
        lambda: diffusion_add_noise(CLEAN, STEPS, None, TABLE),
        lambda: diffusion_loss(_r(4, 16), CLEAN, STEPS, NOISES._replace(sample_ids=None), None),
        lambda: masked_cross_entropy(_r(4, 9), None),
        lambda: template_concat(WEIGHT, VISUAL, None),
        lambda: attention(KEYS, KEYS, KEYS, None),
    ):
        with pytest.raises(TypeError, match="must be (a tensor|a Philox|what attention_plan returns)"):
            op()


def test_inference_tensors(case):
    with torch.inference_mode():
        assert_close(case.run(case.x.clone()), case.out)


# ---- modes and subclasses ----


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func).split(".")[0])
        return func(*args, **(kwargs or {}))


class Through(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Plain(torch.Tensor):
    pass


class Watched(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return super().__torch_function__(func, types, args, kwargs or {})


def test_dispatch_modes_see_the_op(case):
    with Seen() as seen:
        out = case.run(case.x)
    assert_close(out, case.out)
    assert "reca" in seen.names or case.name.startswith("attention")


def test_function_modes(case):
    with Through():
        out = case.run(case.x)
    assert_close(out, case.out)


def test_default_device_and_dtype(case):
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            out = case.run(case.x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_close(out, case.out)


@pytest.mark.parametrize("kind", [Plain, Watched])
def test_subclasses(case, kind):
    out = case.run(case.x.clone().as_subclass(kind))
    assert type(out) is kind
    assert_close(out.as_subclass(torch.Tensor), case.out)
    if case.gradient is not None:
        leaf = case.x.clone().as_subclass(kind).requires_grad_()
        (gradient,) = torch.autograd.grad(case.run(leaf).sum(), leaf)
        assert_close(gradient.as_subclass(torch.Tensor), case.gradient)


def test_wrappers_of_two_tensors(case):
    out = case.run(TwoTensor(case.x.clone(), case.x.clone()))
    assert_close(out.a, case.out)
    assert_close(out.b, case.out)


def test_flops_of_the_head_are_counted():
    """Of rows that carry a label: the logits, and with them both gradients."""
    hidden, weight = _r(4, 8).requires_grad_(), WEIGHT.clone().requires_grad_()
    once = 2 * 3 * weight.numel()
    for reduction in ("mean", "none"):
        with FlopCounterMode(display=False) as counter:
            loss = masked_linear_cross_entropy(hidden, weight, LABELS, reduction=reduction, backend="cpu")
            assert counter.get_total_flops() == (once if reduction == "none" else 3 * once)
            loss.sum().backward()
        assert counter.get_total_flops() == (4 if reduction == "none" else 3) * once


def test_indices_are_checked_under_modes_too():
    with Through(), pytest.raises(ValueError, match="label 9 in row 0 is outside"):
        masked_cross_entropy(_r(1, 9), torch.tensor([9]), backend="cpu")
    with Seen(), pytest.raises(ValueError, match="t must be in"):
        diffusion_add_noise(CLEAN, STEPS + 1000, NOISES, TABLE, backend="cpu")
    with Seen(), pytest.raises(ValueError, match="src must be in"):
        template_concat(WEIGHT, VISUAL, SRC + 100, backend="cpu")


def test_tensors_that_are_kept_are_real():
    """Made first under a mode, a schedule or a mask once was fake, or of inference mode, for all who came later."""
    with FakeTensorMode():
        assert type(diffusion_schedule(77)).__name__ == "FakeTensor"
    assert type(diffusion_schedule(77)) is torch.Tensor
    with torch.inference_mode():
        diffusion_schedule(78)
    assert not diffusion_schedule(78).is_inference()
    plan, q = attention_plan([[AttentionSpan(2), AttentionSpan(3, "noise"), AttentionSpan(1, "pad")]]), _r(1, 6, 2, 8)
    with torch.inference_mode():
        out = attention(q, q, q, plan, impl="dense")
    with warnings.catch_warnings():
        leaf = q.clone().requires_grad_()
        attention(leaf, leaf, leaf, plan, impl="dense").sum().backward()
    assert_close(attention(q, q, q, plan, impl="dense"), out)
    with torch.inference_mode(), torch.device("meta"):
        flex._blocks(plan)
    queries, keys, blocks = flex._blocks(plan)
    for kept in (queries, keys, blocks.kv_num_blocks):
        assert kept.is_cpu and not kept.is_inference()
