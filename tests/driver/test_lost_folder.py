"""A run folder that is moved, removed or replaced while its run trains, or that was renamed."""

import shutil
import sys
import threading
from pathlib import Path

import pytest
from PIL import Image

from reca import checkpoint, exits
from reca.checkpoint import CheckpointError, background
from reca.checkpoint.retention import Keep
from reca.data.bad_samples import BadSamples
from reca.data.sources.factory import open_source
from reca.eval.judges.toy import ToyJudge
from reca.io.folders import NotWritable
from reca.runs.folder import RunFolder
from reca.runs.status import Status
from reca.trainer import Trainer
from tests.driver.toy import ToyAdapter, run_toy

KEYS = ("checkpoint.every=2", "train.steps=6", "log.tensorboard=false")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells where an open file is now")
@pytest.mark.parametrize("waits", ["checkpoint.async_save=false", "checkpoint.async_save=true"])
def test_a_folder_that_is_moved_ends_its_run_at_that_step(recipe, tmp_path, waits):
    made = recipe(*KEYS, waits)
    trainer, moved = Trainer(made, ToyAdapter()), tmp_path / "moved"
    step, old = trainer.train_step, trainer.run_dir

    def moving(batches):
        if trainer.step == 2:
            if trainer.writer.thread:
                trainer.writer.thread.join()
            old.rename(moved)
        return step(batches)

    trainer.train_step = moving
    with pytest.raises(OSError, match=f"{old} was moved during the run: .* lie in {moved}. Move it"):
        trainer.run()
    assert trainer.step == 3 and not old.exists()
    status = Status.read(moved)
    assert (status.state, status.step, status.exit_code) == ("failed", 2, exits.DATA)
    made.run_dir = str(moved)
    again = Trainer(made, ToyAdapter())
    assert again.step == 2
    again.run()


def test_a_folder_that_is_removed_ends_its_run_at_that_step(recipe):
    made = recipe(*KEYS, "checkpoint.async_save=false")
    trainer = Trainer(made, ToyAdapter(), lambda step: step == 3 and shutil.rmtree(made.run_dir))
    with pytest.raises(OSError, match=f"{made.run_dir} was removed during the run"):
        trainer.run()
    assert trainer.step == 3 and not Path(made.run_dir).exists()


def test_a_folder_that_is_moved_takes_no_checkpoint(recipe, tmp_path):
    """Such as the one before an evaluation, which is not at the end of a step."""
    trainer = Trainer(recipe(*KEYS), ToyAdapter())
    trainer.run_dir.rename(tmp_path / "moved")
    with pytest.raises(OSError, match="was moved during the run"):
        trainer.save()


def replace(folder: Path, how: str) -> None:
    """Move or remove the folder of a run, and begin another run at its path."""
    if how == "moved":
        folder.rename(folder.with_name("elsewhere"))
    else:
        shutil.rmtree(folder)
    (folder / "checkpoints").mkdir(parents=True)
    RunFolder(folder, steps=9).accept()


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("how", ["moved", "removed"])
def test_another_run_at_the_old_path_is_left_alone(recipe, how, monkeypatch):
    """Neither a status of the first comes to lie there, nor a checkpoint that begins to be written beside only then."""
    made, there, other_begun, write = recipe(*KEYS), {}, threading.Event(), background.write

    def late(*given):
        assert other_begun.wait(60)
        return write(*given)

    def replaced(step: int) -> None:
        if step == 3:
            replace(trainer.run_dir, how)
            there.update(contents(trainer.run_dir))
            other_begun.set()

    monkeypatch.setattr(background, "write", late)

    trainer = Trainer(made, ToyAdapter(), replaced)
    with pytest.raises(OSError, match=f"{made.run_dir} was {how} during the run"):
        trainer.run()
    assert contents(trainer.run_dir) == there
    assert Status.read(trainer.run_dir).steps == 9


