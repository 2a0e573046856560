"""The diffusion loss against fp64 and against torch's own distributions; edge cases; system behaviour."""

import math

import pytest
import torch

from reca_kernels import Philox, diffusion_add_noise, diffusion_loss, diffusion_schedule, native, space_timesteps
from reca_kernels.diffusion_loss import reference
from reca_kernels.diffusion_loss import schedule as schedules
from tests.kernels import cubin
from tests.kernels.backends import targets
from tests.kernels.on_gpu import capture, on_streams

needs_native = pytest.mark.skipif(native.module is None, reason=str(native.missing))
EVERYWHERE = pytest.mark.parametrize(("backend", "device"), targets("diffusion_loss"))
KERNELS = pytest.mark.parametrize(("backend", "device"), targets("diffusion_loss", reference=False))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCHEDULE = diffusion_schedule()
# Triton's interpreter says so of densities that are infinite or 0, which kernels meet in silence.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def case(channels=16, rows=333, samples=50, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randn(samples, channels, generator=generator) * 0.5
    index = torch.randint(0, samples, (rows,), generator=generator)
    t = torch.randint(0, 1000, (rows,), generator=generator)
    t[:20] = 0
    t[20:25] = 999
    out = torch.randn(rows, 2 * channels, generator=generator)
    ids = torch.arange(rows) * (1 + (5 << 40) + (3 << 56)) + 100  # which fill all of their 64 bits
    noise = Philox(torch.tensor(9, device=device), ids.to(device), 4)
    return out.to(device), x0.to(device), t.to(device), noise, index.to(device)


def relative(got, exact):
    return float((got.double().cpu() - exact).norm() / exact.norm())


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
    """It visits steps with the noise that training knows; its posteriors lead from one of them to the one before."""
    steps = space_timesteps(1000, keep)
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
    eps = reference.noise_of(x0, noise).double()
    got = reference.losses(out.double(), x0.double(), t, eps, reference.schedule(1000), rows)
    columns = reference.schedule(1000)[t][:, :, None].unbind(1)
    sqrt_abar, sqrt_1m, recip, recip_m1, c1, c2, log_posterior, log_beta = columns
    x = x0.double()[rows]
    x_t = sqrt_abar * x + sqrt_1m * eps
    predicted, v = out.double().chunk(2, 1)
    truth = torch.distributions.Normal(c1 * x + c2 * x_t, (log_posterior / 2).exp().expand_as(x))
    log_variance = (v + 1) / 2 * log_beta + (1 - v) / 2 * log_posterior
    model = torch.distributions.Normal(c1 * (recip * x_t - recip_m1 * predicted) + c2 * x_t, (log_variance / 2).exp())
    kl = torch.distributions.kl_divergence(truth, model).mean(1) / math.log(2)
    torch.testing.assert_close(got, (predicted - eps).square().mean(1) + kl, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
# MAR's; one block; a broken block; more than a vector; more than a warp's threads would take in eights
@pytest.mark.parametrize("channels", [16, 4, 5, 33, 128])
@EVERYWHERE
def test_loss_and_gradient_against_fp64(backend, device, channels, dtype, reduction):
    out, x0, t, noise, rows = case(channels)
    exact_out = out.to(dtype).double().requires_grad_()
    out, *there = case(channels, device=device)
    out = out.to(dtype).requires_grad_()
    arguments = {"rows": there[3], "reduction": reduction, "backend": backend}
    loss = diffusion_loss(out, *there[:3], diffusion_schedule(device=device), **arguments)
    exact = diffusion_loss(
        exact_out, x0.double(), t, noise, SCHEDULE.double(), rows=rows, reduction=reduction, backend="reference"
    )
    assert loss.dtype == torch.float32 and relative(loss.detach(), exact.detach()) < 1e-5
    upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(3))
    (gradient,) = torch.autograd.grad(loss, out, upstream.to(device))
    (exact_gradient,) = torch.autograd.grad(exact, exact_out, upstream.double())
    assert relative(gradient, exact_gradient) < (2e-5 if dtype == torch.float32 else 5e-3)


