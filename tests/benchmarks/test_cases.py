"""What the benchmarks run: counted bytes and operations, who takes part, and why somebody does not."""

import enum
import sys
from dataclasses import fields
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from benchmarks import __main__, rows
from benchmarks import masked_linear_cross_entropy as _linear
from benchmarks.__main__ import OPS
from benchmarks.devices import Cpu, Cuda
from benchmarks.masked_cross_entropy import labels_for
from benchmarks.rivals import rival
from benchmarks.rows import BACKWARD, BOTH, FORWARD, Row
from benchmarks.runner import Provider
from reca_kernels import dispatch
from tests.benchmarks.fake_cuda import FakeCuda

GPU = Cuda(FakeCuda(), "cpu")  # its cases have the shapes of a GPU; nothing is allocated before inputs are asked for


def cases(op, device):
    return {(case.shape, case.dtype): case for case in __main__.cases(op, device, quick=False)}


def test_every_op_of_the_library_is_timed():
    assert set(dispatch.OPS) <= set(OPS)


@pytest.mark.parametrize("device", [Cpu(), GPU], ids=["cpu", "cuda"])
@pytest.mark.parametrize("op", OPS)
def test_every_case_is_whole(op, device):
    found = cases(op, device)
    assert len(found) == len(list(__main__.cases(op, device, quick=False)))  # no two of one name
    for case in found.values():
        assert case.bytes[case.whole] > 0 and case.numel > 0 and case.op == op
        ours = [name for name in case.providers if name.startswith("ours: ")]
        if op in dispatch.OPS:
            assert set(ours) >= {f"ours: {backend}" for backend in device.backends}
        if case.shape.startswith("size "):
            assert list(case.providers) == ours and ("ours: reference" in ours) == (op in dispatch.OPS)
        else:
            assert case.best in case.providers and "torch.compile" in case.providers


@pytest.mark.parametrize("device", [Cpu(), GPU], ids=["cpu", "cuda"])
@pytest.mark.parametrize("op", OPS)
def test_inputs_of_the_small_shapes_are_what_was_counted(op, device):
    """On the smallest shape every provider that can run gives the results of the formula."""
    from benchmarks.runner import _error, _results, _wide

    for case in cases(op, device).values():
        if not case.shape.startswith("size ") or case.numel > 2000:
            continue
        inputs = case.inputs(1)
        exact = _results(case, case.formula, _wide(inputs, case.leaves))
        assert case.op == "philox" or all(result.dtype == torch.float64 for result in exact)
        for provider in case.providers.values():
            if isinstance(provider, Provider):
                assert _error(_results(case, provider.run, inputs), exact) < (1e-5 if case.dtype == "float32" else 1e-2)


def test_counted_bytes():
    counted = {op: cases(op, Cpu()) for op in OPS}
    assert counted["philox"]["size 16", "float32"].bytes == {FORWARD: 64}
    # 5 of 8 rows carry a label: read those, write the gradient of all
    assert counted["masked_cross_entropy"]["size 8x64", "float32"].bytes == {BOTH: (5 + 8) * 64 * 4}
    assert counted["masked_cross_entropy"]["size 8x64", "bfloat16"].bytes == {BOTH: (5 + 8) * 64 * 2}
    # hidden 8 x 32, weight 64 x 32, bias 64: read, gradients written; three products of 5 x 64 x 32
    linear = counted["masked_linear_cross_entropy"]["size 8x32", "float32"]
    assert linear.bytes == {BOTH: 2 * (8 * 32 + 64 * 32 + 64) * 4} and linear.flops == {BOTH: 3 * 2 * 5 * 64 * 32}
    # x0 read twice, x_t written, the prediction read, its gradient written
    assert counted["flow_matching"]["size 1 image of 4x4", "float32"].bytes == {BOTH: 5 * 64 * 4}
    # 8 rows of 16 channels from 4 of x0: out and its gradient, x0 twice, x_t, t and rows
    rows_bytes = 2 * 8 * 32 * 4 + 2 * 4 * 16 * 4 + 8 * 16 * 4 + 8 * 16
    assert counted["diffusion_loss"]["size 8 rows", "float32"].bytes == {BOTH: rows_bytes}
    # 2 x (8 words + 8 visual) rows of 32 bytes read and written; the gradient of 16 rows read and written
    concat = counted["template_concat"]["size rows of 8", "float32"].bytes
    assert concat == {FORWARD: 2 * 32 * 32, BACKWARD: 2 * 16 * 32, BOTH: 2 * 32 * 32 + 2 * 16 * 32}


