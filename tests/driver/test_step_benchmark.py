"""A whole step: both formulations are the same mathematics, and what is measured of them is reported as it was."""

import math
import os
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from benchmarks.devices import Ceilings
from benchmarks.step import __main__, release, report, worker
from benchmarks.step.counting import Counter
from benchmarks.step.parts import Parts
from benchmarks.step.recipes import IMAGES, MODELS, image_files, step_recipe
from benchmarks.step.rows import PARTS, StepRow, merged, read, write
from benchmarks.step.targets import verdicts
from benchmarks.step.worker import Worker
from reca import objective
from reca.data.loader import open_loader
from reca.estimate.meta_model import build_meta
from reca.models import umm_package
from reca.precision import autocast, cast
from reca.runs.published import published_files
from reca.training import compiled_blocks
from reca.training.lora import choose_trained


def gradients(model, folder, form, precision="fp64", **changed):
    """Loss and gradients of one step of the tiny model; `changed` are keys, their dots written as __."""
    changed = {key.replace("__", "."): value for key, value in changed.items()}
    changes = release.recipe_changes(model) if form == "release" else {}
    recipe = step_recipe(model, "tiny", folder, changed | {"train.precision": precision})
    checkpointed = recipe.train.activation_checkpointing
    recipe = step_recipe(model, "tiny", folder, changed | {"train.precision": precision} | changes)
    adapter = cast(umm_package(recipe.umm).Adapter.load(recipe.model), precision)
    choose_trained(adapter, recipe)
    adapter.train()
    if form == "release":
        release.formulate(adapter, checkpointed)
    reca, seed = recipe.objective.reca, recipe.train.seed
    loader = open_loader(
        recipe.data, "reca", adapter.views("reca"), seed=seed, micro_batch=reca.micro_batch, batch_size=reca.batch_size
    )
    stream = iter(loader)
    batches = {"reca": [next(stream) for _ in range(reca.batch_size // reca.micro_batch)]}
    context = autocast(precision, torch.device("cpu"))
    sums = objective.backward(adapter, batches, recipe.objective, seed, context)["reca"]
    return sums, {name: p.grad for name, p in adapter.named_parameters() if p.grad is not None}


# Noise and noisy inputs are fp32 in both forms, and rounded in another order.
@pytest.mark.parametrize(("precision", "recomputed", "tolerance"), [("fp64", False, 1e-6), ("fp32", True, 2e-5)])
@pytest.mark.parametrize("model", release.RELEASED)
def test_both_forms_are_the_same_mathematics(model, precision, recomputed, tolerance, tmp_path):
    given = dict(precision=precision, train__activation_checkpointing=recomputed)
    (ours, mine), (theirs, released) = (gradients(model, tmp_path, form, **given) for form in ("ours", "release"))
    assert ours[1] == theirs[1] and torch.allclose(ours, theirs, rtol=tolerance), (ours, theirs)
    assert mine and set(mine) <= set(released)
    largest = max(float(grad.norm()) for grad in mine.values())  # some are zero but for rounding, as of key biases
    for name, grad in mine.items():
        assert float((grad - released[name]).norm()) < tolerance * (float(grad.norm()) + 1e-3 * largest), name
    for name in set(released) - set(mine):  # what only the release carries along
        assert not released[name].any(), name


PUBLISHED = {
    "show_o": {"h_v": 576, "image": 1024},
    "harmon": {"h_v": 1088, "buffers": 64, "image": 1024},
    "open_uni": {"h_v": 256, "queries": 256, "image": 256},
    "bagel": {"h_v": 256, "image": 4096},
    "janus": {"h_v": 576, "image": 576},
    "janusflow": {"h_v": 576, "time": 1, "image": 576},
}


@pytest.mark.parametrize("model", MODELS)
def test_narrow_has_the_sequences_of_the_published_model(model, tmp_path):
    narrow, real = (step_recipe(model, size, tmp_path) for size in ("narrow", "real"))
    assert len(list(image_files(tmp_path).glob("*.jpg"))) == IMAGES
    assert (narrow.train.precision, real.train.precision) == ("fp32", "bf16")
    assert build_meta(narrow)[0].sequence() == PUBLISHED[model]
    for recipe in (narrow, real):  # nothing is to be downloaded, and one task is trained
        assert published_files(recipe) == {} and recipe.active_tasks() == ["reca"]


@pytest.mark.parametrize("model", MODELS)
def test_a_step_is_timed_by_part_and_makes_no_gpu_wait(model, tmp_path):
    worker = Worker(model, "tiny", "ours", "cpu", tmp_path, {})
    counted = worker.count()
    assert counted["host_waits"] == 0 and counted["images"] == 4
    assert 0 < counted["useful_flops"] == counted["flops"] and counted["operators"] > 100 and counted["bytes"] > 0
    step = worker.step()
    assert step["seconds"] == pytest.approx(sum(step["parts"].values()))
    absent = {name for name in PARTS if step["parts"][name] <= 0}
    assert not absent, absent
    assert worker.trainer.step == 2 + worker.trainer.freed.kept  # all were steps of the trainer


def test_the_released_form_is_a_step_too(tmp_path):
    worker = Worker("harmon", "tiny", "release_kept", "cpu", tmp_path, {})
    assert not worker.trainer.optimizer.defaults["fused"]
    assert worker.count()["host_waits"] > 0  # masks as indices
    assert {name for name, seconds in worker.step()["parts"].items() if seconds <= 0} == set()


def test_only_released_trainers_have_the_form():
    adapter = nn.Module()
    adapter.name = "janus"
    with pytest.raises(ValueError, match="no RECA trainer was released for janus; expected one of show_o"):
        release.formulate(adapter, False)


def test_parts_add_up_and_the_recomputed_is_backward():
    ticks = iter(range(100))
    parts = Parts(lambda: next(ticks), lambda a, b: b - a)
    loss = parts.timed_loss(lambda: [parts.timed(lambda: None, "blocks")() for _ in range(2)])
    with parts.step():
        parts.timed(loss, "backward")()  # recomputed blocks and all
        loss()
        parts.timed(lambda: None, "backward")()
        parts.timed(lambda: None, "encoders")()
    found = parts.seconds()
    assert sum(found.values()) == parts.marks[-1][1] - parts.marks[0][1]
    # prompt: up to the first block, and between the two; what follows the last of them is head and loss
    assert (found["blocks"], found["prompt"], found["head and loss"], found["backward"]) == (2, 2, 1, 2)
    assert found["optimizer"] == 2  # around what comes behind the last backward pass
    loss()  # outside of a step nothing is timed
    assert parts.seconds() == found


def test_operators_are_counted():
    x = torch.ones(4, 8, requires_grad=True)
    with Counter() as counter:
        with counter.waits() as waits:
            y = x @ torch.ones(8, 2)
            y.view(8)[torch.ones(8, dtype=torch.bool)]  # outside of objective.backward: not counted
        (y * 2).sum().backward()
    assert counter.flops == 2 * 2 * 4 * 8 * 2 and waits == []  # forward, and one gradient
    assert counter.launches >= 5 and counter.bytes > 0

    q = torch.ones(1, 2, 16, 8, requires_grad=True)
    with Counter() as counter:
        torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
    assert counter.flops == 14 * 2 * 16 * 16 * 8


class FakeWorker(Worker):
    """A worker on a GPU that is not there, which records its calls in `done`."""

    def __init__(self, form, recipe, trainer):
        self.cuda, self.form, self.trainer, self.done = True, form, trainer, []
        trainer.recipe, trainer.device, trainer.freed = recipe, torch.device("cuda"), SimpleNamespace(kept=False)
        self.parts, self.precision = Parts(lambda: 0.0, lambda a, b: b - a), "bfloat16"

    def _train_step(self):
        self.done.append("step")

    def _load(self):
        return {}


@pytest.mark.parametrize("form", ["ours", "release"])
def test_a_timed_step_multiplies_and_attends_as_a_run_does(form, tmp_path):
    """In TF32 what stays fp32 in a run of bf16, and not by cuDNN's attention, as Trainer.run has it."""
    found, recipe = [], step_recipe("show_o", "tiny", tmp_path, {"train.precision": "bf16"})

    def train_step(batches):
        found.append((torch.get_float32_matmul_precision(), torch.backends.cuda.cudnn_sdp_enabled()))

    made = FakeWorker(form, recipe, SimpleNamespace(train_step=train_step))
    made.batches = {}
    Worker._train_step(made)
    assert found == [("high", False)]
    assert (torch.get_float32_matmul_precision(), torch.backends.cuda.cudnn_sdp_enabled()) == ("highest", True)


@pytest.mark.parametrize("compiled", [True, False])
def test_launches_are_counted_of_what_has_been_compiled(compiled, monkeypatch, tmp_path):
    """The first step runs operator by operator under its counter, so the next one is the one that compiles."""
    recipe = step_recipe("show_o", "tiny", tmp_path, {"train.compile": compiled})
    adapter = SimpleNamespace(parameters=lambda: [])
    made = FakeWorker("release", recipe, SimpleNamespace(adapter=adapter))
    monkeypatch.setattr(worker, "_launches_and_waits", lambda step: made.done.append("counted") or (7, []))
    assert made.count()["operators"] == 7
    assert made.done == ["step"] * (1 + compiled) + ["counted"]


def test_what_is_timed_is_compiled_though_it_was_counted(monkeypatch, tmp_path):
    """Dynamo gives up functions for good that it meets under a mode such as the counter."""
    monkeypatch.setattr(compiled_blocks, "compile_blocks", partial(compiled_blocks.compile_blocks, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    recomputed = {"train.activation_checkpointing": True}
    made = worker.Worker("janus", "tiny", "ours", "cpu", tmp_path, {"train.compile": True} | recomputed)
    assert made.count()["operators"] > 100
    made.step()
    torch._dynamo.reset()
    assert counters["stats"]["unique_graphs"] > 3


def test_the_peak_on_a_gpu_is_that_of_the_step(monkeypatch, tmp_path):
    made = FakeWorker("ours", step_recipe("show_o", "tiny", tmp_path), SimpleNamespace(loaders={}))
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: made.done.append(name))
    monkeypatch.setattr(worker, "peak_memory", lambda device: made.done.append("read") or 1)
    assert made.step()["peak"] == 1
    assert made.done == ["synchronize", "reset_peak_memory_stats", "step", "synchronize", "read"]


def row(form, seconds, **options):
    numbers = dict(images=2, seconds_p20=seconds, seconds_p80=seconds, peak_gib=4.0, flops=8e12, useful_flops=6e12)
    numbers |= dict(gemm=1e12, copy=1e9, bytes=1e9, operators=9, host_waits=0, steps=3, trained=7, dtype="float32")
    numbers |= {name.replace(" ", "_"): seconds / len(PARTS) for name in PARTS} | options
    return StepRow("bagel", "narrow", form, seconds_p50=seconds, device="A CPU", threads=1, torch="2", **numbers)


def test_rows_are_read_as_written_and_replace_their_like(tmp_path):
    path = tmp_path / "step" / "cpu.csv"
    write(path, [row("ours", 8.0), StepRow("bagel", "narrow", "release", note="killed")])
    assert read(path)[0] == row("ours", 8.0) and not read(path)[1].measured
    write(path, merged(path, [row("release", 12.0, peak_gib=8.0)]))
    ours, released = read(path)
    assert (ours.images_per_s, ours.product_share, ours.mfu, ours.roofline_s) == (0.25, 1.0, 0.75, 9.0)
    assert [(v.measured, v.met) for v in verdicts(ours, released)] == [(1.0, True), (1.5, True), (0.5, True)]
    text = report.section(path.parent)
    assert "| bagel | release | **1.50** | 1.50 | 1.00 | 0.50 |" in text and "| bagel | narrow, cpu |" not in text
    assert "| harmon | narrow, cpu | 1.25 | 95 % |" in text and "| bagel | real, cuda | 2 | 55 % | 0.6 |" in text
    assert report.plot([ours, released], tmp_path / "plot.png").stat().st_size > 1000


def test_a_worker_finds_what_the_environment_names(monkeypatch, tmp_path):
    given = {}
    monkeypatch.setattr(__main__.subprocess, "Popen", lambda command, env, **_: given.update(env))
    monkeypatch.setenv("PYTHONPATH", "/packages")
    options = SimpleNamespace(size="tiny", device="cuda", changes={}, verbose=False)
    __main__.Process("ours", options, "bagel", tmp_path)
    assert given["PYTHONPATH"].split(os.pathsep) == [str(__main__.ROOT), str(__main__.ROOT / "python"), "/packages"]


@pytest.fixture
def started(monkeypatch):
    """Put processes that measure nothing in place of the real ones; the released form fails. Returns whose began."""
    forms = []

    class Fake:
        def __init__(self, form, options, model, folder):
            self.form, self.failed = form, ""
            forms.append(form)

        def ask(self, command):
            if self.form == "release":
                self.failed = "MemoryError: no room"
                return None
            counted = dict(images=2, flops=2e9, useful_flops=1e9, operators=5, bytes=7, host_waits=0, trained=3)
            if command == "count":
                return counted | {"dtype": "float32"}
            return {"seconds": 2.0, "wall": 3.0, "parts": dict.fromkeys(PARTS, 0.2), "peak": 2**30}

        def close(self):
            pass

    monkeypatch.setattr(__main__, "Process", Fake)
    monkeypatch.setattr(__main__, "ceilings", lambda *_, **__: Ceilings(10.0, {"float32": 0.1}))
    return forms


def test_a_form_that_fails_leaves_a_row_that_says_why(started, capsys, tmp_path):
    assert __main__.main(["--model", "bagel", "--out", str(tmp_path), "--rounds", "2"]) == 0
    ours, released = read(tmp_path / "cpu.csv")
    assert (ours.seconds_p50, ours.steps, ours.flops, ours.gemm) == (2.0, 2, 2e9, 1e11)
    assert released.note == "MemoryError: no room" and "not measured: MemoryError" in capsys.readouterr().out


def test_rates_are_measured_before_every_round_and_after_the_last(started, monkeypatch, tmp_path):
    found = iter([Ceilings(10.0, {"float32": 0.1}), Ceilings(20.0, {"float32": 0.4}), Ceilings(60.0, {"float32": 0.1})])
    monkeypatch.setattr(__main__, "ceilings", lambda *_, **__: next(found))
    __main__.main(["--model", "bagel", "--form", "ours", "--out", str(tmp_path), "--rounds", "2"])
    (row,) = read(tmp_path / "cpu.csv")
    assert (row.gemm, row.copy) == (2e11, 3e10) and next(found, None) is None
    assert row.product_share == 2e9 / 2.0 / 2e11


@pytest.mark.parametrize("there", [0, 1])
def test_rates_without_memory_cost_no_row(started, monkeypatch, capsys, tmp_path, there):
    found = iter([Ceilings(10.0, {"float32": 0.1})] * there)

    def ceilings(*_, **__):
        if (one := next(found, None)) is None:
            raise torch.OutOfMemoryError if there else RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")
        return one

    monkeypatch.setattr(__main__, "ceilings", ceilings)
    assert __main__.main(["--model", "bagel", "--form", "ours", "--out", str(tmp_path), "--rounds", "2"]) == 1
    (row,) = read(tmp_path / "cpu.csv")
    assert row.seconds_p50 == 2.0 and (row.gemm == 1e11 if there else math.isnan(row.gemm))
    assert row.note == f"not enough memory for {3 - there} of 3 measurements of rates"
    assert row.note in capsys.readouterr().out and row.note in report.section(tmp_path)


def test_resume_measures_what_the_file_lacks_of_this_commit(started, monkeypatch, tmp_path):
    def run(commit, *more):
        started.clear()
        monkeypatch.setattr(
            __main__, "facts", lambda device, threads, command: dict(commit=commit, driver="", threads=1)
        )
        __main__.main(["--model", "bagel", "--out", str(tmp_path), "--rounds", "1", "--apart", "--resume", *more])
        return list(started)

    assert run("abc", "--form", "ours") == ["ours"]
    assert run("abc", "--form", "release_kept", "release", "ours") == ["release_kept", "release"]
    rows = {row.form: row for row in read(tmp_path / "cpu.csv")}
    assert rows["release_kept"].useful_flops == rows["ours"].useful_flops == 1e9  # of the row that was there
    assert run("abc") == ["release"]  # which has failed
    assert run("abc", "--rounds", "2") == ["ours", "release"]
    assert run("abd") == ["ours", "release"] and run("abd+") == run("abd+") == ["ours", "release"]