@EVERYWHERE
def test_first_step_at_the_edges_of_the_range(backend, device):
    """t = 0 with x0 at and beyond ±0.999, and with predictions so wrong that the probability is clamped."""
    x0 = torch.tensor([[-1.0, -0.9995, 0.9995, 1.0, 0.0, 0.5, -0.5, 3.0]])
    t, noise = torch.zeros(1, dtype=torch.int64), torch.zeros(1, 8)
    for scale in (0.0, 1.0, 50.0):
        out = torch.full((1, 16), scale).requires_grad_()
        exact_out = out.detach().double().requires_grad_()
        there = [x.to(device) for x in (out, x0, t, noise, SCHEDULE)]
        loss = diffusion_loss(*there, backend=backend)
        exact = diffusion_loss(exact_out, x0.double(), t, noise.double(), SCHEDULE.double(), backend="reference")
        assert loss.item() == pytest.approx(exact.item(), rel=1e-4)
        loss.backward()
        exact.backward()
        assert torch.isfinite(out.grad).all()
        assert relative(out.grad, exact_out.grad) < 2e-3


@EVERYWHERE
def test_first_step_from_certain_to_impossible(backend, device):
    """t = 0 over bins from a hundredth of the standard deviation wide to a hundred, near the mean and in the tails."""
    x0 = torch.linspace(-0.99, 0.99, 64)[:, None].expand(64, 16).contiguous()
    x0[::8] = x0[::8].sign() * 1.5
    t, noise = torch.zeros(64, dtype=torch.int64), torch.zeros(64, 16)
    generator = torch.Generator().manual_seed(0)
    guess = torch.randn(64, 16, generator=generator) * torch.logspace(-2, 1, 64)[:, None]
    out = torch.cat((guess, torch.linspace(-30, 30, 16).expand(64, 16)), 1).requires_grad_()
    exact_out = out.detach().double().requires_grad_()
    there = [x.to(device) for x in (out, x0, t, noise, SCHEDULE)]
    losses = diffusion_loss(*there, reduction="none", backend=backend)
    exact = diffusion_loss(
        exact_out, x0.double(), t, noise.double(), SCHEDULE.double(), reduction="none", backend="reference"
    )
    torch.testing.assert_close(losses.cpu().double(), exact, rtol=1e-4, atol=1e-6)
    losses.sum().backward()
    exact.sum().backward()
    assert relative(out.grad[:, 16:], exact_out.grad[:, 16:]) < 1e-3


@EVERYWHERE
def test_variance_does_not_pull_the_noise_prediction(backend, device):
    """The bound sees the predicted noise detached: its half of the gradient is the squared error's alone."""
    out, x0, t, noise, rows = case(device=device)
    out.requires_grad_()
    schedule = diffusion_schedule(device=device)
    diffusion_loss(out, x0, t, noise, schedule, rows=rows, reduction="sum", backend=backend).backward()
    eps = reference.noise_of(x0, noise)
    torch.testing.assert_close(out.grad[:, :16], 2 * (out[:, :16].detach() - eps) / 16, rtol=1e-5, atol=1e-6)


@EVERYWHERE
def test_prepare_and_rows(backend, device):
    out, x0, t, noise, rows = case(device=device)
    schedule = diffusion_schedule(device=device)
    x_t = diffusion_add_noise(x0, t, noise, schedule, rows=rows, backend=backend)
    eps = reference.noise_of(x0, noise)
    expected = schedule[t, 0:1] * x0[rows] + schedule[t, 1:2] * eps
    torch.testing.assert_close(x_t, expected, rtol=1e-6, atol=1e-6)
    arguments = {"reduction": "none", "backend": backend}
    repeated = diffusion_loss(out, x0[rows], t, noise, schedule, **arguments)
    assert torch.equal(repeated, diffusion_loss(out, x0, t, noise, schedule, rows=rows, **arguments))