def test_floors_of_the_real_shapes():
    """Against the numbers that the designs of the kernels rest on."""
    linear = cases("masked_linear_cross_entropy", GPU)["show_o_512", "bfloat16"]
    assert linear.flops[BOTH] == pytest.approx(9.37e12, rel=0.01)
    logits = cases("masked_cross_entropy", GPU)["show_o_512", "bfloat16"]
    assert logits.bytes[BOTH] == pytest.approx(4.23e9, rel=0.01)
    concat = cases("template_concat", GPU)["show_o_512", "bfloat16"]
    assert concat.bytes[BACKWARD] == pytest.approx(94e6, rel=0.01)
    assert concat.bytes[FORWARD] == pytest.approx(2 * 142e6, rel=0.01)
    assert cases("flow_matching", GPU)["synthetic", "bfloat16"].numel == 1 << 28


def test_labels_are_as_many_for_every_seed():
    for seed in range(3):
        labels = labels_for(1000, 7, 0.637, torch.Generator().manual_seed(seed))
        assert int((labels != -100).sum()) == 637 and int(labels.max()) < 7


RIVALS = {
    "masked_cross_entropy": {"Liger", "quack", "apex", "flash-attn"},
    "masked_linear_cross_entropy": {"F.linear_cross_entropy", "Liger", "CCE", "CCE, exact", "quack"},
}


@pytest.mark.parametrize("op", RIVALS)
def test_a_library_that_is_not_here_is_a_row(op):
    for case in cases(op, GPU).values():
        if case.shape.startswith("size "):
            continue
        assert RIVALS[op] < set(case.providers)
        for name in RIVALS[op]:
            provider = case.providers[name]
            assert isinstance(provider, Provider) or provider.split(" ")[0] in ("not", "takes", "runs")


@pytest.fixture
def linear():
    """The case and inputs of a small output head, with a bias and without."""

    def make(bias):
        found = {case.shape: case for case in _linear.cases(GPU)}
        case = found["show_o_512_reca" if bias else "harmon_i2t"]
        sizes = dict(rows=8, hidden=16, vocabulary=24, generator=torch.Generator().manual_seed(0))
        labels = labels_for(sizes["rows"], sizes["vocabulary"], 0.5, sizes["generator"])
        hidden, weight = (torch.randn(n, sizes["hidden"], generator=sizes["generator"]) for n in (8, 24))
        x = SimpleNamespace(hidden=hidden.requires_grad_(), weight=weight.requires_grad_(), labels=labels)
        x.bias = torch.randn(24, generator=sizes["generator"]).requires_grad_() if bias else None
        return case, x, F.cross_entropy(F.linear(x.hidden, x.weight, x.bias), labels).item()

    return make


def cut_cross_entropy(names, with_bias):
    """The package as PyPI has it (names of two, no bias) or as its source has it."""

    def old(e, c, targets, ignore_index=-100, softcap=None, reduction="mean", shift=False, impl="cce"):
        assert impl in [name.lower() for name in names]
        return F.cross_entropy(F.linear(e, c), targets, ignore_index=ignore_index)

    def new(e, c, targets, bias=None, ignore_index=-100, impl="cce"):
        assert impl in [name.lower() for name in names]
        return F.cross_entropy(F.linear(e, c, bias), targets, ignore_index=ignore_index)

    module = ModuleType("cut_cross_entropy")
    module.linear_cross_entropy = new if with_bias else old
    module.LinearCrossEntropyImpl = enum.IntEnum("LinearCrossEntropyImpl", names)
    return module


