"""Noise has one definition: known answers of the paper, the same bits on every backend, the right distribution."""

import pytest
import torch

from reca_kernels import Philox, native, philox_normal, philox_uniform
from reca_kernels.philox import reference
from tests.kernels import cubin
from tests.kernels.backends import INTERPRETED, targets

needs_native = pytest.mark.skipif(native.module is None, reason=f"no native module: {native.missing}")
ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # the known-answer vectors of Random123 (Salmon et al. 2011)
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter, key, words):
    as_tensors = lambda values: tuple(torch.tensor([v]) for v in values)  # noqa: E731
    got = reference.philox_4x32_10(as_tensors(counter), as_tensors(key))
    assert tuple(int(word) for word in got) == words


def test_known_answer_through_an_address():
    """Seed and ids land in key and counter as documented."""
    seed, sample, stream = -0x123456789, (5 << 32) | 77, 9
    bits = reference.philox_bits(torch.tensor(seed), torch.tensor([sample]), stream, 6)
    key = (seed & ONES, (seed >> 32) & ONES)
    counter = (1, 0, 77, 5 << 8 | 9)  # block 1 holds elements 4..7
    words = reference.philox_4x32_10(tuple(torch.tensor([c]) for c in counter), tuple(torch.tensor([k]) for k in key))
    assert bits[0, 4:].tolist() == [int(words[0]), int(words[1])]


def test_ids_from_2_56_on_have_noise_of_their_own():
    """Their upper 8 bits stand above the block; 0 there, as in all ids below, changes no bit."""
    ids = [7 | top << 56 for top in (0, 1, 128, 255)]
    signed = torch.tensor([i - (i >> 63 << 64) for i in ids])
    rows = reference.philox_bits(torch.tensor(5), signed, 3, 8)
    for top, row in zip((0, 1, 128, 255), rows, strict=True):
        counter = tuple(torch.tensor([c]) for c in (1, top << 24, 7, 3))
        words = reference.philox_4x32_10(counter, (torch.tensor([5]), torch.tensor([0])))
        assert row[4:].tolist() == [int(word) for word in words]


def address(device="cpu", **changes):
    ids = torch.tensor([(1 << 56) + 1, 3, (1 << 33) + 5, -1], device=device)
    return Philox(torch.tensor(-1234567890123, device=device), ids, 7)._replace(**changes)


def bits(x):
    """What torch.equal compares with: the sign of a zero counts."""
    return x.cpu().view(torch.int32)


@pytest.mark.parametrize("n", [1, 3, 64, 1030])  # less than a block, a broken one, whole ones, several CUDA blocks
@pytest.mark.parametrize(("backend", "device"), targets("philox", reference=False))
def test_same_bits_on_every_backend(n, backend, device):
    for draw in (philox_uniform, philox_normal):
        got = draw(address(device), n, backend=backend)
        assert got.device.type == device
        assert torch.equal(bits(got), bits(draw(address(), n, backend="reference")))


@pytest.mark.parametrize(("backend", "device"), targets("philox", reference=False))
def test_same_bits_at_the_ends_of_the_radius(backend, device):
    """Samples whose first or third word is nearly 2^32, where u rounds to 1 and the radius to 0, or nearly 0."""
    ends = torch.tensor([11837288, 54511834, 65899192, 21963192, 24677768, 29122095])
    exact = philox_normal(address(sample_ids=ends), 4, backend="reference")
    assert int((exact == 0).any(1).sum()) == 3 and float(exact.norm(dim=1).max()) > 6
    got = philox_normal(address(device, sample_ids=ends.to(device)), 4, backend=backend)
    assert torch.equal(bits(got), bits(exact))


@needs_native
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("n", [1, 3, 64, 4096, 10007])
def test_same_bits_in_cpp(n, isa):
    order = ["baseline", "avx2", "avx512"]
    if order.index(isa) > order.index(native.module.best_isa()):
        pytest.skip(f"this processor has no {isa}")
    before = native.module.current_isa()
    native.module.set_isa(isa)
    try:
        for draw in (philox_uniform, philox_normal):
            assert torch.equal(draw(address(), n, backend="cpu"), draw(address(), n, backend="reference"))
    finally:
        native.module.set_isa(before)


@needs_native
def test_same_bits_for_any_number_of_threads():
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        results.append(philox_normal(address(), 20001, backend="cpu"))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_a_sample_does_not_see_its_batch():
    alone = philox_normal(address(sample_ids=torch.tensor([3])), 100)
    assert torch.equal(philox_normal(address(), 100)[1:2], alone)
    assert torch.equal(philox_normal(address(), 40), philox_normal(address(), 100)[:, :40])