@KERNELS
@pytest.mark.parametrize("channels", [16, 5])
def test_same_bits_on_every_backend(channels, backend, device):
    """x_t in every pair of types, and the gradient by the predicted noise in fp32."""
    _, x0, t, noise, rows = case(channels, rows=70)
    out, *there = case(channels, rows=70, device=device)
    schedule = diffusion_schedule(device=device)
    for dtype in DTYPES:
        for out_dtype in DTYPES:
            exact = diffusion_add_noise(
                x0.to(dtype), t, noise, SCHEDULE, rows=rows, out_dtype=out_dtype, backend="reference"
            )
            arguments = {"rows": there[3], "out_dtype": out_dtype, "backend": backend}
            got = diffusion_add_noise(there[0].to(dtype), *there[1:3], schedule, **arguments)
            if (backend, device, out_dtype) == ("triton", "cpu", torch.bfloat16):  # its interpreter cuts bits off
                torch.testing.assert_close(got, exact, rtol=2**-7, atol=0)
            else:
                assert torch.equal(got.cpu(), exact)
    out.requires_grad_()
    diffusion_loss(out, *there[:3], schedule, rows=there[3], reduction="sum", backend=backend).backward()
    share = torch.tensor(1 / channels)
    error = out.detach().cpu()[:, :channels] - reference.noise_of(x0, noise)
    assert torch.equal(out.grad.cpu()[:, :channels], error * (2 * share))