def test_cce_as_pypi_has_it(monkeypatch, linear):
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", cut_cross_entropy(["CCE", "TORCH_COMPILE"], False))
    case, x, exact = linear(bias=False)
    assert case.providers["CCE"].run(x)[0].item() == pytest.approx(exact)
    assert case.providers["CCE, exact"].endswith("(cut-cross-entropy): no impl 'cce_exact'")
    case, _, _ = linear(bias=True)
    assert case.providers["CCE"].endswith("(cut-cross-entropy): it does not support a bias")


@pytest.mark.parametrize("bias", [True, False])
def test_cce_as_its_source_has_it(monkeypatch, linear, bias):
    names = ["CCE", "TORCH_COMPILE", "CCE_EXACT"]
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", cut_cross_entropy(names, True))
    case, x, exact = linear(bias)
    for name in ("CCE", "CCE, exact"):
        assert case.providers[name].run(x)[0].item() == pytest.approx(exact)


def test_ours_is_timed_with_the_number_of_labels_and_without(monkeypatch):
    """Two rows of each backend on the real shapes; the host waits in the second only."""
    given = []
    monkeypatch.setattr(_linear, "masked_linear_cross_entropy", lambda *a, **b: given.append(b))
    monkeypatch.setattr(dispatch, "unusable", lambda *a: None)
    for case in __main__.cases("masked_linear_cross_entropy", GPU, quick=False):
        ours = [name for name in case.providers if name.startswith("ours: ")]
        both = ["ours: cuda", "ours: triton"]
        if case.shape.startswith("size "):
            assert ours == [*both, "ours: reference"]
            continue
        assert ours == [*both, *(name + ", max_labelled not given" for name in both)]
        x = SimpleNamespace(hidden=0, weight=0, labels=0, bias=0)
        for name in ours:
            given.clear()
            case.providers[name].run(x)
            count = round(case.flops[BOTH] / 6 / _linear.SHAPES["cuda"][case.shape]["vocabulary"])
            count //= _linear.SHAPES["cuda"][case.shape]["hidden"]
            assert given == [
                {"backend": name[6:].split(",")[0], "max_labelled": None if "not given" in name else count}
            ]


def test_why_a_library_does_not_run(monkeypatch):
    def make(module):
        return module.loss

    assert rival("nobody", "nobody_kernels.ops", GPU, make) == "not installed (nobody)"
    here = ModuleType("somebody")
    monkeypatch.setitem(sys.modules, "somebody", here)
    assert rival("some-body", "somebody", Cpu(), make) == "runs on CUDA devices only (some-body)"
    assert rival("some-body", "somebody", GPU, make).startswith("unexpected interface (some-body): module")
    here.loss = max
    assert rival("some-body", "somebody", GPU, make, own_inputs=True) == Provider(max, own_inputs=True)