@pytest.mark.parametrize("change", [{"seed": torch.tensor(1)}, {"stream": 8}, {"sample_ids": torch.arange(4) + 50}])
def test_every_part_of_the_address_counts(change):
    a, b = philox_uniform(address(), 1000), philox_uniform(address(**change), 1000)
    assert (a == b).float().mean() < 0.01


def test_distribution():
    """Moments over 4 million numbers, and tails that a 24-bit radius could not reach."""
    x = philox_normal(address(sample_ids=torch.arange(4)), 1_000_000).double()
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3)):
        assert abs(float((x**power).mean()) - moment) < 0.01
    assert abs(float((x[0] * x[1]).mean())) < 0.005
    u = philox_uniform(address(), 1_000_000)
    assert float(u.min()) >= 0 and float(u.max()) < 1 and abs(float(u.mean()) - 0.5) < 0.001


def test_accuracy_of_the_polynomials():
    u = torch.cat((torch.rand(100_000, generator=torch.Generator().manual_seed(0)), torch.tensor([2.0**-33, 1.0])))
    u = u.clamp(min=2.0**-33)
    exact = u.double().log()
    assert float(((reference.log(u).double() - exact).abs() / exact.abs().clamp(min=1e-7)).max()) < 2.5e-7
    k = torch.randint(0, 1 << 24, (100_000,), generator=torch.Generator().manual_seed(1))
    for got, exact in zip(reference.sincos_turns(k), (torch.sin, torch.cos), strict=True):
        assert float((got.double() - exact(k.double() * 2.0**-24 * 2 * torch.pi)).abs().max()) < 2e-7


def test_bad_addresses_are_named():
    with pytest.raises(ValueError, match="sample_ids must be int64"):
        philox_normal(address(sample_ids=torch.arange(4).int()), 4)
    with pytest.raises(ValueError, match="stream must be in 0..255"):
        philox_normal(address(stream=256), 4)
    for seed in (7, torch.tensor([7]), torch.tensor(7, dtype=torch.int32)):
        with pytest.raises(ValueError, match=r"seed must be an int64 tensor \[\] on cpu, where sample_ids are"):
            philox_normal(address(seed=seed), 4)


@pytest.mark.parametrize(("backend", "device"), targets("philox"))
def test_no_samples_and_no_elements(backend, device):
    nobody = torch.empty(0, dtype=torch.int64, device=device)
    assert philox_normal(address(device, sample_ids=nobody), 5, backend=backend).shape == (0, 5)
    assert philox_normal(address(device), 0, backend=backend).shape == (4, 0)


@pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter is not there")
@pytest.mark.parametrize(("samples", "n"), [(1, 2**31 - 4), (1, 2**31 - 1), (2**11, 2**20), (3, 2**30 + 5)])
def test_the_first_of_so_many_that_32_bits_wrap(samples, n):
    """The first program alone, of numbers that would take 8 GB and more."""
    from reca_kernels.philox import triton as philox

    tasks, out = samples * ((n + 3) // 4), torch.zeros(4 * philox.BLOCK)
    compiled = {"DISTRIBUTION": philox.DISTRIBUTIONS["normal"], "EVEN": n % 4 == 0, "BLOCK": philox.BLOCK}
    philox.fill_kernel[1,](*address(), out, tasks, n, **compiled)
    assert torch.equal(bits(out[None]), bits(philox_normal(address(), len(out), backend="reference")[:1]))


def launches():
    from reca_kernels.philox import triton as philox

    philox.draw(address(), "normal", torch.empty(4, 4096))


def test_compiled_for_every_gpu():
    made = cubin.compiled(launches)
    assert [(m.kernel, m.arch) for m in made] == [("fill_kernel", arch) for arch in cubin.ARCHS]
    for m in made:
        m.assert_lean(registers=32, stores=(128,))


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_ten_million_normals_have_the_bits(backend):
    """The root in csrc/common/noise.cuh is rounded to nearest for every radius that comes up."""
    ids = torch.arange(10) + 1000
    got = philox_normal(address("cuda", sample_ids=ids.cuda()), 1_000_000, backend=backend)
    assert torch.equal(bits(got), bits(philox_normal(address(sample_ids=ids), 1_000_000)))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_more_than_2_31_elements(backend):
    n = 2**30 + 8
    x = philox_normal(address("cuda", sample_ids=torch.arange(3, device="cuda")), n, backend=backend)
    for sample in range(3):
        alone = philox_normal(address("cuda", sample_ids=torch.tensor([sample], device="cuda")), n, backend=backend)
        assert torch.equal(x[sample], alone[0])
