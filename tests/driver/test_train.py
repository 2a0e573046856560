"""The loop over a toy adapter: what a step is, what is saved, what happens when things break."""

import contextlib
import errno
import json
import os
import shutil
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp

from reca import checkpoint, distributed, exits, objective
from reca.checkpoint import CheckpointError
from reca.data.errors import DataError
from reca.data.loader import open_loader
from reca.models.base import LossTerm
from reca.models.common.inference import eval_mode
from reca.objective import backward
from reca.options.fields import RecipeError
from reca.runs.lineage import load_trained
from reca.runs.status import Status
from reca.trainer import NotSavedError, Trainer
from reca.training.skipped_steps import NonFiniteError
from tests.driver.toy import ToyAdapter


def weights(adapter):
    return {name: p.detach().clone() for name, p in adapter.named_parameters()}


def run(recipe, **kwargs):
    trainer = Trainer(recipe, ToyAdapter(**kwargs))
    trainer.run()
    return trainer


def losses(run_dir):
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_loss_falls_and_only_allowed_parameters_move(recipe):
    trainer = run(recipe("train.steps=40"))
    before, after = weights(ToyAdapter()), weights(trainer.adapter)
    for name, value in before.items():
        assert torch.equal(value, after[name]) == name.startswith("tower"), name
    curve = losses(trainer.run_dir)
    assert sum(curve[-5:]) < 0.9 * sum(curve[:5])


@pytest.mark.parametrize("micro_batch", [1, 3, 4, 5, 8, 100])
def test_accumulation_does_not_change_the_update(recipe, micro_batch, tmp_path):
    one = run(recipe(f"run_dir={tmp_path}/one"), dtype=torch.float64)
    other = run(recipe(f"run_dir={tmp_path}/other", f"objective.reca.micro_batch={micro_batch}"), dtype=torch.float64)
    assert sorted(one.adapter.seen) == sorted(other.adapter.seen)
    for name, value in weights(one.adapter).items():
        torch.testing.assert_close(weights(other.adapter)[name], value, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("mean", ["batch", "micro_batch"])
def test_gradient_and_loss_are_of_the_mean_that_is_asked_for(mean, recipe, images):
    """Two tasks: sum over tasks of lambda * (all sums / all weights), or of the micro-batches' own means."""
    r = recipe(
        f"objective.mean={mean}",
        "objective.t2i.weight=0.5",
        "objective.t2i.batch_size=4",
        "objective.t2i.micro_batch=1",
    )
    adapter = ToyAdapter(dtype=torch.float64)
    batches = {}
    for task, size, count in (("reca", 2, 4), ("t2i", 1, 4)):
        stream = iter(open_loader(r.data, task, adapter.views(task), seed=0, micro_batch=size))
        batches[task] = [next(stream) for _ in range(count)]
    autocast = torch.autocast("cpu", enabled=False)
    told = objective.means(backward(adapter, batches, r.objective, 0, autocast), batches)

    from reca.data.batch import task_rng

    expected = ToyAdapter(dtype=torch.float64)
    total = 0
    for task, weight in (("reca", 1.0), ("t2i", 0.5)):
        terms = [expected(b, task_rng(0, task)) for b in batches[task]]
        if mean == "batch":
            loss = sum(t.sum for t in terms) / sum(t.weight for t in terms)
        else:
            loss = sum(t.sum / t.weight for t in terms) / len(terms)
        assert told[f"{task}/loss"] == pytest.approx(float(loss), rel=1e-6)
        total = total + weight * loss
    total.backward()
    for (name, p), q in zip(adapter.named_parameters(), expected.parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("mean", ["batch", "micro_batch"])
@pytest.mark.parametrize("ranks", [1, 4, 8])
def test_a_task_without_labels_adds_nothing(mean, ranks, recipe, monkeypatch):
    """In fp32, whose largest number is less than four times the inverse of its smallest."""
    r = recipe(f"objective.mean={mean}", "objective.t2i={weight: 4, batch_size: 2, micro_batch: 2}")
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)
    adapter, found = ToyAdapter(), []
    prepare, loss = adapter.prepare, adapter.loss
    labelled = {"reca": 1.0, "t2i": 0.0}
    adapter.prepare = lambda batch, rng: replace(p := prepare(batch, rng), weight=p.weight * labelled[batch.task])
    adapter.loss = lambda p, *rest: LossTerm(*(x * labelled[p.task] for x in loss(p, *rest)[:2]))
    batches = {
        task: [next(iter(open_loader(r.data, task, adapter.views(task), seed=0, micro_batch=2)))] for task in labelled
    }
    for tasks in (["reca"], ["reca", "t2i"]):
        adapter.zero_grad()
        backward(adapter, {task: batches[task] for task in tasks}, r.objective, 0, contextlib.nullcontext())
        found.append([p.grad for p in adapter.layers.parameters()])
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*found, strict=True))