def test_a_library_that_lacks_another_says_which(monkeypatch, tmp_path):
    (tmp_path / "half_there.py").write_text("import cutlass_of_nobody\n")
    (tmp_path / "broken.py").write_text("raise OSError('libcudart.so.9: cannot open')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert rival("half", "half_there", GPU, max) == "not importable: half needs cutlass_of_nobody"
    assert rival("broken", "broken", GPU, max) == "not importable: broken: OSError: libcudart.so.9: cannot open"


def test_a_quick_run_writes_all_columns(tmp_path, capfd):
    __main__.main(["--device", "cpu", "--ops", "flow_matching", "--quick", "--out", str(tmp_path)])
    found = rows.read(tmp_path / "cpu.csv")
    columns = (tmp_path / "cpu.csv").read_text().splitlines()[0].split(",")
    assert {f.name for f in fields(Row)} == set(columns) and (columns[0], columns[-1]) == ("op", "command")
    assert (tmp_path / "cpu.png").stat().st_size > 1000
    assert [row.shape for row in found if row.op == "ceiling"] == ["copy", "matrix product", "matrix product"]
    timed = [row for row in found if row.op == "flow_matching" and row.mode == BOTH]
    assert {row.provider for row in timed} == {"ours: cpu", "ours: reference"} and len(timed) == 4
    for row in timed:
        assert row.command.startswith("python -m benchmarks --device cpu --ops flow_matching --quick")
        assert row.torch == torch.__version__ and row.threads == 1
        if row.ms_p50 != "":
            assert 0 < row.ms_p20 <= row.ms_p50 <= row.ms_p80 and row.percent_copy > 0 and row.relative_error < 1e-2
    assert "flow_matching size 1 image of 4x4 float32" in capfd.readouterr().out


def test_rows_of_other_ops_stay(tmp_path):
    rows.write(tmp_path / "cpu.csv", [Row("masked_cross_entropy", "s", "ours: cpu", BOTH, "float32", ms_p50=1.5)])
    __main__.main(["--ops", "philox", "--quick", "--out", str(tmp_path)])
    assert {row.op for row in rows.read(tmp_path / "cpu.csv")} == {"ceiling", "philox", "masked_cross_entropy"}


def test_cases_that_are_measured_are_left_out_when_a_run_is_resumed(tmp_path):
    """And what an op no longer has goes; what it has stays until it is measured again."""
    command = ["--ops", "philox", "--quick", "--resume", "--out", str(tmp_path)]
    gone = Row("philox", "of before", "ours: cpu", FORWARD, "float32", ms_p50=1.5)
    rows.write(tmp_path / "cpu.csv", [gone])
    __main__.main(command)
    first = [row for row in rows.read(tmp_path / "cpu.csv") if row.op == "philox"]
    assert {row.shape for row in first} == {"size 16"}
    for again, same in ((command, True), ([part for part in command if part != "--resume"], False)):
        __main__.main(again)
        assert ([row for row in rows.read(tmp_path / "cpu.csv") if row.op == "philox"] == first) == same


def test_a_case_whose_inputs_fail_does_not_end_the_others(tmp_path, monkeypatch, capfd):
    every = __main__.cases

    def first_fails(op, device, quick):
        for i, case in enumerate(every(op, device, quick)):
            if i == 0:
                case.inputs = lambda seed: torch.empty(1 << 60)
            yield case

    monkeypatch.setattr(__main__, "cases", first_fails)
    with pytest.raises(SystemExit, match="1 of 2 cases were not measured"):
        __main__.main(["--ops", "flow_matching", "--quick", "--out", str(tmp_path)])
    assert "float32  not measured: RuntimeError: " in capfd.readouterr().out
    assert {row.dtype for row in rows.read(tmp_path / "cpu.csv") if row.op == "flow_matching"} == {"bfloat16"}


def test_rows_survive_writing_and_reading(tmp_path):
    row = Row(
        "philox", "a, b", 'ours: "x"', FORWARD, "float32", "graph", 5, 0.125, 1e-05, 3.0, commit="1234567", note=""
    )
    rows.write(tmp_path / "x.csv", [row])
    assert rows.read(tmp_path / "x.csv") == [row]


def test_a_file_of_other_columns_is_refused(tmp_path):
    (tmp_path / "cpu.csv").write_text("op,shape\nphilox,x\n")
    with pytest.raises(ValueError, match="measure again"):
        rows.read(tmp_path / "cpu.csv")


@pytest.mark.parametrize("op", OPS)
def test_inputs_need_no_kernel(op, monkeypatch):
    """A kernel that fails is a note in its own row: it must not end the benchmark while inputs are made."""

    def fails(backend, name):
        raise RuntimeError(f"{name}: the kernel of {backend} fails")

    monkeypatch.setattr(dispatch, "load", fails)
    for case in __main__.cases(op, Cpu(), quick=True):
        case.inputs(0)
