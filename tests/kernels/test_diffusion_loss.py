"""The diffusion loss against fp64 and against torch's own distributions; edge cases; system behaviour."""

import math

import pytest
import torch

from reca_kernels import Philox, diffusion_loss, diffusion_prepare, diffusion_schedule, diffusion_steps, native
from reca_kernels.reference import diffusion_loss as reference

needs_native = pytest.mark.skipif(native.module is None, reason=str(native.missing))
BACKENDS = ["reference", pytest.param("cpu", marks=needs_native)]
SCHEDULE = diffusion_schedule()


def case(channels=16, rows=333, samples=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randn(samples, channels, generator=generator) * 0.5
    index = torch.randint(0, samples, (rows,), generator=generator)
    t = torch.randint(0, 1000, (rows,), generator=generator)
    t[:20] = 0
    t[20:25] = 999
    out = torch.randn(rows, 2 * channels, generator=generator)
    return out, x0, t, Philox(torch.tensor(9), torch.arange(rows) + 100, 4), index


def relative(got, exact):
    return float((got.double() - exact).norm() / exact.norm())


def test_schedule_is_the_cosine_one():
    """abar from its definition; endpoints from the posterior's formulas, in fp64."""
    f = lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2  # noqa: E731
    beta = [min(1 - f((i + 1) / 1000) / f(i / 1000), 0.999) for i in range(1000)]
    abar, products = 1.0, []
    for b in beta:
        abar *= 1 - b
        products.append(abar)
    table = reference.schedule(1000)
    for i in (0, 1, 500, 999):
        before = products[i - 1] if i else 1.0
        posterior = beta[max(i, 1)] * (1 - (products[0] if i == 0 else before)) / (1 - products[max(i, 1)])
        expected = [
            math.sqrt(products[i]),
            math.sqrt(1 - products[i]),
            math.sqrt(1 / products[i]),
            math.sqrt(1 / products[i] - 1),
            beta[i] * math.sqrt(before) / (1 - products[i]),
            (1 - before) * math.sqrt(1 - beta[i]) / (1 - products[i]),
            math.log(posterior),
            math.log(beta[i]),
        ]
        assert table[i].tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("keep", [1, 10, 100, 1000])
def test_a_sampler_of_fewer_steps(keep):
    """It visits steps with the noise that training knows, and its posteriors lead from one of them to the one before."""
    steps = diffusion_steps(1000, keep)
    assert len(set(steps.tolist())) == keep and steps[0] == 0 and steps[-1] == (999 if keep > 1 else 0)
    whole, kept = reference.schedule(1000), reference.schedule(1000, steps)
    torch.testing.assert_close(kept[:, :4], whole[steps, :4], rtol=1e-9, atol=0)
    abar, before = kept[1:, 0] ** 2, kept[:-1, 0] ** 2
    c1, c2, variance = kept[1:, 4], kept[1:, 5], kept[1:, 6].exp()
    torch.testing.assert_close(c1 + c2 * abar.sqrt(), before.sqrt(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(c2**2 * (1 - abar) + variance, 1 - before, rtol=1e-9, atol=1e-12)
    assert torch.equal(diffusion_schedule(keep=keep), kept.float())


@pytest.mark.parametrize("keep", [0, 1001])
def test_a_sampler_keeps_at_most_all_steps(keep):
    with pytest.raises(ValueError, match=f"keeps 1 to 1000 steps, got {keep}"):
        diffusion_schedule(keep=keep)


def test_bound_is_the_kl_divergence_of_two_normals():
    out, x0, t, noise, rows = case()
    t = t.clamp(min=1)
    eps = reference.noise_of(x0, len(t), noise).double()
    got = reference.losses(out.double(), x0.double(), t, eps, reference.schedule(1000), rows)
    sqrt_abar, sqrt_1m, recip, recip_m1, c1, c2, log_posterior, log_beta = reference.schedule(1000)[t][:, :, None].unbind(1)
    x = x0.double()[rows]
    x_t = sqrt_abar * x + sqrt_1m * eps
    predicted, v = out.double().chunk(2, 1)
    truth = torch.distributions.Normal(c1 * x + c2 * x_t, (log_posterior / 2).exp().expand_as(x))
    log_variance = (v + 1) / 2 * log_beta + (1 - v) / 2 * log_posterior
    model = torch.distributions.Normal(c1 * (recip * x_t - recip_m1 * predicted) + c2 * x_t, (log_variance / 2).exp())
    kl = torch.distributions.kl_divergence(truth, model).mean(1) / math.log(2)
    torch.testing.assert_close(got, (predicted - eps).square().mean(1) + kl, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [16, 4, 5, 33])  # MAR's; one block; a broken block; more than a vector
@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_and_gradient_against_fp64(backend, channels, dtype, reduction):
    out, x0, t, noise, rows = case(channels)
    out = out.to(dtype).requires_grad_()
    exact_out = out.detach().double().requires_grad_()
    loss = diffusion_loss(out, x0, t, noise, SCHEDULE, rows=rows, reduction=reduction, backend=backend)
    exact = diffusion_loss(
        exact_out, x0.double(), t, noise, SCHEDULE.double(), rows=rows, reduction=reduction, backend="reference"
    )
    assert loss.dtype == torch.float32 and relative(loss.detach(), exact.detach()) < 1e-5
    upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(3))
    (gradient,) = torch.autograd.grad(loss, out, upstream)
    (exact_gradient,) = torch.autograd.grad(exact, exact_out, upstream.double())
    assert relative(gradient, exact_gradient) < (2e-5 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_first_step_at_the_edges_of_the_range(backend):
    """t = 0 with x0 at and beyond ±0.999, and with predictions so wrong that the probability is clamped."""
    x0 = torch.tensor([[-1.0, -0.9995, 0.9995, 1.0, 0.0, 0.5, -0.5, 3.0]])
    t, noise = torch.zeros(1, dtype=torch.int64), torch.zeros(1, 8)
    for scale in (0.0, 1.0, 50.0):
        out = torch.full((1, 16), scale).requires_grad_()
        exact_out = out.detach().double().requires_grad_()
        loss = diffusion_loss(out, x0, t, noise, SCHEDULE, backend=backend)
        exact = diffusion_loss(exact_out, x0.double(), t, noise.double(), SCHEDULE.double(), backend="reference")
        assert loss.item() == pytest.approx(exact.item(), rel=1e-4)
        loss.backward()
        exact.backward()
        assert torch.isfinite(out.grad).all()
        assert relative(out.grad, exact_out.grad) < 2e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_variance_does_not_pull_the_noise_prediction(backend):
    """The bound sees the predicted noise detached: its half of the gradient is the squared error's alone."""
    out, x0, t, noise, rows = case()
    out.requires_grad_()
    diffusion_loss(out, x0, t, noise, SCHEDULE, rows=rows, reduction="sum", backend=backend).backward()
    eps = reference.noise_of(x0, len(t), noise)
    torch.testing.assert_close(out.grad[:, :16], 2 * (out[:, :16].detach() - eps) / 16, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_prepare_and_rows(backend):
    out, x0, t, noise, rows = case()
    x_t = diffusion_prepare(x0, t, noise, SCHEDULE, rows=rows, backend=backend)
    eps = reference.noise_of(x0, len(t), noise)
    expected = SCHEDULE[t, 0:1] * x0[rows] + SCHEDULE[t, 1:2] * eps
    torch.testing.assert_close(x_t, expected, rtol=1e-6, atol=1e-6)
    repeated = diffusion_loss(out, x0[rows], t, noise, SCHEDULE, reduction="none", backend=backend)
    assert torch.equal(repeated, diffusion_loss(out, x0, t, noise, SCHEDULE, rows=rows, reduction="none", backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend):
    out = torch.zeros(0, 32, requires_grad=True)
    empty = torch.empty(0, dtype=torch.int64)
    loss = diffusion_loss(out, torch.randn(5, 16), empty, Philox(torch.tensor(0), empty, 1), SCHEDULE, rows=empty, backend=backend)
    loss.backward()
    assert loss.item() == 0 and out.grad.shape == (0, 32)


@needs_native
def test_threads_do_not_change_a_bit():
    out, x0, t, noise, rows = case(rows=2000)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        leaf = out.clone().requires_grad_()
        loss = diffusion_loss(leaf, x0, t, noise, SCHEDULE, rows=rows, backend="cpu")
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_native
def test_compiled_graph_is_whole_and_equal():
    out, x0, t, noise, rows = case()

    def step(out, seed):
        address = Philox(seed, noise.sample_ids, 4)
        x_t = diffusion_prepare(x0, t, address, SCHEDULE, rows=rows)
        return x_t, diffusion_loss(out * 2, x0, t, address, SCHEDULE, rows=rows)

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = out.clone().requires_grad_()
        x_t, loss = function(leaf, noise.seed)
        loss.backward()
        results.append((x_t, loss.detach(), leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@needs_native
def test_opcheck():
    out, x0, t, noise, rows = case(rows=20)
    out.requires_grad_()
    torch.library.opcheck(torch.ops.reca.diffusion_loss, (out, x0, t, *noise, None, SCHEDULE, rows, "cpu"))
    torch.library.opcheck(
        torch.ops.reca.diffusion_prepare, (x0, t, *noise, None, SCHEDULE, rows, torch.float32, "cpu")
    )


@needs_native
def test_double_backward_speaks_our_words():
    out, x0, t, noise, rows = case()
    out.requires_grad_()
    (gradient,) = torch.autograd.grad(diffusion_loss(out, x0, t, noise, SCHEDULE, rows=rows), out, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


def test_mistakes_are_named():
    out, x0, t, noise, rows = case()
    good = {"out": out, "x0": x0, "t": t, "noise": noise, "schedule": SCHEDULE, "rows": rows}
    for message, change in (
        ("out must be", {"out": out[:, :31]}),
        ("t must be", {"rows": None}),
        ("rows must be", {"rows": rows[:5]}),
        ("t must be in", {"t": t + 1000}),
        ("rows must be in", {"rows": rows + 50}),
        ("schedule must be", {"schedule": SCHEDULE[:, :7]}),
        ("noise.sample_ids must be", {"noise": noise._replace(sample_ids=torch.arange(3))}),
        ("requires a gradient", {"x0": x0.clone().requires_grad_()}),
        ("reduction must be", {"reduction": "batch"}),
    ):
        with pytest.raises(ValueError, match=message):
            diffusion_loss(**(good | change))


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_twice_and_the_first_gradient_stays(backend):
    out, x0, t, noise, rows = case()
    out.requires_grad_()
    loss = diffusion_loss(out, x0, t, noise, SCHEDULE, rows=rows, backend=backend)
    (first,) = torch.autograd.grad(loss, out, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, out, torch.tensor(3.0))
    torch.testing.assert_close(second, 3 * kept)
    assert torch.equal(first, kept)