def test_a_kind_of_weight_zero_is_never_computed(recipe):
    trainer = Trainer(recipe(), ToyAdapter())
    trainer.adapter.views = lambda task: pytest.fail("t2i was touched") if task == "t2i" else None
    assert trainer.tasks == ["reca"]


def test_losses_are_read_before_the_optimizer_steps(recipe, monkeypatch):
    """The gradient's norm has been waited for then; behind the optimizer the host would wait for that, too."""
    done, means = [], objective.means
    monkeypatch.setattr(objective, "means", lambda *given: done.append("losses") or means(*given))
    trainer = Trainer(recipe("train.steps=2"), ToyAdapter())
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda: done.append("optimizer") or step()
    trainer.run()
    assert done == ["losses", "optimizer"] * 2


def test_what_ranks_tell_each_other_of_a_step_is_one_exchange(monkeypatch):
    exchanged = []
    monkeypatch.setattr(distributed, "sum_over_ranks", lambda table: exchanged.append(table) or 2 * table)
    sums = {"reca": torch.tensor([3.0, 4.0]), "reca/loss@a": torch.zeros(2), "reca/error": torch.tensor([1.0, 2.0])}
    assert objective.means(sums, ["reca"]) == {"reca/loss": 0.75, "reca/weight": 8.0, "reca/error": 0.5}
    assert [table.shape for table in exchanged] == [(3, 2)]
    empty = {"reca": torch.zeros(2), "reca/loss@a": torch.zeros(2)}  # of a step without a label
    assert objective.means(empty, ["reca"]) == {"reca/loss": 0, "reca/weight": 0}


def test_attention_makes_no_plans(recipe, monkeypatch):
    """In steps and where images are drawn between them: cuDNN would make one for every new shape."""
    enabled, found = torch.backends.cuda.cudnn_sdp_enabled, []
    trainer = Trainer(recipe("train.steps=1", "log.prompts=[x]", "log.sample_every=1"), ToyAdapter())
    step, generate = trainer.optimizer.step, trainer.adapter.generate
    trainer.optimizer.step = lambda: found.append(enabled()) or step()
    trainer.adapter.generate = lambda *a, **b: found.append(enabled()) or generate(*a, **b)
    trainer.run()
    assert found == [False, False] and enabled()
    with eval_mode(trainer.adapter):
        assert not enabled()
    assert enabled()


def test_resume_is_exact(recipe, tmp_path):
    whole = run(recipe(f"run_dir={tmp_path}/whole"))
    run(recipe(f"run_dir={tmp_path}/parts", "train.steps=3"))
    resumed = run(recipe(f"run_dir={tmp_path}/parts"))
    assert all(torch.equal(v, weights(resumed.adapter)[n]) for n, v in weights(whole.adapter).items())
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_sigterm_saves_and_the_run_goes_on_exactly(recipe, tmp_path):
    whole = run(recipe(f"run_dir={tmp_path}/whole"))
    trainer = Trainer(recipe(f"run_dir={tmp_path}/cut"), ToyAdapter())
    step = trainer.train_step

    def step_and_terminate(batches):
        if trainer.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(batches)

    trainer.train_step = step_and_terminate
    with pytest.raises(SystemExit) as stop:
        trainer.run()
    assert stop.value.code == exits.INTERRUPTED
    assert checkpoint.latest(tmp_path / "cut").name == "000003"
    resumed = run(recipe(f"run_dir={tmp_path}/cut"))
    assert all(torch.equal(v, weights(resumed.adapter)[n]) for n, v in weights(whole.adapter).items())


def test_non_finite_updates_are_skipped_then_fatal(recipe):
    trainer = Trainer(recipe("train.steps=20", "train.max_skips=2"), ToyAdapter())
    loss = trainer.adapter.loss

    def poisoned(batch, features, rng):
        term = loss(batch, features, rng)
        return term._replace(sum=term.sum * float("nan")) if trainer.step in (0, 1, 4, 5, 6) else term

    trainer.adapter.loss = poisoned
    with pytest.raises(NonFiniteError, match="3 steps in a row"):
        trainer.run()
    assert all(torch.isfinite(p).all() for p in trainer.adapter.parameters())
    dump = [json.loads(line) for line in (trainer.run_dir / "non_finite_0.jsonl").read_text().splitlines()]
    assert [d["step"] for d in dump] == [1, 2, 5, 6, 7] and len(dump[0]["sample_ids"]["reca"]) == 8


