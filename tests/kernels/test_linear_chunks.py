"""How masked_linear_cross_entropy cuts its products, and what they cost: counted, without a device."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from reca_kernels.masked_cross_entropy.options import CrossEntropyOptions
from reca_kernels.masked_linear_cross_entropy import linear_chunks
from reca_kernels.masked_linear_cross_entropy.kernels import LabelledRows
from reca_kernels.masked_linear_cross_entropy.plan import CPU, Machine, plan, waves

GIB = 1 << 30
H100, H200, H20, A100 = Machine(132, 80 * GIB), Machine(132, 141 * GIB), Machine(78, 96 * GIB), Machine(108, 40 * GIB)
SHOW_O = 13038, 58498, 2048  # labelled rows of 20 images, classes, width
HARMON = 3277, 151936, 1536
MANY = 60000, 151936, 2048


@pytest.mark.parametrize("gpu", [H100, H200, H20, A100])
@pytest.mark.parametrize("problem", [SHOW_O, HARMON, MANY])
@pytest.mark.parametrize("size", [2, 4])
def test_a_chunk_fits_and_all_rows_are_covered(gpu, problem, size):
    most, classes, width = problem
    cut = plan(most, classes, width, size, gpu)
    assert cut.rows * cut.pitch * size <= gpu.memory / 32
    assert (cut.chunks - 1) * cut.rows < most <= cut.chunks * cut.rows
    assert cut.pitch % 128 == 0 <= cut.pitch - classes < 128
    assert cut.body == (58496 if classes == 58498 else classes)


def test_one_chunk_where_there_is_room():
    for gpu in (H100, H200, H20):
        assert plan(*SHOW_O, 2, gpu)[:2] == (13038, 1) and plan(*HARMON, 2, gpu)[:2] == (3277, 1)
    assert plan(*SHOW_O, 2, A100).chunks == 2


@pytest.mark.parametrize("gpu", [H100, H200, H20, A100])
@pytest.mark.parametrize("most", [30000, 60000, 61111])
def test_chunks_are_whole_waves_of_tiles(gpu, most):
    """Nearly no multiprocessor waits for others in the product whose result is narrow, as it does in equal chunks."""
    _, classes, width = MANY
    cut = plan(most, classes, width, 2, gpu)
    heights = [cut.rows] * (cut.chunks - 1) + [most - (cut.chunks - 1) * cut.rows]
    tiles = sum(-(-n // 128) * -(-width // 256) for n in heights)
    busy = tiles / sum(waves(n, width, gpu.processors) for n in heights) / gpu.processors
    assert cut.chunks > 1 and busy > 0.93


def test_waves():
    assert waves(4224, 2048, 132) == 2 and waves(4225, 2048, 132) == 3
    assert waves(3260, 2048, 132) == 2  # 1.58, of which the last is paid whole: four chunks of equal size are 8 waves
    assert plan(*SHOW_O, 2, H100, chunk_rows=4096)[:2] == (3968, 4)
    assert 3 * waves(3968, 2048, 132) + waves(13038 - 3 * 3968, 2048, 132) == 7


def test_what_the_caller_says_and_small_problems():
    assert plan(10, 77, 8, 4, H100, chunk_rows=3)[:2] == (3, 4)
    assert plan(0, 77, 8, 4, H100)[:2] == (1, 0) and plan(0, 77, 8, 4, CPU)[:2] == (1, 0)
    assert plan(1305, 58498, 1024, 4, CPU) == (512, 3, 58624, 58498, 1024)
    assert plan(1305, 58498, 1024, 2, CPU).columns == 58498
    assert plan(5, 77, 8, 2, H100).body == 77  # no whole tile
    assert plan(5, 50257, 8, 2, H100).body == 50176 and plan(5, 128256, 8, 2, H100).body == 128256


class Products(TorchDispatchMode):
    """Counts what products compute and move: operands read, results written, and read where they are added to."""

    def __init__(self):
        super().__init__()
        self.count = self.flops = self.bytes = 0
        self.others = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm"):
            a, b = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            out = (kwargs or {}).get("out")
            self.count += 1
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
            added = name == "addmm" and (kwargs or {}).get("beta", 1) != 0
            self.bytes += sum(x.numel() * x.element_size() for x in (a, b, out) + (out,) * added)
            return out
        if not func.is_view and name not in ("empty", "detach"):
            self.others.append(name)
        return func(*args, **(kwargs or {}))


def counted(most, classes, width, gpu, monkeypatch, chunk_rows=None, bias=True):
    """The products of a call in bf16, and how often each kernel around them was launched."""
    launches = []
    number = SimpleNamespace(
        compact_labelled_rows=lambda labels, options, max_labelled: LabelledRows(
            torch.empty(most, dtype=torch.int64), labels, torch.empty(most), torch.empty(())
        ),
        gather_scatter_rows=lambda *_: launches.append("gather_scatter_rows"),
        row_gradients=lambda logits, *_: launches.append(("row_gradients", *logits.shape)),
        reduce=lambda losses, *_: (losses.sum(), None),
    )  # fmt: skip
    monkeypatch.setattr(linear_chunks, "machine", lambda device: gpu)
    options = CrossEntropyOptions(-100, 0.0, 0.0, None, "mean")
    bf16 = torch.bfloat16
    with FakeTensorMode(), Products() as products:
        x, weight = (torch.empty(n, width, dtype=bf16) for n in (most, classes))
        offset = torch.empty(classes, dtype=bf16) if bias else None
        labels = torch.empty(most, dtype=torch.int64)
        dtypes = (bf16, bf16, bf16 if bias else None)
        _, dx, dw, db = linear_chunks.forward(
            number, x, weight, labels, offset, None, options, chunk_rows, dtypes, most
        )
        assert dx.shape == x.shape and dw.shape == weight.shape and (not bias or db.shape == offset.shape)
    return products, launches


def test_show_o_in_one_chunk(monkeypatch):
    """Five products of whole tiles and what is left of three; each logit is read and written once besides."""
    products, launches = counted(*SHOW_O, H100, monkeypatch)
    most, classes, width = SHOW_O
    assert launches == ["gather_scatter_rows", ("row_gradients", most, classes), "gather_scatter_rows"]
    assert products.count == 7  # logits, d hidden and d weight in two parts each, d bias
    assert products.flops == 6 * most * classes * width + 2 * 8 * most * 58624
    logits, x, weight = 2 * most * classes, 2 * most * width, 2 * classes * width
    bare = 3 * (logits + x + weight)
    assert products.bytes < bare + logits * 1.01 + 5 * x  # d bias reads the logits, the parts read or add to x again
    # A copy of the bias, ones, zeros of dx and db, and no fp32 matrix of d weight: nothing of [V, D] is rounded.
    assert "add_" not in products.others and products.others.count("_to_copy") <= 1


def test_chunks_add_up_in_fp32(monkeypatch):
    one, _ = counted(*SHOW_O, H100, monkeypatch, bias=False)
    four, launches = counted(*SHOW_O, H100, monkeypatch, chunk_rows=4096, bias=False)
    assert [x for x in launches if x != "gather_scatter_rows"] == [
        ("row_gradients", n, 58498) for n in (3968, 3968, 3968, 1134)
    ]
    assert four.flops == one.flops and four.count == 4 * one.count
    matrix = 58498 * 2048
    # d weight: 4 bytes written 4 times and read 3 times where 2 were written; the weight read by 3 chunks more, twice.
    assert four.bytes - one.bytes == pytest.approx(matrix * (4 * 4 + 4 * 3 - 2 + 2 * 2 * 3), rel=0.01)
    assert four.others.count("_to_copy") == one.others.count("_to_copy") + 1  # d weight is rounded


def test_whole_tiles_need_no_products_apart(monkeypatch):
    products, _ = counted(*HARMON, H100, monkeypatch, bias=False)
    assert products.count == 3 and products.flops == 6 * 3277 * 151936 * 1536
