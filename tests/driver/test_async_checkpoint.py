"""Checkpoints that are written while training continues, and which of them stay."""

import contextlib
import gc
import os
import re
import shutil
import signal
import sys
import threading
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from reca import checkpoint, exits
from reca.checkpoint import background, contents, writing
from reca.checkpoint.retention import Keep
from reca.config.recipe import OptimConfig, Recipe
from reca.hardware import cgroups, host_memory
from reca.optim import make_optimizer
from reca.options.fields import RecipeError
from reca.runs.status import Status
from reca.trainer import NotSavedError, Trainer
from tests.driver.forks import in_new_process
from tests.driver.toy import ToyAdapter, run_toy, weights


class Gate:
    """Holds checkpoints up in the middle of being written, until it is opened."""

    def __init__(self, monkeypatch):
        self.opened, self.reached = threading.Event(), threading.Event()
        original = writing._write_state

        def held(*arguments):
            self.reached.set()
            assert self.opened.wait(60)
            original(*arguments)

        monkeypatch.setattr(writing, "_write_state", held)


@pytest.fixture
def gate(monkeypatch):
    gate = Gate(monkeypatch)
    yield gate
    gate.opened.set()


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def states(folder: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's parameters and moments, read into a new model."""
    adapter = ToyAdapter()
    adapter.tower.requires_grad_(False)
    optimizer = make_optimizer(adapter, OptimConfig())
    checkpoint.load(folder, adapter, optimizer)
    moments = contents.tensors(contents.get_optimizer_state_dict(adapter, optimizer, options=contents.FLAT))
    return weights(adapter) | moments


def test_steps_go_on_while_a_checkpoint_is_written(recipe, gate, tmp_path):
    """It holds the step that it is named after, bit by bit what a run holds that waits for its checkpoints."""
    seen = {}

    def progress(step: int) -> None:
        seen[step] = (names(trainer.run_dir), Status.read(trainer.run_dir).step)
        if step == 4:
            assert gate.reached.wait(60)
            assert [thread.name for thread in threading.enumerate()].count("checkpoint") == 1
            gate.opened.set()

    keys = ("checkpoint.every=2", "checkpoint.keep=0", "train.steps=5")
    trainer = Trainer(recipe(f"run_dir={tmp_path}/beside", *keys), ToyAdapter(), progress)
    trainer.run()
    assert [seen[step] for step in (3, 4)] == [(["000002.partial"], 0)] * 2
    waits = run_toy(recipe(f"run_dir={tmp_path}/waits", *keys, "checkpoint.async_save=false"))
    assert names(trainer.run_dir) == names(waits.run_dir) == ["000002", "000004", "000005"]
    for name in names(waits.run_dir):
        ours, theirs = (states(run / "checkpoints" / name) for run in (trainer.run_dir, waits.run_dir))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert not torch.equal(states(trainer.run_dir / "checkpoints/000002")["layers.0.weight"], ours["layers.0.weight"])
    assert Status.read(trainer.run_dir).checkpoint == "checkpoints/000005"


def test_the_status_names_a_checkpoint_when_it_is_complete(recipe):
    found = []

    def progress(step: int) -> None:
        found.append(Status.read(trainer.run_dir).step)
        if trainer.writer.thread is not None:
            trainer.writer.thread.join()

    trainer = Trainer(recipe("checkpoint.every=2", "train.steps=5"), ToyAdapter(), progress)
    trainer.run()
    assert found == [0, 0, 0, 2, 2]


def test_a_checkpoint_waits_for_the_one_before(recipe, monkeypatch, caplog):
    monkeypatch.setattr(background, "LONG_WAIT", -1.0)
    alive, write = [], background.write

    def counted(*arguments):
        alive.append(sum(thread.name == "checkpoint" for thread in threading.enumerate()))
        return write(*arguments)

    monkeypatch.setattr(background, "write", counted)
    run_toy(recipe("checkpoint.every=1", "train.steps=4"))
    assert alive == [1, 1, 1]
    assert "training waited 0 s for the checkpoint before that of step 2" in caplog.text


def test_the_newest_complete_checkpoint_is_returned_at_the_start_of_the_next(recipe, monkeypatch, caplog):
    trainer = Trainer(recipe(), ToyAdapter())
    writer = background.BackgroundWriter(trainer.run_dir, Keep(0), lambda: False)
    monkeypatch.setattr(background, "LONG_WAIT", 60.0)

    def start(step):
        written = writer.start(checkpoint.snapshot({"step": step}, trainer.adapter, trainer.optimizer))
        return written and written.name

    assert (start(1), start(2), start(3)) == (None, "000001", "000002") and "training waited" not in caplog.text
    writer.fits = False
    assert (start(4), start(5)) == ("000004", "000005")
    writer.fits = True
    assert start(6) is None
    writer.fits = False
    monkeypatch.setattr(background, "write", lambda *_: None)
    assert (start(7), start(8)) == ("000006", None)


def test_a_partial_checkpoint_is_written_anew(recipe):
    """That a failed write could not remove."""
    trainer = Trainer(recipe(), ToyAdapter())
    left = trainer.run_dir / "checkpoints/000004.partial/weights/of_another_size.safetensors"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"cut")
    taken = checkpoint.snapshot({"step": 4}, trainer.adapter, trainer.optimizer)
    written = checkpoint.write(trainer.run_dir, taken, Keep(1))
    assert names(trainer.run_dir) == ["000004"] and not checkpoint.find_damage(written)
    assert left.name not in {path.name for path in written.rglob("*")}