def test_disk_full_keeps_the_run_and_the_last_checkpoint(recipe, monkeypatch, caplog):
    trainer = Trainer(recipe("checkpoint.every=2"), ToyAdapter())
    real = dcp.save

    def full(*args, **kwargs):
        if "000002" not in str(kwargs["storage_writer"].path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(dcp, "save", full)
    with pytest.raises(NotSavedError, match="step 6 is done.*the newest one is of step 2"):
        trainer.run()
    status = Status.read(trainer.run_dir)
    assert (status.state, status.exit_code, status.step) == ("failed", exits.NOT_SAVED, 2)
    assert "NOT saved" in caplog.text and "No space left" in caplog.text
    assert checkpoint.latest(trainer.run_dir).name == "000002"
    assert not list((trainer.run_dir / "checkpoints").glob("*.partial"))


def test_too_little_space_is_seen_before_the_model_is_loaded(recipe, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(DataError, match=r"a checkpoint needs about 55\.12 KiB, but only 10 bytes are free"):
        Trainer(recipe(), ToyAdapter())


def test_too_little_space_is_seen_before_writing(recipe, monkeypatch):
    trainer = Trainer(recipe(), ToyAdapter())
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(NotSavedError, match="Once it can be written, the same command"):
        trainer.run()
    assert checkpoint.latest(trainer.run_dir) is None


def test_incomplete_checkpoints_are_not_used(recipe, tmp_path):
    trainer = run(recipe("checkpoint.every=3"))
    newest = checkpoint.latest(trainer.run_dir)
    (newest / "COMPLETE").unlink()
    assert checkpoint.latest(trainer.run_dir).name == "000003"
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        checkpoint.load(newest, trainer.adapter)


def test_a_checkpoint_of_other_parameters_is_refused(recipe):
    trainer = run(recipe())
    trainer.adapter.layers[0].weight.requires_grad_(False)
    with pytest.raises(CheckpointError, match="layers.0.weight"):
        checkpoint.load(checkpoint.latest(trainer.run_dir), trainer.adapter)


def test_keep_limits_checkpoints(recipe):
    trainer = run(recipe("checkpoint.every=1", "checkpoint.keep=2"))
    assert sorted(p.name for p in (trainer.run_dir / "checkpoints").iterdir()) == ["000005", "000006"]


def test_a_changed_recipe_is_refused_on_resume(recipe):
    run(recipe("train.steps=2"))
    with pytest.raises(RecipeError, match="lr 0.01 -> 0.5"):
        Trainer(recipe("optim.lr=0.5"), ToyAdapter())


def test_compiled_and_recomputed_blocks_are_both(recipe, tmp_path):
    """Either alone and both together make the same step, and compiled ones are compiled."""
    uneven = ("train.steps=2", "objective.reca.micro_batch=3")
    plain = run(recipe(f"run_dir={tmp_path}/plain", *uneven))
    for i, (compiled, recomputed) in enumerate([(True, False), (False, True), (True, True)]):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        keys = (f"train.compile={compiled}", f"train.activation_checkpointing={recomputed}")
        other = run(recipe(f"run_dir={tmp_path}/{i}", *uneven, *keys))
        assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0) == compiled, keys
        for name, value in weights(plain.adapter).items():
            torch.testing.assert_close(weights(other.adapter)[name], value, rtol=0, atol=1e-6, msg=name)


def test_kind_the_model_lacks(recipe):
    with pytest.raises(RecipeError, match="has no i2t loss"):
        Trainer(recipe("objective.i2t.weight=1"), ToyAdapter())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (lambda term: term.sum / term.weight, r"Tensor\[\]"),
        (lambda term: (term.sum, term.weight), r"tuple\(Tensor\[\], Tensor\[\]\)"),
        (lambda term: term._replace(weight=8.0), r"LossTerm\(Tensor\[\], float, NoneType\)"),
        (lambda term: term._replace(sum=term.sum.expand(2)), r"LossTerm\(Tensor\[2\], Tensor\[\], NoneType\)"),
    ],
)
def test_a_loss_that_is_no_loss_term(changed, said, recipe):
    class Other(ToyAdapter):
        def loss(self, *given):
            return changed(super().loss(*given))

    trainer = Trainer(recipe(), Other())
    with pytest.raises(TypeError, match=rf"Other.loss returned {said}: expected a LossTerm of two scalar tensors"):
        trainer.run()


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -1.0])
def test_a_weight_that_divides_no_loss(weight, recipe):
    """A step with such a weight would train nothing, without a word."""

    class Other(ToyAdapter):
        def prepare(self, *given):
            return replace(super().prepare(*given), weight=weight)

    with pytest.raises(ValueError, match=rf"Other.prepare gave a reca batch the weight {weight}: expected the divisor"):
        Trainer(recipe(), Other()).run()


