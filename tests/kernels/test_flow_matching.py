"""Flow matching against fp64, at every layout, dtype and reduction; edge cases; system behaviour."""

from pathlib import Path

import pytest
import torch

from reca_kernels import Philox, flow_matching_add_noise, flow_matching_loss, native
from reca_kernels.flow_matching import native as launchers
from reca_kernels.flow_matching import reference
from reca_kernels.philox import reference as philox
from tests.kernels import cubin
from tests.kernels.backends import targets
from tests.kernels.on_gpu import capture, needs_sanitizer, on_streams, sanitize

EVERYWHERE = pytest.mark.parametrize(("backend", "device"), targets("flow_matching"))
KERNELS = pytest.mark.parametrize(("backend", "device"), targets("flow_matching", reference=False))
needs_native = pytest.mark.skipif(native.module is None, reason=str(native.missing))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Odd sizes: elements that are no multiple of a Philox block, of a vector, or of a chunk of the kernel. And elements and
# channels of patches in eights, which have CUDA kernels of their own.
LAYOUTS = {
    "batch": (torch.Size((3, 5, 7, 9)), 1),
    "batch in eights": (torch.Size((3, 4, 10, 12)), 1),
    "one image over several chunks": (torch.Size((1, 16, 24, 40)), 1),
    "packed": ([(16, 8, 6), (16, 4, 10), (16, 12, 12), (16, 2, 2)], 2),
    "patches over several chunks": ([(12, 24, 40), (12, 30, 2)], 2),
    "batch in tokens": (torch.Size((2, 4, 6, 6)), 3),
    "one image holds nothing": ([(16, 2, 4), (16, 0, 4), (16, 2, 2)], 2),
}


