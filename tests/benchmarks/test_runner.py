"""The protocol: who is timed when and on what, what a row says, and what happens to providers that cannot run."""

import itertools
import math
import subprocess
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import runner
from benchmarks.__main__ import OPS, main
from benchmarks.devices import Ceilings, Cpu, Cuda, ceilings
from benchmarks.rows import BACKWARD, BOTH, FORWARD
from benchmarks.runner import Case, Provider, measure
from tests.benchmarks.fake_cuda import FakeCuda

ABOUT = {
    **{"device": "NVIDIA Fake 80GB", "driver": "1", "threads": 1, "torch": "2", "triton": "3"},
    **{"commit": "abc", "date": "2026-01-01", "command": "python -m benchmarks"},
}
# One TB/s and one TFLOP/s: the numbers of bytes and operations are easy to read as times.
ROUND = Ceilings(1000.0, {"float32": 1.0})


def case(providers, bytes_, n=16, **options):
    def inputs(seed):
        generator = torch.Generator().manual_seed(seed)
        return SimpleNamespace(x=torch.randn(n, generator=generator).requires_grad_(), seed=seed)

    def formula(x):
        return (x.x.square().sum(),)

    return Case("op", "shape", "float32", n, inputs, ("x",), providers, "best", formula, bytes_, **options)


def provider(api, forward_ms, backward_ms, **options):
    """x² summed, with a backward pass; both move the fake clock."""

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            api.work(forward_ms)
            return x.square().sum()

        @staticmethod
        def backward(ctx, grad):
            api.work(backward_ms)
            return 2 * grad * ctx.saved_tensors[0]

    return Provider(lambda x: (Square.apply(x.x),), **options)


def test_a_definition_that_lacks_something_says_what():
    for table, missing in (({"cpu": {}}, "'sizes'"), ({"cuda": {}, "sizes": {}}, "'cpu'")):
        with pytest.raises(ValueError, match=f"cpu, cuda and sizes, each name -> sizes; {missing} is missing"):
            list(runner.shapes(table, Cpu()))
    double = Provider(lambda x: (x.x * 2,))
    for moved, listed in (({FORWARD: 1}, "'forward'"), ({}, "nothing")):
        with pytest.raises(ValueError, match=f"op shape: bytes must have 'forward\\+backward', .*; it has {listed}"):
            case({"ours: cpu": double}, moved)
    made = case({"ours: cpu": double}, {BOTH: 1})
    made.formula = double.run
    with pytest.raises(ValueError, match=r"the last result has shape \[16\], and inputs no `grad` of that shape"):
        measure(made, Cpu(), ROUND, ABOUT, rounds=1)


def test_rows_of_a_gpu_name_a_driver(monkeypatch):
    """A CPU's have none, by which rows of steps are distinguished."""
    monkeypatch.setenv("PATH", "")
    assert Cuda(FakeCuda(), "cpu").facts()["driver"] == "unknown" and Cpu().facts()["driver"] == ""