def test_unknown_role(recipe):
    with pytest.raises(ValueError, match="'everything', which is not a role"):
        Trainer(recipe("train.roles=[everything]"), ToyAdapter())


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_sample_grids_and_gap(recipe, micro_batch):
    every = "log.prompts=[a,b]", "log.sample_every=3", "log.gap_every=2", "log.drift_every=2"
    trainer = run(recipe(*every, f"objective.reca.micro_batch={micro_batch}"))
    assert (trainer.run_dir / "samples" / "000003.png").exists()
    lines = [json.loads(line) for line in (trainer.run_dir / "log.jsonl").read_text().splitlines()]
    assert sum("reca/gap" in line for line in lines) == 3
    assert lines[-1]["reca/gap"] > 0  # h_v of its own image helps
    assert sum("t2i/drift" in line for line in lines) == 4


def test_dropout_is_on_in_steps_and_off_in_measurements(recipe):
    """Also in the steps behind a measurement."""
    trainer, modes = Trainer(recipe("log.gap_every=1", "log.drift_every=2"), ToyAdapter()), []
    trainer.adapter.register_forward_pre_hook(
        lambda module, _: modes.append((torch.is_grad_enabled(), module.training))
    )
    trainer.run()
    assert set(modes) == {(True, True), (False, False)} and modes[-1] == (False, False)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_passes_compute_in_the_precision_of_the_run(precision, recipe):
    """In steps and in measurements."""
    keys = "train.steps=2", "log.gap_every=1", f"train.precision={precision}"
    trainer, seen = Trainer(recipe(*keys), ToyAdapter()), set()
    trainer.adapter.layers[0].register_forward_hook(
        lambda layer, _, out: seen.add((torch.is_grad_enabled(), str(out.dtype)))
    )
    trainer.run()
    assert seen == {(grad, "torch.bfloat16" if precision == "bf16" else "torch.float32") for grad in (True, False)}


def test_the_loss_in_the_log_is_the_weighted_sum(recipe):
    trainer = run(recipe("objective.reca.weight=0.5", "objective.t2i.weight=3", "train.steps=2"))
    for line in map(json.loads, (trainer.run_dir / "log.jsonl").read_text().splitlines()):
        assert line["loss"] == pytest.approx(0.5 * line["reca/loss"] + 3 * line["t2i/loss"])


def test_condition_other_swaps_h_v(recipe):
    trainer = Trainer(recipe(), ToyAdapter())
    batch = next(iter(trainer.loaders["reca"]))
    from reca.data.batch import task_rng

    own, other = (trainer.adapter(batch, task_rng(0, "reca"), c).sum for c in ("own", "other"))
    assert own != other


def test_condition_other_is_of_reca_alone(recipe):
    """An answer is about its own image in that ablation, too."""
    trainer, seen = Trainer(recipe("objective.condition=other", "objective.t2i.weight=1"), ToyAdapter()), set()
    forward = trainer.adapter.forward

    def watched(batch, rng, condition):
        seen.add((batch.task, condition))
        return forward(batch, rng, condition)

    trainer.adapter.forward = watched
    trainer.run()
    assert seen == {("reca", "other"), ("t2i", "own")}


def test_load_trained_is_the_model_of_the_run(recipe, monkeypatch):
    trainer = run(recipe())
    monkeypatch.setattr(
        "reca.runs.lineage.umm_package",
        lambda _: SimpleNamespace(Adapter=SimpleNamespace(load=lambda *_: ToyAdapter())),
    )
    loaded = load_trained(trainer.run_dir, trainer.recipe)
    assert all(torch.equal(v, weights(loaded)[n]) for n, v in weights(trainer.adapter).items())
    assert loaded.inherited == {n for n, p in trainer.adapter.named_parameters() if p.requires_grad}