def case(layout, dtype=torch.float32, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    shape, patch = LAYOUTS[layout]
    draw = lambda size: torch.randn(size, generator=generator).to(device, dtype)  # noqa: E731
    x0 = draw(shape) if isinstance(shape, torch.Size) else [draw(s) for s in shape]
    count = len(x0)
    noise = Philox(torch.tensor(-77, device=device), (torch.arange(count) * (1000 + (5 << 56)) + 3).to(device), 4)
    return x0, torch.rand(count, generator=generator).to(device), noise, patch


def wide(x0):
    return x0.double() if isinstance(x0, torch.Tensor) else [x.double() for x in x0]


def close(got, exact, relative):
    error = (got.double().cpu() - exact).norm() / exact.norm().clamp(min=1e-30)
    assert float(error) < relative


@EVERYWHERE
@pytest.mark.parametrize("layout", LAYOUTS)
def test_prepare_mixes_data_and_noise(layout, backend, device):
    x0, t, noise, patch = case(layout, device=device)
    x_t = flow_matching_add_noise(x0, t, noise, patch=patch, backend=backend)
    clean = flow_matching_add_noise(x0, torch.zeros_like(t), noise, patch=patch, backend=backend)
    pure = flow_matching_add_noise(x0, torch.ones_like(t), noise, patch=patch, backend=backend)
    images = list(x0)
    start = 0
    for level, image in zip(t, images, strict=True):
        part = slice(start, start + image.numel())
        start += image.numel()
        expected = (1 - level) * clean.flatten()[part] + level * pure.flatten()[part]
        torch.testing.assert_close(x_t.flatten()[part], expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(clean.flatten()[part], reference.tokens(image, patch))
    assert abs(float(pure.mean())) < 0.3 and 0.7 < float(pure.std()) < 1.3


@KERNELS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_on_every_backend(layout, backend, device):
    """x_t in every pair of types, and the gradient in fp32: there no backend rounds otherwise than the reference."""
    for dtype in DTYPES:
        x0, t, noise, patch = case(layout, dtype)
        there = case(layout, dtype, device=device)[:3]
        for out_dtype in DTYPES:
            arguments = {"patch": patch, "out_dtype": out_dtype}
            got = flow_matching_add_noise(*there, backend=backend, **arguments)
            exact = flow_matching_add_noise(x0, t, noise, backend="reference", **arguments)
            if (backend, device, out_dtype) == ("triton", "cpu", torch.bfloat16):  # its interpreter cuts bits off
                torch.testing.assert_close(got, exact, rtol=2**-7, atol=0)
            else:
                assert torch.equal(got.cpu(), exact)
        x_t = got.float().cpu()
        gradients = []
        for where, arguments, b in ((device, there, backend), ("cpu", (x0, t, noise), "reference")):
            pred = x_t.to(where).requires_grad_()
            flow_matching_loss(pred, *arguments, patch=patch, reduction="sum", backend=b).backward()
            gradients.append(pred.grad.cpu())
        assert torch.equal(*gradients)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_instruction_set(isa, layout):
    test_same_bits_on_every_backend(layout, "cpu", "cpu")


@EVERYWHERE
def test_patch_order_is_row_column_channel(backend, device):
    x0 = [torch.arange(2 * 4 * 4.0, device=device).view(2, 4, 4)]
    noise = torch.zeros(4, 8, device=device)
    got = flow_matching_add_noise(x0, torch.zeros(1, device=device), noise, patch=2, backend=backend)
    first = [x0[0][c, r, k] for r in (0, 1) for k in (0, 1) for c in (0, 1)]
    assert got.shape == (4, 8) and got[0].tolist() == [float(v) for v in first]
    assert got[1, 0] == x0[0][0, 0, 2] and got[2, 0] == x0[0][0, 2, 0]


@pytest.mark.parametrize("second", [(3, 2, 3), (3, 3, 2), (3, 1, 2)], ids=["wider", "higher", "flatter"])
@EVERYWHERE
def test_images_of_a_list_become_tokens_of_one_latent(backend, device, second):
    x0 = [torch.arange(12.0, device=device).view(3, 2, 2), torch.ones(second, device=device).cumsum(1).cumsum(2)]
    t, noise = torch.zeros(2, device=device), torch.zeros(4 + x0[1][0].numel(), 3, device=device)
    got = flow_matching_add_noise(x0, t, noise, backend=backend)
    assert torch.equal(got, torch.cat([x.flatten(1).T for x in x0]))
    assert float(flow_matching_loss(-got, x0, t, noise, backend=backend)) == 0


@pytest.mark.parametrize("reduction", ["mean", "sum", "sample"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@EVERYWHERE
def test_loss_and_gradient_against_fp64(layout, dtype, reduction, backend, device):
    x0, t, noise, patch = case(layout)
    generator = torch.Generator().manual_seed(1)
    shape = flow_matching_add_noise(x0, t, noise, patch=patch).shape
    pred = torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
    exact_pred = pred.detach().double().cpu().requires_grad_()
    weight = torch.rand(len(t), generator=generator)
    arguments = {"patch": patch, "reduction": reduction}
    there = case(layout, device=device)[:3]
    loss = flow_matching_loss(pred, *there, backend=backend, weight=weight.to(device), **arguments)
    exact = flow_matching_loss(exact_pred, wide(x0), t, noise, backend="reference", weight=weight, **arguments)
    assert loss.dtype == torch.float32
    close(loss.detach(), exact.detach(), 1e-5)
    upstream = torch.randn(loss.shape, generator=generator)
    (gradient,) = torch.autograd.grad(loss, pred, upstream.to(device))
    (exact_gradient,) = torch.autograd.grad(exact, exact_pred, upstream.double())
    assert gradient.dtype == dtype
    close(gradient, exact_gradient, 1e-5 if dtype == torch.float32 else 5e-3)


@KERNELS
def test_more_images_than_fit_into_one_launch(backend, device):
    """Of 40 sizes, so that no two make one run; a launch takes 32 in CUDA, 8 in Triton."""
    generator = torch.Generator().manual_seed(0)
    x0 = [torch.randn(8, 1, n, generator=generator) for n in range(1, 41)]
    noise, t = Philox(torch.tensor(5), torch.arange(40), 1), torch.rand(40, generator=generator)
    there = ([x.to(device) for x in x0], t.to(device), Philox(*(n.to(device) for n in noise[:2]), 1))
    x_t = flow_matching_add_noise(x0, t, noise)
    assert torch.equal(flow_matching_add_noise(*there, backend=backend).cpu(), x_t)
    got = flow_matching_loss(x_t.to(device), *there, reduction="sample", backend=backend)
    exact = flow_matching_loss(x_t.double(), wide(x0), t, noise, reduction="sample", backend="reference")
    close(got, exact, 1e-5)


@pytest.mark.parametrize(("backend", "device"), [p for p in targets("flow_matching") if p.values[0] == "cuda"])
def test_many_tiles_in_a_block(backend, device, monkeypatch):
    x0, t, noise, _ = case("one image over several chunks", device=device)
    pred, results = torch.randn(x0.shape, device=device), []
    for tiles in (1, 3):
        monkeypatch.setattr(launchers, "tiles_per_block", lambda _, tiles=tiles: tiles)
        leaf = pred.clone().requires_grad_()
        loss = flow_matching_loss(leaf, x0, t, noise, backend=backend)
        loss.backward()
        results.append((flow_matching_add_noise(x0, t, noise, backend=backend), leaf.grad, loss.detach()))
    for one, three in zip(*results, strict=True):
        torch.testing.assert_close(one, three, rtol=1e-6, atol=0)
    assert torch.equal(results[0][0], results[1][0])


@EVERYWHERE
def test_noise_does_not_see_batch_or_packing(backend, device):
    x0, t, noise, patch = case("packed", device=device)
    whole = flow_matching_add_noise(x0, t, noise, patch=patch, backend=backend)
    alone = flow_matching_add_noise(
        x0[2:3], t[2:3], noise._replace(sample_ids=noise.sample_ids[2:3]), patch=patch, backend=backend
    )
    start = sum(x.numel() for x in x0[:2]) // whole.shape[1]
    assert torch.equal(whole[start : start + len(alone)], alone)


@EVERYWHERE
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["batch", "batch in eights"])
def test_given_noise_is_used(layout, dtype, backend, device):
    x0, t, _, _ = case(layout, device=device)
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(5)).to(device, dtype)
    x_t = flow_matching_add_noise(x0, t, eps, backend=backend)
    level = t.view(-1, 1, 1, 1)
    torch.testing.assert_close(x_t, (1 - level) * x0 + level * eps.float(), rtol=1e-6, atol=1e-6)
    assert float(flow_matching_loss(eps - x0, x0, t, eps, backend=backend)) < 1e-12


@needs_native
def test_threads_do_not_change_a_bit():
    x0, t, noise, _ = case("one image over several chunks")
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        pred = x0.clone().requires_grad_()
        loss = flow_matching_loss(pred, x0, t, noise, backend="cpu")
        loss.backward()
        results.append((flow_matching_add_noise(x0, t, noise, backend="cpu"), loss.detach(), pred.grad))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@EVERYWHERE
def test_layouts_dtypes_and_no_hidden_writes(backend, device):
    x0, t, noise, _ = case("batch", device=device)
    strided = torch.empty(3, 5, 9, 7, device=device).transpose(2, 3).copy_(x0)
    pred = torch.randn(3, 5, 9, 7, device=device).transpose(2, 3).requires_grad_()
    kept, version = pred.detach().clone(), pred._version
    a = flow_matching_loss(pred, strided, t, noise, backend=backend)
    b = flow_matching_loss(pred.detach().contiguous(), x0, t, noise, backend=backend)
    a.backward()
    assert torch.equal(a.detach(), b) and pred.grad.shape == pred.shape
    assert torch.equal(pred.detach(), kept) and pred._version == version
    assert flow_matching_add_noise(x0.bfloat16(), t, noise, backend=backend).dtype == torch.bfloat16
    assert flow_matching_add_noise(x0, t, noise, out_dtype=torch.float16, backend=backend).dtype == torch.float16


@EVERYWHERE
def test_fp64_levels_and_noise(backend, device):
    x0, t, noise, _ = case("batch", device=device)
    x_t = flow_matching_add_noise(x0, t, noise, backend=backend)
    assert torch.equal(flow_matching_add_noise(x0, t.double(), noise, backend=backend).float(), x_t)
    eps = torch.randn(x0.shape, device=device)
    x_t = flow_matching_add_noise(x0, t, eps, backend=backend)
    assert torch.equal(flow_matching_add_noise(x0, t, eps.double(), backend=backend), x_t)


def test_fp64_data_goes_to_the_reference():
    x0, t, noise, _ = case("batch")
    mixed = flow_matching_add_noise(x0, t, noise, out_dtype=torch.float64)
    assert torch.equal(mixed, flow_matching_add_noise(x0, t, noise, out_dtype=torch.float64, backend="reference"))
    pred = torch.randn(x0.shape)
    exact = flow_matching_loss(pred.double(), x0.double(), t, noise)
    close(flow_matching_loss(pred, x0.double(), t, noise), exact, 1e-6)
    if native.module is not None:
        with pytest.raises(RuntimeError, match=r"takes fp32, bf16 or fp16, got torch\.float64"):
            flow_matching_loss(pred, x0.double(), t, noise, backend="cpu")


@EVERYWHERE
@pytest.mark.parametrize("reduction", ["mean", "sum", "sample"])
@pytest.mark.parametrize(("shape", "patch", "expected"), [
    ((0, 3, 4, 4), 1, (0, 3, 4, 4)),
    ((0, 3, 4, 4), 2, (0, 12)),
    ((2, 3, 0, 4), 2, (0, 12)),
    ((2, 0, 4, 4), 2, (8, 0)),
])  # fmt: skip
def test_no_images_and_no_elements(shape, patch, expected, reduction, backend, device):
    x0, t = torch.zeros(shape, device=device), torch.zeros(shape[0], device=device)
    noise = Philox(torch.tensor(1, device=device), torch.arange(shape[0], device=device), 0)
    x_t = flow_matching_add_noise(x0, t, noise, patch=patch, backend=backend)
    assert x_t.shape == expected
    pred = x_t.requires_grad_()
    options = {"patch": patch, "reduction": reduction, "backend": backend}
    loss = flow_matching_loss(pred, x0, t, noise, weight=torch.ones_like(t), **options)
    assert loss.shape == (t.shape if reduction == "sample" else ()) and not loss.any()
    loss.sum().backward()
    assert pred.grad.shape == expected


@pytest.mark.parametrize("moved", ["x0", "pred", "t", "noise", "all"])
@KERNELS
def test_memory_that_is_not_aligned(backend, device, moved):
    """It begins four bytes after a 16-byte boundary, with sizes for which vectors would do otherwise."""
    x0, t, address, _ = case("batch in eights", device=device)
    noise = flow_matching_add_noise(x0, torch.ones_like(t), address, backend=backend)
    tensors = {"x0": x0, "pred": x0 * 2, "t": t, "noise": noise}
    results = []
    for names in ((), tuple(tensors) if moved == "all" else (moved,)):
        there = dict(tensors)
        for name in names:
            x = tensors[name]
            there[name] = torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)
            assert there[name].data_ptr() % 16 == 4
        pred, rest = there["pred"].requires_grad_(), (there["x0"], there["t"])
        losses = [flow_matching_loss(pred, *rest, eps, backend=backend) for eps in (address, there["noise"])]
        noisy = [flow_matching_add_noise(*rest, eps, backend=backend) for eps in (address, there["noise"])]
        results.append((losses, [*noisy, *(torch.autograd.grad(loss, pred)[0] for loss in losses)]))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-6, atol=0)
    assert all(torch.equal(got, want) for got, want in zip(results[1][1], results[0][1], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@KERNELS
def test_images_anywhere_in_one_buffer(dtype, backend, device):
    """From one to the next is a multiple of 16 bytes and of eight elements, of one of these, or of none."""
    buffer = torch.arange(40, device=device, dtype=dtype)
    t, noise = torch.zeros(2, device=device), torch.zeros(2, 8, device=device)
    for start in range(16):
        x0 = [buffer[at : at + 8].view(2, 2, 2) for at in (0, 8 + start)]
        got = flow_matching_add_noise(x0, t, noise, patch=2, backend=backend)
        want = torch.cat([reference.tokens(image, 2).flatten() for image in x0])
        assert torch.equal(got.flatten(), want.to(got.dtype)), start


def test_second_backward_and_double_backward():
    x0, t, noise, _ = case("batch")
    pred = torch.randn(x0.shape).requires_grad_()
    loss = flow_matching_loss(pred, x0, t, noise, reduction="sample")
    first = torch.autograd.grad(loss, pred, torch.tensor([1.0, -2.0, 0.0]), retain_graph=True)[0]
    again = torch.autograd.grad(loss, pred, torch.tensor([1.0, -2.0, 0.0]), retain_graph=True)[0]
    assert torch.equal(first, again) and not first[2].any()
    if native.module is not None:
        (gradient,) = torch.autograd.grad(loss.sum(), pred, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            gradient.sum().backward()


def test_autocast_and_no_grad():
    x0, t, noise, _ = case("batch")
    pred = torch.randn(x0.shape)
    plain = flow_matching_loss(pred, x0, t, noise)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(flow_matching_loss(pred, x0, t, noise), plain)


@needs_native
@pytest.mark.parametrize("layout", ["batch", "packed"])
def test_compiled_graph_is_whole_and_equal(layout):
    x0, t, noise, patch = case(layout)

    def step(pred, t, seed, ids):
        address = Philox(seed, ids, 4)
        x_t = flow_matching_add_noise(x0, t, address, patch=patch)
        return x_t, flow_matching_loss(pred * 2, x0, t, address, patch=patch)

    pred = torch.randn(flow_matching_add_noise(x0, t, noise, patch=patch).shape)
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = pred.clone().requires_grad_()
        x_t, loss = function(leaf, t, noise.seed, noise.sample_ids)
        loss.backward()
        results.append((x_t, loss.detach(), leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@needs_native
def test_opcheck():
    x0, t, noise, _ = case("batch")
    batches = [x0]
    pred = torch.randn(x0.shape, requires_grad=True)
    torch.library.opcheck(torch.ops.reca.flow_matching_loss, (pred, batches, *noise, None, 1, True, False, "cpu"))
    torch.library.opcheck(torch.ops.reca.flow_matching_add_noise, (batches, t, *noise, None, 1, torch.float32, "cpu"))


@pytest.mark.parametrize("reduction", ["mean", "sum", "sample"])
@pytest.mark.parametrize("layout", ["batch", "packed"])
@pytest.mark.parametrize(("backend", "device"), targets("flow_matching"))
def test_an_image_of_weight_0_reaches_nothing(backend, device, layout, reduction):
    x0, t, noise, patch = case(layout, device=device)
    count = len(x0)
    shape = flow_matching_add_noise(x0, t, noise, patch=patch).shape
    pred = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)
    weight = torch.arange(1.0, count + 1, device=device)
    weight[0] = 0
    first = x0[0].numel()
    results = []
    for junk in (None, float("nan"), float("inf")):
        p = pred.clone()
        if junk is not None:
            p.view(-1)[:first:3] = junk
        p.requires_grad_()
        loss = flow_matching_loss(p, x0, t, noise, patch=patch, weight=weight, reduction=reduction, backend=backend)
        results.append((loss.detach(), torch.autograd.grad(loss.sum(), p)[0]))
    for got in results[1:]:
        for a, b in zip(got, results[0], strict=True):
            assert torch.equal(a, b)


def _bad(message, **changes):
    x0, t, noise, patch = case("batch")
    arguments = {"pred": torch.zeros(x0.shape), "x0": x0, "t": t, "noise": noise, "patch": patch} | changes
    with pytest.raises((ValueError, TypeError), match=message):
        flow_matching_loss(**arguments)


def test_mistakes_are_named():
    _bad("pred must be", pred=torch.zeros(3, 5, 7, 8))
    _bad("one level per image", t=torch.zeros(2))
    _bad("multiples of patch=2", patch=2)
    _bad("must be one of mean, sum, sample", reduction="none")
    _bad("one per image", noise=Philox(torch.tensor(0), torch.arange(2), 1))
    _bad(r"noise must be \[3, 5, 7, 9\], shaped like the result, got \[4\]", noise=torch.zeros(4))
    _bad("shaped like the result", noise=torch.zeros(3, 7, 9, 5))  # as many elements, in another order
    _bad("x0 requires a gradient", x0=torch.zeros(3, 5, 7, 9, requires_grad=True))
    _bad("noise requires a gradient", noise=torch.zeros(3, 5, 7, 9, requires_grad=True))
    _bad("must not be an empty list", x0=[])
    _bad("one per image", weight=torch.ones(2))
    _bad("fp32, bf16 or fp16", pred=torch.zeros(3, 5, 7, 9, dtype=torch.int64))
    _bad("all tensors must be on one device, got x0 on cpu, t on meta", t=torch.zeros(3, device="meta"))
    _bad("seed must be an int64 tensor", noise=Philox(3, torch.arange(3), 1))


@EVERYWHERE
def test_levels_lie_between_image_and_noise(backend, device, monkeypatch):
    """A timestep of 1000, which other libraries take, would be silent nonsense. NaN stays."""
    monkeypatch.setenv("RECA_CHECK", "1")
    x0, _, noise, patch = case("batch", device=device)
    add_noise = lambda t: flow_matching_add_noise(x0, t, noise, patch=patch, backend=backend)  # noqa: E731
    for wrong in (1.001, -0.001, 999.0, float("inf")):
        with pytest.raises(ValueError, match=rf"t must be in \[0, 1\] \(1 is noise\), got {wrong:g}; divide"):
            add_noise(torch.tensor([0.0, wrong, 1.0], device=device))
    nan = add_noise(torch.tensor([0.0, float("nan"), 1.0], device=device)).isnan()
    assert nan[1].all() and not nan[[0, 2]].any()
    with pytest.raises(TypeError, match="t must be fp32, bf16 or fp16, got torch.int64"):
        add_noise(torch.tensor([0, 1, 1], device=device))


def test_the_noisy_input_has_no_gradient_to_lose():
    x0, t, noise, patch = case("batch")
    with pytest.raises(ValueError, match="t requires a gradient"):
        flow_matching_add_noise(x0, t.requires_grad_(), noise, patch=patch)


@EVERYWHERE
def test_backward_twice_and_the_first_gradient_stays(backend, device):
    x0, t, noise, patch = case("packed", device=device)
    pred = torch.randn(flow_matching_add_noise(x0, t, noise, patch=patch).shape, device=device).requires_grad_()
    loss = flow_matching_loss(pred, x0, t, noise, patch=patch, backend=backend)
    (first,) = torch.autograd.grad(loss, pred, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, pred, torch.tensor(3.0, device=device))
    torch.testing.assert_close(second, 3 * kept)
    assert torch.equal(first, kept)


# ---- on a GPU ----

ON_GPU = pytest.mark.parametrize("backend", ["cuda", "triton"])


def step(layout, backend, seed=-77, dtype=torch.bfloat16):
    """(x_t, loss, gradient) on the GPU, of noise whose seed the returned tensor holds."""
    x0, t, noise, patch = case(layout, dtype, device="cuda")
    noise.seed.fill_(seed)

    def run():
        x_t = flow_matching_add_noise(x0, t, noise, patch=patch, backend=backend)
        pred = (x_t * 2).requires_grad_()
        loss = flow_matching_loss(pred, x0, t, noise, patch=patch, reduction="sample", backend=backend)
        return [x_t, loss.detach(), *torch.autograd.grad(loss, pred, torch.ones_like(loss))]

    return run, noise.seed


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_run_makes_the_same_bits(layout, backend):
    run, _ = step(layout, backend)
    first = run()
    assert all(equal(run(), first) for _ in range(5))


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("layout", ["batch in eights", "packed"])
def test_a_captured_graph_draws_from_the_seed_it_finds(layout, backend):
    run, seed = step(layout, backend)
    graph, captured = capture(run)
    for new in (5, -(2**40)):
        seed.fill_(new)
        graph.replay()
        assert equal(captured, step(layout, backend, new)[0]())


@pytest.mark.gpu
@ON_GPU
def test_two_streams(backend):
    runs = [step("one image over several chunks", backend, seed)[0] for seed in (1, 2)]
    want = [run() for run in runs]
    assert all(map(equal, on_streams(runs), want))


def assert_elements_are_independent_of_the_batch(side, backend, device):
    """The last image of three, one image as large as they are, and an element of its last third, against small ones."""
    large = torch.zeros(3, 16, side, side, dtype=torch.bfloat16, device=device)
    last = torch.randn(16, side, side, device=device, dtype=torch.bfloat16)
    large[2] = last
    noise = Philox(torch.tensor(3, device=device), torch.tensor([0, 1, 2], device=device), 1)
    t = torch.full((3,), 0.5, device=device)
    x_t = flow_matching_add_noise(large, t, noise, backend=backend)
    third = noise._replace(sample_ids=noise.sample_ids[2:])
    alone = flow_matching_add_noise(last[None], t[:1], third, backend=backend)
    assert torch.equal(x_t[2], alone[0])
    losses = flow_matching_loss(x_t, large, t, noise, reduction="sample", backend=backend)
    alone = flow_matching_loss(alone, last[None], t[:1], third, backend=backend)
    torch.testing.assert_close(losses[2], alone, rtol=1e-5, atol=0)
    first_id = noise._replace(sample_ids=noise.sample_ids[:1])
    one = flow_matching_add_noise(large.view(1, 48, side, side), t[:1], first_id, backend=backend).flatten()
    first = flow_matching_add_noise(large[:1], t[:1], first_id, backend=backend)
    assert torch.equal(one[: first.numel()], first.flatten())
    block = large[:2].numel() // 4 + 7
    blocks = torch.tensor([block], device=device)
    zero, (seed, low) = torch.zeros_like(blocks), (noise.seed, 0xFFFFFFFF)
    key = (seed & low, (seed >> 32) & low)
    words = philox.philox_4x32_10((blocks, zero, zero, zero + 1), key)
    u = words[0].float() * 2.0**-32 + 2.0**-33
    radius = torch.sqrt((philox.log(u) * -2.0).double()).float()
    eps = radius * philox.sincos_turns(words[1] >> 8)[1]
    x0 = large.view(-1)[4 * block].float()
    assert one[4 * block] == (0.5 * x0 + 0.5 * eps[0]).bfloat16()


# Not in Triton's interpreter, which truncates bf16.
@pytest.mark.parametrize(("backend", "device"), targets("flow_matching", skip=("triton",)))
def test_elements_are_independent_of_the_batch(backend, device):
    assert_elements_are_independent_of_the_batch(16, backend, device)


@pytest.mark.gpu
@ON_GPU
def test_more_than_2_31_elements(backend):
    """The third image, and the last third of the large one, begin at 2^31 elements."""
    assert_elements_are_independent_of_the_batch(8192, backend, "cuda")


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("layout", ["batch", "packed"])
def test_compiled_by_inductor(layout, backend):
    x0, t, noise, patch = case(layout, device="cuda")

    def f(pred, t, seed, ids):
        address = Philox(seed, ids, 4)
        x_t = flow_matching_add_noise(x0, t, address, patch=patch, backend=backend)
        return x_t, flow_matching_loss(pred * 2, x0, t, address, patch=patch, backend=backend)

    results = []
    for function in (f, torch.compile(f, fullgraph=True)):
        leaf = flow_matching_add_noise(x0, t, noise, patch=patch).requires_grad_()
        x_t, loss = function(leaf, t, noise.seed, noise.sample_ids)
        loss.backward()
        results.append((x_t, loss.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(*results, rtol=1e-6, atol=0)  # inductor divides by a number of elements in its own way


@pytest.mark.gpu
@needs_sanitizer
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool):
    """Flow matching and diffusion loss on small shapes, in every type, aligned and not."""
    files = [str(Path(__file__).with_name(f"test_{op}.py")) for op in ("flow_matching", "diffusion_loss", "philox")]
    chosen = "(test_same_bits_on_every_backend or test_memory_that_is_not_aligned or test_given_noise) and cuda-cuda"
    sanitize(tool, "-m", "pytest", "-q", *files, "-k", chosen)


# ---- what Triton made ----


def launches():
    from reca_kernels.flow_matching import triton as op

    noise = Philox(torch.tensor(5), torch.arange(2), 3)
    batch = [torch.empty(2, 16, 8, 8, dtype=torch.bfloat16)]
    packed = [torch.empty(1, 16, 2 * n, 8, dtype=torch.bfloat16) for n in (3, 5)]
    for batches, patch in ((batch, 1), (packed, 2)):
        out = torch.empty(2048, dtype=torch.bfloat16)
        op.add_noise(batches, torch.rand(2), noise, patch, out)
        op.losses(out, batches, noise, patch, torch.empty_like(out))


def test_compiled_for_every_gpu():
    made = cubin.compiled(launches)
    kernels = ("add_noise_kernel", "loss_kernel", "total_kernel")
    assert {(m.kernel, m.arch) for m in made} == {(kernel, arch) for kernel in kernels for arch in cubin.ARCHS}
    for m in made:
        if m.kernel == "total_kernel":
            m.assert_lean(registers=40)
            continue
        m.assert_lean(registers=64, stores=(128,))
        # x0, and pred: a patch's eight channels lie in eight planes
        wide = (m.constants["PATCH"] == 1) + (m.kernel == "loss_kernel")
        assert m.loads.get(128, 0) == wide and m.loads.get(16, 0) == (8 if m.constants["PATCH"] == 2 else 0), m