def test_what_cannot_be_written_is_said_and_training_goes_on(recipe, monkeypatch, caplog):
    """Of whatever kind the error is."""
    for error in (OSError(28, "No space left on device"), RuntimeError("of a library"), TypeError("of our own")):
        publish = writing._publish

        def broken(partial, *more, error=error, publish=publish):
            if partial.name.startswith("000002"):
                raise error
            publish(partial, *more)

        with monkeypatch.context() as patch:
            patch.setattr(writing, "_publish", broken)
            trainer = run_toy(recipe(f"run_dir={recipe().run_dir}/{type(error).__name__}", "checkpoint.every=2"))
        assert names(trainer.run_dir) == ["000004", "000006"]
        assert f"checkpoint at step 2 NOT saved: {error}" in caplog.text
        assert ("Traceback" in caplog.text) == isinstance(error, TypeError)
        assert ("free space in" in caplog.text) == isinstance(error, OSError)
        caplog.clear()


@pytest.mark.parametrize("gone", ["moved", "removed"])
@pytest.mark.parametrize("moment", ["_make_room", "_write", "_write_state", "_checksums", "_publish"])
def test_a_checkpoint_does_not_create_the_folder_of_its_run_again(recipe, moment, gone, monkeypatch, caplog):
    """A folder at the old path would contain a part of the checkpoint, and the next start would begin in it."""
    trainer = Trainer(recipe("ema.half_life=2"), ToyAdapter())
    taken = checkpoint.snapshot({"step": 4}, trainer.adapter, trainer.optimizer, trainer.ema.averages)
    original = getattr(writing, moment)

    def after(*arguments):
        monkeypatch.setattr(writing, moment, original)
        if gone == "removed":
            shutil.rmtree(trainer.run_dir)
        else:
            trainer.run_dir.rename(trainer.run_dir.with_name("elsewhere"))
        return original(*arguments)

    monkeypatch.setattr(writing, moment, after)
    assert checkpoint.write(trainer.run_dir, taken, Keep(1)) is None
    assert f"{trainer.run_dir} was moved or removed" in caplog.text and "free space" not in caplog.text
    assert not trainer.run_dir.exists()


def test_a_signal_waits_for_the_checkpoint_in_flight(recipe, gate):
    def progress(step: int) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Timer(0.1, gate.opened.set).start()

    trainer = Trainer(recipe("checkpoint.every=2"), ToyAdapter(), progress)
    with pytest.raises(SystemExit) as stop:
        trainer.run()
    assert stop.value.code == exits.INTERRUPTED and names(trainer.run_dir) == ["000002", "000003"]
    assert Status.read(trainer.run_dir).step == 3