def test_a_run_starts_from_what_another_has_trained(recipe, tmp_path, monkeypatch):
    """SFT, then RECA of one layer only: the other layer keeps what SFT made of it, also when the result is loaded."""
    sft = run(recipe(f"run_dir={tmp_path}/sft", "objective.reca.weight=0", "objective.t2i.weight=1"))
    overrides = [f"run_dir={tmp_path}/reca", f"train.init_from={tmp_path}/sft", "train.frozen=['layers.1.*']"]
    reca = run(recipe(*overrides))
    for name, value in weights(reca.adapter).items():
        kept = name.startswith(("tower", "layers.1"))
        assert torch.equal(value, weights(sft.adapter)[name]) == kept, name
    monkeypatch.setattr(
        "reca.runs.lineage.umm_package",
        lambda _: SimpleNamespace(Adapter=SimpleNamespace(load=lambda *_: ToyAdapter())),
    )
    loaded = load_trained(reca.run_dir, reca.recipe)
    assert all(torch.equal(v, weights(loaded)[n]) for n, v in weights(reca.adapter).items())


def test_what_a_run_cannot_start_from(recipe, tmp_path):
    with pytest.raises(RecipeError, match="is not a run folder"):
        Trainer(recipe(f"train.init_from={tmp_path}/nothing"), ToyAdapter())
    run(recipe(f"run_dir={tmp_path}/first"))
    other = recipe(f"run_dir={tmp_path}/second", f"train.init_from={tmp_path}/first", "model.weights=showlab/show-o")
    with pytest.raises(RecipeError, match="weights None -> 'showlab/show-o'"):
        Trainer(other, ToyAdapter())
    again = recipe(f"run_dir={tmp_path}/second", f"train.init_from={tmp_path}/first")
    narrow = ToyAdapter()
    narrow.layers[0] = torch.nn.Linear(48, 47)
    with pytest.raises(CheckpointError, match="2 of its parameters"):
        Trainer(again, narrow)


def test_the_schedule_reaches_the_optimizer(recipe):
    """AdamW's first step is as long as the learning rate."""
    trainer, start = run(recipe("train.steps=1", "optim.lr=0.01", "optim.warmup_steps=20")), weights(ToyAdapter())
    moved = max(float((value - start[name]).abs().max()) for name, value in weights(trainer.adapter).items())
    assert moved == pytest.approx(0.01 / 20, rel=1e-3)


def test_cached_features_change_nothing(recipe, tmp_path, monkeypatch):
    plain = run(recipe(f"run_dir={tmp_path}/plain", "train.steps=9"))
    cache = f"data.cache={tmp_path}/features"
    first = run(recipe(f"run_dir={tmp_path}/first", "train.steps=9", cache))
    monkeypatch.setattr("reca.data.transforms.open_rgb", None)  # bytes are read, to find the features, and not decoded
    second = run(recipe(f"run_dir={tmp_path}/second", "train.steps=9", cache))
    for name, value in weights(plain.adapter).items():
        assert torch.equal(weights(first.adapter)[name], value) and torch.equal(weights(second.adapter)[name], value)


@pytest.mark.parametrize(("start", "recorded"), [(0, [3, 4]), (2, [3, 4]), (3, [4]), (4, None)])
def test_the_profile_is_of_the_updates_it_names(recipe, start, recorded):
    """Numbered as in log.jsonl, also where a run goes on."""
    if start:
        run(recipe(f"train.steps={start}"))
    trainer = Trainer(recipe("log.profile=3:4"), ToyAdapter())
    step = trainer.train_step

    def named(batches):
        with torch.profiler.record_function(f"step {trainer.step + 1}"):
            return step(batches)

    trainer.train_step = named
    trainer.run()
    trace = trainer.run_dir / "trace_rank0.json"
    if recorded is None:
        assert not trace.exists()
    else:
        names = {event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]}
        assert sorted(name for name in names if name.startswith("step ")) == [f"step {n}" for n in recorded]


def test_a_profile_holds_nothing_from_before_and_after_the_steps(recipe, monkeypatch):
    def named(self, *_):
        with torch.profiler.record_function("beside the steps"):
            return None

    for name in ("before_training", "after_training"):
        monkeypatch.setattr(f"reca.monitoring.reporting.RunReport.{name}", named)
    trainer = run(recipe("log.profile=1:9", "train.steps=2"))
    assert "beside the steps" not in (trainer.run_dir / "trace_rank0.json").read_text()