@pytest.mark.parametrize("how", ["moved", "removed"])
def test_a_folder_that_was_found_lost_stays_lost(recipe, how):
    """A checkpoint whose writing begins only then would lie in the other run's folder."""
    folder = Trainer(recipe(), ToyAdapter()).folder
    replace(folder.run_dir, how)
    with pytest.raises(OSError, match=f"was {how} during the run"):
        folder.reject_lost()
    assert folder.is_lost()


@pytest.mark.parametrize("how", ["moved", "removed"])
def test_a_checkpoint_is_not_written_to_another_run(recipe, how, caplog):
    trainer = Trainer(recipe(), ToyAdapter())
    taken = checkpoint.snapshot({"step": 4}, trainer.adapter, trainer.optimizer, None)
    replace(trainer.run_dir, how)
    there = contents(trainer.run_dir)
    trainer.writer.start(taken)
    assert trainer.writer.wait() is None
    assert checkpoint.write(trainer.run_dir, taken, Keep(1), trainer.folder.is_lost) is None
    assert contents(trainer.run_dir) == there and not list((trainer.run_dir / "checkpoints").iterdir())
    assert f"{trainer.run_dir} was moved or removed" in caplog.text and "free space" not in caplog.text


def test_a_lock_file_that_is_removed_alone_ends_no_run(recipe):
    trainer = Trainer(recipe(*KEYS), ToyAdapter(), lambda step: (trainer.run_dir / ".lock").unlink(missing_ok=True))
    trainer.run()
    assert Status.read(trainer.run_dir).state == "finished"


def test_a_file_system_that_does_not_answer_ends_no_run(recipe, monkeypatch):
    trainer = Trainer(recipe(*KEYS), ToyAdapter())

    def broken(file):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("reca.runs.folder.is_dir", broken)  # between two questions: about a lock file, and its folder
    (trainer.run_dir / ".lock").unlink()
    assert not trainer.folder.is_lost()
    monkeypatch.setattr("reca.runs.folder_lock.key", broken)
    assert not trainer.folder.is_lost()


@pytest.mark.parametrize("moment", ["before", "generating", "judging"])
def test_an_evaluation_does_not_create_the_folder_again(recipe, moment, monkeypatch, tmp_path):
    """The images and results of a suite are written minutes after the step before which the folder was there."""
    trainer = Trainer(recipe(*KEYS, "eval.every=3", "eval.suite=toy", "eval.prompts=2"), ToyAdapter())

    def moving(place, name):
        function = getattr(place, name)

        def moved(*given, **options):
            if trainer.step == 3 and trainer.run_dir.exists():
                trainer.run_dir.rename(tmp_path / "moved")
            return function(*given, **options)

        monkeypatch.setattr(place, name, moved)

    holder, name = {
        "before": (trainer.evaluations, "run"),
        "generating": (ToyAdapter, "generate"),
        "judging": (ToyJudge, "judge"),
    }[moment]
    moving(holder, name)
    with pytest.raises(OSError, match="was moved during the run"):
        trainer.run()
    assert trainer.step == 3 and not trainer.run_dir.exists()


def test_a_bad_sample_does_not_create_the_folder_again(tmp_path, caplog):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    listed = tmp_path / "run/bad_reca.jsonl"
    BadSamples(listed, open_source(str(tmp_path), "reca"), 1.0).add(0, "broken")
    assert not listed.parent.exists() and f"{listed} cannot be written" in caplog.text


def test_a_folder_whose_name_is_not_utf8_is_refused_and_never_called_damaged(recipe):
    """Safetensors reads no such path; the checkpoint of a run that was renamed is sound."""
    folder = run_toy(recipe("train.steps=1")).run_dir
    moved = folder.rename(folder.with_name("a\udcff"))
    with pytest.raises(CheckpointError, match="a\udcff/checkpoints/000001 is not UTF-8, .*: rename the folder"):
        checkpoint.load_weights(moved / "checkpoints/000001", ToyAdapter())
    with pytest.raises(NotWritable, match="run_dir .*a\udcff is not UTF-8, as safetensors requires of paths; name"):
        Trainer(recipe("train.steps=2", f"run_dir={moved}"), ToyAdapter())