def test_a_run_that_fails_keeps_the_checkpoint_in_flight(recipe, gate):
    """The status names it, and nothing is being written any more when the folder is let go."""

    def progress(step: int) -> None:
        if step == 3:
            threading.Timer(0.1, gate.opened.set).start()
            raise ZeroDivisionError

    trainer = Trainer(recipe("checkpoint.every=2"), ToyAdapter(), progress)
    with pytest.raises(ZeroDivisionError):
        trainer.run()
    status = Status.read(trainer.run_dir)
    assert (status.state, status.step, names(trainer.run_dir)) == ("failed", 2, ["000002"])


def test_the_last_checkpoint_counts(recipe, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "_publish", full)
    with pytest.raises(NotSavedError):
        run_toy(recipe("checkpoint.every=2"))


def die_while_writing(recipe: Recipe) -> None:
    """Train up to step 5, and end by SIGKILL while the checkpoint of step 4 is being written."""
    checksums = writing._checksums
    reached = threading.Event()

    def stuck(partial):
        if partial.name.startswith("000004"):
            reached.set()
            threading.Event().wait()
        return checksums(partial)

    def progress(step: int) -> None:
        if step == 5 and reached.wait(60):
            os.kill(os.getpid(), signal.SIGKILL)

    writing._checksums = stuck
    try:
        Trainer(recipe, ToyAdapter(), progress).run()
    finally:
        os._exit(1)


def test_a_run_killed_while_it_writes_goes_on_from_the_checkpoint_before(recipe, tmp_path):
    whole = run_toy(recipe(f"run_dir={tmp_path}/whole", "checkpoint.every=2"))
    cut = recipe(f"run_dir={tmp_path}/cut", "checkpoint.every=2")
    assert in_new_process(die_while_writing, cut) == -signal.SIGKILL
    assert names(tmp_path / "cut") == ["000002", "000004.partial"]
    again = Trainer(cut, ToyAdapter())
    assert again.step == 2 and names(tmp_path / "cut") == ["000002"]
    again.run()
    assert all(torch.equal(value, weights(again.adapter)[name]) for name, value in weights(whole.adapter).items())


def test_the_memory_of_a_copy_is_used_again(recipe):
    trainer = Trainer(recipe(), ToyAdapter())
    trainer.step = 1

    def copied() -> tuple[dict[str, int], dict[str, torch.Tensor]]:
        gc.collect()
        copy = trainer.writer._copy(checkpoint.snapshot({"step": 1}, trainer.adapter, trainer.optimizer))
        found = {name: tensor for part in copy.parts.values() for name, tensor in part.items()}
        return {name: tensor.data_ptr() for name, tensor in found.items()}, found

    first, _ = copied()
    with torch.no_grad():
        trainer.adapter.layers[0].weight.zero_()
    second, tensors = copied()
    assert first == second and len(first) == 4 * 4  # weights and biases; of each, two moments and a step
    own = {p.data_ptr() for p in trainer.adapter.parameters()}
    assert not tensors["layers.0.weight"].any() and own.isdisjoint(second.values())


def test_without_memory_for_a_copy_training_waits(recipe, monkeypatch, caplog):
    monkeypatch.setattr(background, "available", lambda: 50_000)
    trainer = run_toy(recipe("checkpoint.every=2", "checkpoint.keep=0"))
    assert names(trainer.run_dir) == ["000002", "000004", "000006"]
    assert caplog.text.count("async_save is disabled from now on") == 1
    assert re.search(r"a copy of a checkpoint takes 55\.1.\sKiB of host memory, and 48\.8.\sKiB are free", caplog.text)
    assert Status.read(trainer.run_dir).step == 6


def test_the_copies_of_all_ranks_of_a_machine_must_fit(recipe, monkeypatch):
    trainer = Trainer(recipe(), ToyAdapter())
    taken = checkpoint.snapshot({"step": 1}, trainer.adapter, trainer.optimizer)
    monkeypatch.setattr(background, "available", lambda: taken.bytes * 2)
    for ranks, fits in ((2, True), (3, False)):
        monkeypatch.setattr("reca.distributed.local_world_size", lambda ranks=ranks: ranks)
        with contextlib.nullcontext() if fits else pytest.raises(MemoryError):
            background._check_memory(taken)