@KERNELS
@pytest.mark.parametrize("dtype", DTYPES)
def test_given_noise_and_memory_that_is_not_aligned(dtype, backend, device):
    """Everything begins one element after a 16-byte boundary; noise is given in 16 bits too."""
    out, x0, t, noise, rows = case(device=device)
    schedule = diffusion_schedule(device=device)
    eps = reference.noise_of(x0, noise).to(dtype)
    shift = lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)  # noqa: E731
    assert shift(out).data_ptr() % 16 == 4
    results = []
    for f in (lambda x: x, shift):
        leaf = f(out.to(dtype)).detach().requires_grad_()
        arguments = (f(x0.to(dtype)), t, f(eps), f(schedule))
        loss = diffusion_loss(leaf, *arguments, rows=rows, backend=backend)
        loss.backward()
        results.append((loss.detach(), leaf.grad, diffusion_add_noise(*arguments, rows=rows, backend=backend)))
    for got, exact in zip(*results, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-2 if got.dtype == torch.bfloat16 else 1e-3, atol=1e-6)
    step = schedule[t]
    mixed = step[:, 0:1] * x0.to(dtype).float()[rows] + step[:, 1:2] * eps.float()
    torch.testing.assert_close(results[0][2].float(), mixed, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("channels", [4, 16])
@EVERYWHERE
def test_a_variance_of_nothing_costs_infinity(backend, device, channels):
    """A bound that is too large for fp32 is infinity, never a small or negative loss that would be trained towards."""
    for step, log_variance in ((5, -3000.0), (500, -1e6)):
        out, x0, t, noise, _ = case(channels, rows=3, samples=3, device=device)
        out[:, channels:] = log_variance
        out, t = out.requires_grad_(), torch.full_like(t, step)
        loss = diffusion_loss(out, x0, t, noise, SCHEDULE.to(device), reduction="none", backend=backend)
        (grad,) = torch.autograd.grad(loss.sum(), out)
        assert torch.equal(loss.cpu(), torch.full((3,), torch.inf))
        assert not (grad[:, channels:] > 0).any() and not grad[:, channels:].isfinite().any()


@pytest.mark.parametrize("channels", [4, 16])
@EVERYWHERE
def test_nan_in_a_variance_is_seen_at_every_step(backend, device, channels):
    out, x0, t, noise, _ = case(channels, rows=3, samples=3, device=device)
    t = torch.tensor([0, 5, 999], device=device)
    out[:, channels:] = torch.nan
    out.requires_grad_()
    loss = diffusion_loss(out, x0, t, noise, SCHEDULE.to(device), reduction="none", backend=backend)
    (grad,) = torch.autograd.grad(loss.sum(), out)
    assert loss.isnan().all() and grad[:, channels:].isnan().all()


def test_extremes_with_every_instruction_set(isa):
    for channels in (4, 16):
        test_a_variance_of_nothing_costs_infinity("cpu", "cpu", channels)
        test_nan_in_a_variance_is_seen_at_every_step("cpu", "cpu", channels)


def test_noised_data_in_fp64_come_from_the_reference():
    _, x0, t, noise, rows = case()
    got = diffusion_add_noise(x0, t, noise, SCHEDULE, rows=rows, out_dtype=torch.float64)
    assert torch.equal(
        got, diffusion_add_noise(x0, t, noise, SCHEDULE, rows=rows, out_dtype=torch.float64, backend="reference")
    )


def test_fp64_data_goes_to_the_reference():
    out, x0, t, noise, rows = case()
    exact = diffusion_loss(out.double(), x0.double(), t, noise, SCHEDULE, rows=rows)
    assert relative(diffusion_loss(out, x0.double(), t, noise, SCHEDULE, rows=rows), exact) < 1e-5
    eps = reference.noise_of(x0, noise)
    got = diffusion_loss(out, x0, t, eps.double(), SCHEDULE, rows=rows)
    assert torch.equal(got, diffusion_loss(out, x0, t, eps, SCHEDULE, rows=rows))


@EVERYWHERE
def test_no_rows(backend, device):
    out = torch.zeros(0, 32, requires_grad=True, device=device)
    empty = torch.empty(0, dtype=torch.int64, device=device)
    noise, schedule = Philox(torch.tensor(0, device=device), empty, 1), diffusion_schedule(device=device)
    loss = diffusion_loss(out, torch.randn(5, 16, device=device), empty, noise, schedule, rows=empty, backend=backend)
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
        x_t = diffusion_add_noise(x0, t, address, SCHEDULE, rows=rows)
        return x_t, diffusion_loss(out * 2, x0, t, address, SCHEDULE, rows=rows)

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = out.clone().requires_grad_()
        x_t, loss = function(leaf, noise.seed)
        loss.backward()
        results.append((x_t, loss.detach(), leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@needs_native
@pytest.mark.parametrize("dynamic", [None, True])
def test_a_compiled_graph_holds_the_schedule(dynamic):
    schedules._schedule.cache_clear()  # it may be made while the graph is traced
    step = lambda x0, t, eps: diffusion_add_noise(x0, t, eps, diffusion_schedule(30))  # noqa: E731
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (4, 7):
        arguments = torch.randn(rows, 8), torch.arange(rows), torch.randn(rows, 8)
        assert torch.equal(compiled(*arguments), step(*arguments))


@needs_native
def test_opcheck():
    out, x0, t, noise, rows = case(rows=20)
    out.requires_grad_()
    torch.library.opcheck(torch.ops.reca.diffusion_loss, (out, x0, t, *noise, None, SCHEDULE, rows, True, False, "cpu"))
    torch.library.opcheck(
        torch.ops.reca.diffusion_add_noise, (x0, t, *noise, None, SCHEDULE, rows, torch.float32, "cpu")
    )


@pytest.mark.parametrize(("backend", "device"), targets("diffusion_loss", reference=False))
def test_a_row_that_the_caller_leaves_out_reaches_nothing(backend, device):
    """Its upstream gradient is 0, and 0 times NaN would be NaN."""
    out, x0, t, noise, rows = case(rows=40, device=device)
    out[3], out[7, 5] = float("nan"), float("inf")
    out.requires_grad_()
    losses = diffusion_loss(out, x0, t, noise, SCHEDULE.to(device), rows=rows, reduction="none", backend=backend)
    keep = losses.isfinite()
    (gradient,) = torch.autograd.grad(torch.where(keep, losses, 0).sum(), out)
    assert keep.sum() == 38 and not gradient[~keep].any() and gradient[keep].isfinite().all()


@needs_native
def test_double_backward_speaks_our_words():
    out, x0, t, noise, rows = case()
    out.requires_grad_()
    (gradient,) = torch.autograd.grad(diffusion_loss(out, x0, t, noise, SCHEDULE, rows=rows), out, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


def test_a_schedule_is_of_one_gpu(monkeypatch):
    """It is kept by its device, so without an index that is the current one."""
    monkeypatch.setattr(schedules, "_schedule", lambda steps, keep, device: device)
    for current in (0, 1):
        monkeypatch.setattr(torch.cuda, "current_device", lambda current=current: current)
        assert diffusion_schedule(device="cuda") == torch.device("cuda", current)


def test_mistakes_are_named():
    out, x0, t, noise, rows = case()
    good = {"out": out, "x0": x0, "t": t, "noise": noise, "schedule": SCHEDULE, "rows": rows}
    for message, change in (
        ("out must be", {"out": out[:, :31]}),
        ("t must be", {"rows": None}),
        ("rows must be", {"rows": rows[:5]}),
        (r"x0 must be \[N, C > 0\]", {"x0": x0[:, :0]}),
        ("t must be in", {"t": t + 1000}),
        ("rows must be in", {"rows": rows + 50}),
        ("schedule must be", {"schedule": SCHEDULE[:, :7]}),
        ("noise.sample_ids must be", {"noise": noise._replace(sample_ids=torch.arange(3))}),
        ("x0 requires a gradient", {"x0": x0.clone().requires_grad_()}),
        ("schedule requires a gradient", {"schedule": SCHEDULE.clone().requires_grad_()}),
        ("noise requires a gradient", {"noise": torch.zeros(len(t), x0.shape[1], requires_grad=True)}),
        ("seed must be an int64 tensor", {"noise": noise._replace(seed=3)}),
        ("must be on one device, got x0 on cpu, t on cpu, schedule on meta", {"schedule": SCHEDULE.to("meta")}),
        ("reduction must be", {"reduction": "batch"}),
    ):
        with pytest.raises(ValueError, match=message):
            diffusion_loss(**(good | change))


@pytest.mark.parametrize(("backend", "device"), targets("diffusion_loss", reference=False, skip=("cpu",)))
@pytest.mark.parametrize("channels", [8, 5])
def test_unchecked_indices_out_of_range_poison_their_rows(channels, backend, device, monkeypatch):
    """Whatever lies beyond x0 and the schedule: nothing there is read."""
    monkeypatch.setattr("reca_kernels.checks.index_inside", lambda *_: None)
    schedule = diffusion_schedule(20, device=device)
    t = torch.tensor([0, 20, 3, -1, 1 << 40, 0, 0, 7], device=device)
    rows = torch.tensor([2, 0, 0, 1, 1, 3, -1, 2], device=device)
    x0, eps = torch.randn(3, channels, device=device), torch.randn(8, channels, device=device)
    out = torch.randn(8, 2 * channels, device=device)
    bad = [False, True, False, True, True, True, True, False]
    x_t = diffusion_add_noise(x0, t, eps, schedule, rows=rows, backend=backend)
    losses = diffusion_loss(out, x0, t, eps, schedule, rows=rows, reduction="none", backend=backend)
    assert x_t.isnan().all(1).tolist() == x_t.isnan().any(1).tolist() == losses.isnan().tolist() == bad


def test_a_batched_tensor_loses_no_gradient_in_silence():
    out, x0, t, noise, _ = case()
    both = torch.stack((x0, x0)).requires_grad_()
    with pytest.raises(ValueError, match="x0 requires a gradient"):
        torch.vmap(lambda x: diffusion_loss(out, x, t, noise, SCHEDULE, rows=t % 3))(both)


@EVERYWHERE
def test_backward_twice_and_the_first_gradient_stays(backend, device):
    out, x0, t, noise, rows = case(device=device)
    out.requires_grad_()
    loss = diffusion_loss(out, x0, t, noise, diffusion_schedule(device=device), rows=rows, backend=backend)
    (first,) = torch.autograd.grad(loss, out, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, out, torch.tensor(3.0, device=device))
    torch.testing.assert_close(second, 3 * kept)
    assert torch.equal(first, kept)


# ---- on a GPU ----

ON_GPU = pytest.mark.parametrize("backend", ["cuda", "triton"])


def step(backend, channels=16, seed=9):
    """(x_t, losses, gradient) on the GPU, of noise whose seed the returned tensor holds."""
    out, x0, t, noise, rows = case(channels, rows=4000, device="cuda")
    schedule = diffusion_schedule(device="cuda")
    noise.seed.fill_(seed)

    def run():
        x_t = diffusion_add_noise(x0, t, noise, schedule, rows=rows, backend=backend)
        leaf = torch.cat((x_t, out[:, channels:]), 1).requires_grad_()
        losses = diffusion_loss(leaf, x0, t, noise, schedule, rows=rows, reduction="none", backend=backend)
        return [x_t, losses.detach(), *torch.autograd.grad(losses, leaf, torch.ones_like(losses))]

    return run, noise.seed


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("channels", [16, 5])
def test_every_run_makes_the_same_bits(channels, backend):
    run, _ = step(backend, channels)
    first = run()
    assert all(equal(run(), first) for _ in range(5))


@pytest.mark.gpu
@ON_GPU
def test_a_captured_graph_draws_from_the_seed_it_finds(backend):
    run, seed = step(backend)
    graph, captured = capture(run)
    for new in (5, -(2**40)):
        seed.fill_(new)
        graph.replay()
        assert equal(captured, step(backend, seed=new)[0]())


@pytest.mark.gpu
@ON_GPU
def test_two_streams(backend):
    runs = [step(backend, seed=seed)[0] for seed in (1, 2)]
    want = [run() for run in runs]
    assert all(map(equal, on_streams(runs), want))


@pytest.mark.gpu
@ON_GPU
def test_more_than_2_31_elements(backend):
    count, schedule = 2**24 + 1000, diffusion_schedule(device="cuda")
    x0 = torch.randn(7, 128, device="cuda", dtype=torch.bfloat16)
    rows, t = (torch.arange(count, device="cuda") % n for n in (7, 1000))
    noise = Philox(torch.tensor(3, device="cuda"), torch.arange(count, device="cuda"), 1)
    x_t = diffusion_add_noise(x0, t, noise, schedule, rows=rows, backend=backend)
    tail = slice(count - 500, count)
    noise_there = noise._replace(sample_ids=noise.sample_ids[tail])
    assert x_t.numel() > 2**31
    alone = diffusion_add_noise(x0, t[tail], noise_there, schedule, rows=rows[tail], backend=backend)
    assert torch.equal(x_t[tail], alone)
    out = torch.cat((x_t, x_t), 1).requires_grad_()
    losses = diffusion_loss(out, x0, t, noise, schedule, rows=rows, reduction="none", backend=backend)
    leaf = out.detach()[tail].requires_grad_()
    there = diffusion_loss(leaf, x0, t[tail], noise_there, schedule, rows=rows[tail], reduction="none", backend=backend)
    assert torch.equal(losses.detach()[tail], there.detach())
    (gradient,) = torch.autograd.grad(losses.sum(), out)
    assert torch.equal(gradient[tail], torch.autograd.grad(there.sum(), leaf)[0])


@pytest.mark.gpu
@ON_GPU
def test_compiled_by_inductor(backend):
    out, x0, t, noise, rows = case(device="cuda")
    schedule = diffusion_schedule(device="cuda")

    def f(out, seed, ids):
        address = Philox(seed, ids, 4)
        x_t = diffusion_add_noise(x0, t, address, schedule, rows=rows, backend=backend)
        return x_t, diffusion_loss(out * 2, x0, t, address, schedule, rows=rows, reduction="sum", backend=backend)

    results = []
    for function in (f, torch.compile(f, fullgraph=True)):
        leaf = out.clone().requires_grad_()
        x_t, loss = function(leaf, noise.seed, noise.sample_ids)
        loss.backward()
        results.append((x_t, loss.detach(), leaf.grad))
    torch.testing.assert_close(*results, rtol=1e-6, atol=0)  # inductor may add the rows' losses in another order


# ---- what Triton made ----


def launches():
    from reca_kernels.diffusion_loss import triton as op

    for dtype in (torch.float32, torch.bfloat16):
        out, x0 = torch.empty(512, 32, dtype=dtype), torch.empty(64, 16, dtype=dtype)
        t, noise = torch.zeros(512, dtype=torch.int64), Philox(torch.tensor(5), torch.arange(512), 1)
        op.add_noise(x0, t, noise, SCHEDULE, t, torch.empty(512, 16, dtype=dtype))
        op.losses(out, x0, t, noise, SCHEDULE, t, torch.empty_like(out))


def test_compiled_for_every_gpu():
    made = cubin.compiled(launches)
    kernels = ("add_noise_kernel", "loss_kernel")
    assert {(m.kernel, m.arch) for m in made} == {(kernel, arch) for kernel in kernels for arch in cubin.ARCHS}
    for m in made:
        m.assert_lean(registers=128 if m.kernel == "loss_kernel" else 64, loads=(128,), stores=(128,))