def test_no_gpu_is_a_clear_error(capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(SystemExit) as stopped:
        main(["--device", "cuda"])
    assert stopped.value.code == 2
    assert "--device cuda: torch" in (said := capsys.readouterr().err) and "use --device cpu" in said


def test_unknown_op_is_a_clear_error(capsys):
    with pytest.raises(SystemExit):
        main(["--ops", "attention_of_nobody"])
    assert f"unknown ops attention_of_nobody; expected some of {', '.join(OPS)}" in capsys.readouterr().err


def test_percentiles_are_those_of_numpy():
    values = list(np.random.default_rng(0).random(9))
    assert runner.percentiles(values) == pytest.approx(tuple(np.percentile(values, [20, 50, 80])))


def test_cuda_times_the_second_of_two_calls():
    api = FakeCuda()
    device, calls = Cuda(api, "cpu"), []

    def forward(x):
        calls.append(x)
        api.work(100.0 if len(calls) == 1 else 3.0)
        return ()

    assert device.time(forward, lambda x, r: api.work(4.0), iter("ab")) == (3.0, 4.0)
    assert calls == ["a", "b"]


def test_graphs_hold_enough_calls_and_are_divided_by_them():
    api, calls = FakeCuda(), []
    device = Cuda(api, "cpu")
    replay = device.captured(
        lambda x: (calls.append(x), api.work(0.25)), lambda x, r: api.work(0.5), ["a", "b", "c"], floor_ms=0.09
    )
    before = len(calls)
    assert replay(None, None, None) == pytest.approx((0.25, 0.5)) and len(calls) == before  # replayed, not called
    # After three warm-ups 0.3 ms / 0.09 ms + 1 calls, over all sets in turn.
    assert calls == [*"aaa", *"abca"]


def test_no_timing_holds_the_latency_of_a_launch():
    """The device has work while the host launches what is timed."""
    api = FakeCuda(latency=0.2)
    device = Cuda(api, "cpu")
    forward, backward = lambda x: api.work(0.5), lambda x, r: api.work(1.0)
    assert device.time(forward, backward, iter("ab")) == pytest.approx((0.5, 1.0))
    api.synchronize()
    replay = device.captured(forward, backward, ["a"], floor_ms=1.0)
    assert replay(None, None, None) == pytest.approx((0.5, 1.0))


def test_a_provider_that_waits_is_not_captured():
    api = FakeCuda()
    with pytest.raises(RuntimeError, match="synchronizing"):
        Cuda(api, "cpu").captured(lambda x: api.wait(), lambda x, r: None, ["a"], floor_ms=1.0)
    assert api.sync_mode == 0 and api.capturing is None


def test_peak_memory_is_above_what_lived_before():
    api = FakeCuda()
    api.allocate(5_000_000)

    def call():
        api.allocate(3_000_000)
        api.allocate(-3_000_000)

    assert Cuda(api, "cpu").peak_mb(call) == 3.0


def test_cpu_peak_memory_counts_what_is_alive_together():
    def call():
        a = torch.empty(250_000)
        b = torch.empty(500_000)
        del a, b
        return torch.empty(100_000)

    assert Cpu().peak_mb(call) == pytest.approx(3.0, abs=0.01)


def test_rows_of_a_small_case_on_a_gpu():
    """4 kB each way on 1 TB/s: 8 us, so it is replayed from graphs, too."""
    api = FakeCuda()
    made = case(
        {"ours: cuda": provider(api, 1.0, 3.0), "apex": "not installed (apex)"}, {BOTH: 8_000_000}, flops={BOTH: 10**9}
    )
    rows = measure(made, Cuda(api, "cpu"), Ceilings(1e6, {"float32": 100.0}), ABOUT, rounds=3)
    assert [(r.provider, r.timing, r.mode) for r in rows] == [
        *(("ours: cuda", timing, mode) for timing in ("events", "graph") for mode in (FORWARD, BACKWARD, BOTH)),
        ("apex", "", BOTH),
    ]
    for row in (rows[2], rows[5]):
        assert (row.ms_p20, row.ms_p50, row.ms_p80) == pytest.approx((4.0, 4.0, 4.0))
        assert (row.bytes, row.gb_per_s, row.percent_copy) == pytest.approx((8_000_000, 2.0, 0.0002))
        assert (row.flops, row.tflop_per_s, row.percent_gemm) == pytest.approx((10**9, 0.25, 0.25))
        assert row.relative_error < 1e-6 and row.peak_mb == 0.0 and row.device == "NVIDIA Fake 80GB"
    assert rows[0].ms_p50 == 1.0 and rows[0].gb_per_s == "" and rows[1].ms_p50 == 3.0
    assert rows[-1].note == "not installed (apex)" and rows[-1].ms_p50 == ""


def test_a_large_case_is_timed_with_events_only():
    api = FakeCuda()
    rows = measure(case({"ours: cuda": provider(api, 1, 1)}, {BOTH: 10**9}), Cuda(api, "cpu"), ROUND, ABOUT, rounds=2)
    assert {row.timing for row in rows} == {"events"}


def test_a_provider_that_waits_says_so_and_keeps_its_events():
    api = FakeCuda()

    def waiting(x):
        api.wait()
        api.work(1.0)
        return (x.x.square().sum(),)

    rows = measure(case({"eager": Provider(waiting)}, {BOTH: 8}), Cuda(api, "cpu"), ROUND, ABOUT, rounds=2)
    assert {row.timing for row in rows} == {"events"}
    assert rows[-1].note == "no graph: called a synchronizing CUDA operation"


def test_a_failing_provider_is_a_row_and_stops_nobody():
    def broken(x):
        raise torch.OutOfMemoryError("no memory\nsecond line")

    api = FakeCuda()
    rows = measure(
        case({"eager": Provider(broken), "ours: cuda": provider(api, 1, 1)}, {BOTH: 10**9}),
        Cuda(api, "cpu"),
        ROUND,
        ABOUT,
        rounds=2,
    )
    assert rows[0].note == "failed: OutOfMemoryError: no memory" and rows[0].ms_p50 == ""
    assert rows[-1].ms_p50 == 2.0


def test_a_provider_that_fails_while_it_is_timed_stops_nobody():
    """In the sixth round: three calls come before the first, and a round has two."""
    api, calls = FakeCuda(), []

    def fails(x):
        calls.append(x)
        if len(calls) == 15:
            raise RuntimeError("a kernel failed\nand more")
        return (x.x.square().sum(),)

    providers = {"CCE": Provider(fails), "ours: cuda": provider(api, 1.0, 3.0)}
    rows = measure(case(providers, {BOTH: 10**9}), Cuda(api, "cpu"), ROUND, ABOUT, rounds=9)
    assert rows[0].provider == "CCE" and rows[0].note == "failed: RuntimeError: a kernel failed"
    assert [row.provider for row in rows] == ["CCE", *["ours: cuda"] * 3] and rows[-1].ms_p50 == 4.0
    assert len(calls) == 15


def test_wrong_results_show_and_nan_never_passes():
    api = FakeCuda()

    def twice(x):
        api.work(1.0)
        return (2 * x.x.square().sum(),)

    def nan(x):
        api.work(1.0)
        return (x.x.square().sum() * math.nan,)

    providers = {"twice": Provider(twice), "nan": Provider(nan), "own noise": Provider(twice, exact=False)}
    rows = measure(case(providers, {BOTH: 10**9}), Cuda(api, "cpu"), ROUND, ABOUT, rounds=2)
    errors = {row.provider: row.relative_error for row in rows if row.mode == BOTH}
    assert errors["twice"] == 1.0 and math.isnan(errors["nan"]) and errors["own noise"] == ""


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("tried to allocate 90 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`\nsecond line"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
    ids=repr,
)
def test_a_formula_without_memory_costs_the_errors_only(error):
    def formula(x):
        raise error

    api = FakeCuda()
    made = case({"ours: cuda": provider(api, 1, 1)}, {BOTH: 10**9})
    made.formula = formula
    row = measure(made, Cuda(api, "cpu"), ROUND, ABOUT, rounds=2)[-1]
    assert (row.relative_error, row.ms_p50) == ("", 2.0)
    assert row.note == f"no error: fp64 formula: {(str(error) or 'MemoryError').splitlines()[0]}"


def test_another_error_of_the_formula_is_not_hidden():
    def formula(x):
        raise RuntimeError("shapes differ")

    made = case({"ours: cuda": provider(FakeCuda(), 1, 1)}, {BOTH: 10**9})
    made.formula = formula
    with pytest.raises(RuntimeError, match="shapes differ"):
        measure(made, Cuda(FakeCuda(), "cpu"), ROUND, ABOUT, rounds=2)


def test_results_of_another_shape_fail():
    with pytest.raises(ValueError, match=r"shape \[3\], expected \[4\]"):
        runner._error((torch.zeros(3),), (torch.zeros(4),))


def test_a_provider_that_spoils_its_inputs_gets_its_own():
    def spoiling(x):
        loss = x.x.square().sum()
        with torch.no_grad():
            x.x.zero_()
        return (loss,)

    api = FakeCuda()
    providers = {"Liger": Provider(spoiling, own_inputs=True, exact=False), "ours: cuda": provider(api, 1, 1)}
    rows = measure(case(providers, {BOTH: 10**9}), Cuda(api, "cpu"), ROUND, ABOUT, rounds=2)
    assert next(row for row in rows if row.provider == "ours: cuda" and row.mode == BOTH).relative_error < 1e-6


def test_inputs_are_twice_the_cache_and_take_turns():
    api, seen = FakeCuda(l2=1000), []

    def run(x):
        seen.append(x.seed)
        api.work(1.0)
        return (x.x.square().sum(),)

    made = case({"eager": Provider(run)}, {BOTH: 10**9}, n=50)  # 200 bytes each
    measure(made, Cuda(api, "cpu"), ROUND, ABOUT, rounds=10)
    assert seen[:3] == [0, 0, 0]  # error, and two calls for the memory
    timed = seen[3:]
    assert timed == list(itertools.islice(itertools.cycle(range(10)), 20))


def test_all_trials_stand_as_early_as_late_in_the_rounds():
    order = []
    trials = [
        runner._Trial(name, "clock", lambda name=name: (order.append(name), (1.0, 1.0))[1], 0.0, "") for name in "abcd"
    ]
    runner._take_turns(trials, 8, {})
    rounds = [order[i : i + 4] for i in range(0, 32, 4)]
    assert all(sorted(turn) == [*"abcd"] for turn in rounds)
    assert {name: sum(turn.index(name) for turn in rounds) for name in "abcd"} == dict.fromkeys("abcd", 12)


@pytest.mark.parametrize(("ms", "rounds"), [(1.0, 25), (600.0, 9), (6000.0, 5), (30_000.0, 3)])
def test_slow_cases_are_repeated_less(ms, rounds):
    trial = runner._Trial("a", "clock", lambda: (ms, 0.0), 0.0, "")
    runner._take_turns([trial], None, {})
    assert len(trial.times) == rounds


def test_a_floor_is_the_slower_of_traffic_and_arithmetic():
    assert ROUND.floor_ms(10**9, 0, "float32") == 1.0
    assert ROUND.floor_ms(10**9, 5 * 10**9, "float32") == 5.0


def test_ceilings_of_this_machine():
    found = ceilings(Cpu(), (torch.float32, torch.bfloat16), rounds=1, share=16)
    assert 0.1 < found.copy < 10_000 and found.gemm.keys() == {"float32", "bfloat16"}
    assert all(1e-5 < rate < 1000 for rate in found.gemm.values())


def test_ceilings_give_their_memory_back(monkeypatch):
    """What another process measures afterwards has all of the device."""
    device, made, left = Cpu(), [], []

    def recorded(make):
        def call(*arguments, **options):
            x = make(*arguments, **options)
            made.append(weakref.ref(x))
            return x

        return call

    for name in ("randn", "empty_like"):
        monkeypatch.setattr(torch, name, recorded(getattr(torch, name)))
    monkeypatch.setattr(device, "free", lambda: left.append(sum(x() is not None for x in made)))
    ceilings(device, (torch.float32,), rounds=1, share=64)
    assert len(made) == 4 and left[-1] == 0


def test_tables_name_the_fastest_of_ours_as_one():
    api = FakeCuda()
    providers = {
        "ours: cuda": provider(api, 1, 1),
        "ours: triton": provider(api, 2, 2),
        "eager": provider(api, 4, 4),
        "CCE": "not installed (cut-cross-entropy)",
    }
    shown = runner.show(
        measure(case(providers, {BOTH: 10**9}), Cuda(api, "cpu"), ROUND, ABOUT, rounds=2), "eager"
    ).splitlines()
    assert "1.00 x" in shown[1] and "2.00 x" in shown[2] and "4.00 x (best eager)" in shown[3]
    assert shown[4].endswith("not installed (cut-cross-entropy)")


@pytest.mark.gpu
def test_a_real_gpu_is_timed_with_events_and_graphs():
    api = torch.cuda
    device = Cuda()
    most = ceilings(device, (torch.float32,), rounds=1, share=16)
    x = torch.randn(1 << 20, device="cuda")

    def inputs(seed):
        return SimpleNamespace(x=x.clone().requires_grad_())

    def square(x):
        return (x.x.square().sum(),)

    made = Case(
        *("op", "shape", "float32", 1 << 20, inputs, ("x",)),
        {"eager": Provider(square), "waits": Provider(lambda x: (x.x.square().sum() * (x.x[0].item() ** 0),))},
        *("eager", square, {BOTH: 8 << 20}),
    )
    rows = {(row.provider, row.timing): row for row in measure(made, device, most, ABOUT, rounds=3) if row.mode == BOTH}
    assert rows.keys() == {("eager", "events"), ("eager", "graph"), ("waits", "events")}
    assert "no graph" in rows["waits", "events"].note
    assert all(0 < row.ms_p50 < 50 and row.relative_error < 1e-5 and row.peak_mb >= 4 for row in rows.values())
    assert api.get_device_name() in device.facts()["device"]


def test_the_commit_is_that_of_the_code(monkeypatch, tmp_path):
    """Of its own checkout; RECA_COMMIT where it was copied without one, also into another repository."""

    def git(*command):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *command], cwd=tmp_path, check=True)

    results = tmp_path / "copy" / "benchmarks" / "results"
    results.mkdir(parents=True)
    (results / "x.csv").write_text("")
    monkeypatch.setattr(runner, "RESULTS", results)
    monkeypatch.delenv("RECA_COMMIT", raising=False)
    assert runner._commit() == "unknown"
    monkeypatch.setenv("RECA_COMMIT", "1234567")
    assert runner._commit() == "1234567"
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "other")
    assert runner._commit() == "1234567"  # the repository around the copy is not its own
    (tmp_path / ".git").rename(tmp_path / "copy" / ".git")
    own = runner._commit()
    assert own not in ("1234567", "unknown") and len(own.rstrip("+")) >= 7