def test_a_copy_that_fails_is_done_without(recipe, monkeypatch, caplog):
    def no_more(*_):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(background.DefaultStager, "stage", no_more)
    assert names(run_toy(recipe("checkpoint.every=3")).run_dir) == ["000003", "000006"]
    assert "CUDA error: out of memory" in caplog.text


def test_memory_is_that_of_the_container(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal: 99 kB\nMemAvailable: 64 kB\n")
    (tmp_path / "own").write_text("1:cpu:/\n0::/job/step\n")
    job, step = tmp_path / "groups/job", tmp_path / "groups/job/step"
    step.mkdir(parents=True)
    for module, name, at in ((host_memory, "MEMINFO", "meminfo"), (cgroups, "OWN", "own"), (cgroups, "ROOT", "groups")):
        monkeypatch.setattr(module, name, tmp_path / at)
    machine = host_memory.total()
    assert host_memory.available() == 64 << 10 and machine > 1 << 20
    for folder, limit in ((job, "50000"), (step, "max")):
        (folder / "memory.max").write_text(limit)
        (folder / "memory.current").write_text("30000")
        (folder / "memory.stat").write_text("anon 20000\ninactive_file 10000\n")
    assert host_memory.available() == 30000 and host_memory.total() == 50000
    (tmp_path / "own").unlink()
    assert host_memory.available() == 64 << 10 and host_memory.total() == machine
    (tmp_path / "meminfo").unlink()  # another system than Linux
    assert host_memory.available() == machine


@pytest.mark.skipif(sys.platform != "linux", reason="cgroups are Linux's")
def test_memory_is_that_of_a_container_of_older_systems(tmp_path, monkeypatch):
    """Version 1 of cgroups, as of RHEL 8, with a folder per controller. A container sees its own group as the root."""
    (tmp_path / "own").write_text("4:memory:/docker/1\n1:name=systemd:/docker/1\n0::/\n")
    (group := tmp_path / "groups/memory").mkdir(parents=True)
    monkeypatch.setattr(cgroups, "OWN", tmp_path / "own")
    monkeypatch.setattr(cgroups, "ROOT", tmp_path / "groups")
    machine = host_memory.total()
    (group / "memory.usage_in_bytes").write_text("30000\n")
    (group / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 10000\n")
    for limit, total, available in (("9223372036854771712\n", machine, None), ("50000\n", 50000, 30000)):
        (group / "memory.limit_in_bytes").write_text(limit)
        assert host_memory.total() == total and available in (None, host_memory.available())


def test_a_rank_has_its_share_of_what_all_ranks_hold(monkeypatch):
    """Shares are disjoint, complete and of about one size, whatever the sizes of tensors."""
    whole = {f"p{i}": torch.zeros(size) for i, size in enumerate([1000, 1, 600, 300, 1, 100, 999, 5])}
    monkeypatch.setattr("reca.distributed.world_size", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr("reca.distributed.rank", lambda rank=rank: rank)
        shares.append(contents.own_share(whole))
    assert sorted(name for share in shares for name in share) == sorted(whole)
    assert max(sum(t.numel() for t in share.values()) for share in shares) < 1100


Shard = namedtuple("Shard", "replicate", defaults=[False])


@pytest.mark.parametrize("shape", [(2, 3), (1, 4), (4, 1)])
def test_replicas_of_shards_are_shared_out_too(shape, monkeypatch):
    """HSDP: every shard is written once, by one of the replicas."""

    class Placement(Shard):
        def is_replicate(self):
            return self.replicate

    class Mesh:
        def __init__(self, coordinate):
            self.coordinate = coordinate

        def size(self, dim=None):
            return shape[dim] if dim is not None else shape[0] * shape[1]

        def get_coordinate(self):
            return self.coordinate

    class Sharded:
        placements = (Placement(True), Placement())

        def __init__(self, numel, mesh):
            self.nbytes, self.device_mesh = 4 * numel, mesh

    monkeypatch.setattr(contents, "DTensor", Sharded)
    written, files = [], []
    for replica in range(shape[0]):
        for shard in range(shape[1]):
            mesh = Mesh((replica, shard))
            whole = {f"p{i}": Sharded(12 << 24, mesh) for i in range(8)}
            written += [(name, shard) for name in contents.own_share(whole)]
            files.append(contents.split_into_files(whole))
    assert sorted(written) == sorted((f"p{i}", shard) for i in range(8) for shard in range(shape[1]))
    assert all(found == files[0] for found in files)


def test_files_are_of_about_one_size(recipe, monkeypatch, tmp_path):
    """A checkpoint of several files to a rank is read as one."""
    monkeypatch.setattr(contents, "FILE_BYTES", 10_000)
    trainer = run_toy(recipe("train.steps=2"))
    found = sorted(path.name for path in (checkpoint.latest(trainer.run_dir) / "weights").iterdir())
    assert found == [f"shard-00001-model-{i:05d}-of-00002.safetensors" for i in (1, 2)]
    assert all(
        torch.equal(p, states(checkpoint.latest(trainer.run_dir))[n]) for n, p in weights(trainer.adapter).items()
    )


def test_a_file_is_larger_than_the_limit_only_with_a_single_tensor(monkeypatch):
    monkeypatch.setattr(contents, "FILE_BYTES", 100)
    whole = {f"p{i}": torch.zeros(size, dtype=torch.uint8) for i, size in enumerate([160, 40, 60, 4, 100])}
    assert contents.split_into_files(whole) == {"p0": 1, "p1": 2, "p2": 2, "p3": 3, "p4": 4}


def test_keep_every_keeps_for_ever(recipe, caplog):
    trainer = run_toy(recipe("checkpoint.every=1", "checkpoint.keep=1", "checkpoint.keep_every=3", "train.steps=8"))
    assert names(trainer.run_dir) == ["000003", "000006", "000008"]
    again = run_toy(recipe("checkpoint.every=1", "checkpoint.keep=1", "checkpoint.keep_every=4", "train.steps=9"))
    assert names(again.run_dir) == ["000008", "000009"]


def test_keep_every_is_a_multiple(recipe):
    for every, keep_every in ((2, 3), (0, 3), (4, 2)):
        with pytest.raises(RecipeError, match=f"keep_every={keep_every} must be a multiple of .*every={every}:"):
            recipe(f"checkpoint.every={every}", f"checkpoint.keep_every={keep_every}")


@pytest.mark.parametrize("keep", [Keep(0), Keep(1), Keep(2), Keep(5), Keep(1, 3), Keep(2, 6), Keep(3, 9), Keep(0, 3)])
def test_the_most_that_is_kept_is_known_before(keep):
    for interval in (3, 0):
        for steps in (1, 2, 3, 7, 18, 20, 31):
            saves = [step for step in range(1, steps + 1) if step == steps or (interval and step % interval == 0)]
            there, most = [], 0
            for step in saves:
                there.append(Path(f"{step:06d}"))
                most = max(most, len(there))
                there = [path for path in there if path not in keep.superseded(there)]
            if interval or not keep.every:
                assert keep.most(steps, interval) == most, (steps, interval)


def test_the_warning_of_free_space_counts_what_keep_every_keeps(recipe, monkeypatch, caplog):
    keys = ("checkpoint.every=1", "checkpoint.keep=1", "train.steps=6")
    usage = namedtuple("usage", "free")(4 * 56_500)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    Trainer(recipe(*keys), ToyAdapter())
    assert "more checkpoints" not in caplog.text
    Trainer(recipe(*keys, "checkpoint.keep_every=1"), ToyAdapter())
    assert "6 more checkpoints of 55.12 KiB will be kept (the latest 1 and one for every 1 steps)" in caplog.text
    Trainer(recipe(*keys, "checkpoint.keep=0"), ToyAdapter())
    assert "6 more checkpoints of 55.12 KiB will be kept (all)" in caplog.text
