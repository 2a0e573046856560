"""The lock and the status of a run folder: inside one process, at the moment a run ends, without locks."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from reca import checkpoint, exits
from reca.cli import main
from reca.config.recipe_files import load_recipe
from reca.io import jsonl
from reca.options.fields import RecipeError
from reca.runs import folder_lock, status
from reca.runs.finished import finished_steps
from reca.runs.folder import RunFolder, RunInUse
from reca.runs.folder_lock import is_locked
from reca.runs.status import Status
from reca.trainer import Trainer
from tests.driver.toy import ToyAdapter, run_toy

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")])}


def locked_elsewhere(run_dir: Path) -> bool:
    """What another process sees of the lock."""
    script = (
        "import sys, pathlib; from reca.runs.folder_lock import is_locked; "
        "sys.exit(is_locked(pathlib.Path(sys.argv[1])))"
    )
    return bool(subprocess.run([sys.executable, "-c", script, str(run_dir)], env=ENVIRONMENT).returncode)


def test_reading_the_status_in_the_process_of_the_run_keeps_its_lock(recipe):
    run_dir, seen = Path(recipe().run_dir), []
    trainer = Trainer(recipe("train.steps=2"), ToyAdapter(), lambda _: seen.append(Status.read(run_dir).state))
    assert is_locked(run_dir) and locked_elsewhere(run_dir)
    trainer.run()
    assert seen == ["running", "running"] and not is_locked(run_dir) and not locked_elsewhere(run_dir)


def test_a_link_to_a_folder_is_the_same_folder(recipe, tmp_path):
    folder = RunFolder(tmp_path, 1)
    (tmp_path / "link").symlink_to(tmp_path)
    assert is_locked(tmp_path / "link") and locked_elsewhere(tmp_path)
    folder.close()


def test_of_two_trainers_in_one_process_the_newer_has_the_folder(recipe):
    older, newer = (Trainer(recipe("train.steps=2"), ToyAdapter()) for _ in range(2))
    with pytest.raises(RunInUse, match="has released"):
        older.run()
    assert locked_elsewhere(newer.run_dir)
    newer.run()
    with pytest.raises(RunInUse, match="it ended"):
        newer.run()
    assert Status.read(newer.run_dir).state == "finished"


def test_a_run_that_goes_on_in_this_process_is_not_disturbed(recipe):
    refused = []

    def start_another(_):
        with pytest.raises(RunInUse, match="by this very process") as error:
            Trainer(recipe(), ToyAdapter())
        refused.append(error)

    trainer = Trainer(recipe("train.steps=2"), ToyAdapter(), start_another)
    trainer.run()
    assert len(refused) == 2 and Status.read(trainer.run_dir).state == "finished"


def test_training_in_a_thread(recipe):
    """signal.signal is for the main thread only."""
    done = []
    thread = threading.Thread(target=lambda: done.append(run_toy(recipe("train.steps=2")).step))
    thread.start()
    thread.join()
    assert done == [2]


START = """
import os, sys, time
from pathlib import Path
from reca.runs import folder_lock
from reca.runs.folder import RunFolder, RunInUse
folder_lock.TIMEOUT = 0.2
for _ in range(6):  # processes, of one that has imported everything
    if not os.fork():
        break
else:
    for _ in range(6):
        os.wait()
    sys.exit()
sys.stdin.read()
try:
    folder = RunFolder(Path(sys.argv[1]), 1)
except RunInUse:
    os.write(1, b"refused\\n")
else:
    os.write(1, b"started\\n")
    time.sleep(60)
"""


def test_of_many_starts_at_once_one_wins(tmp_path):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", START, str(tmp_path)]
    with subprocess.Popen(command, **pipes, env=ENVIRONMENT, start_new_session=True) as starts:
        try:
            starts.stdin.close()
            assert sorted(starts.stdout.readline() for _ in range(6)) == ["refused\n"] * 5 + ["started\n"]
        finally:
            os.killpg(starts.pid, signal.SIGKILL)


def test_a_run_that_ends_while_its_status_is_read_has_not_failed(recipe, monkeypatch):
    """It may end, and let the folder go, between the reading of the file and the look at the lock."""
    run_dir = run_toy(recipe("train.steps=1")).run_dir
    ended = (run_dir / "status.json").read_text()
    (run_dir / "status.json").write_text(json.dumps(json.loads(ended) | {"state": "running", "exit_code": None}))
    monkeypatch.setattr(status, "is_locked", lambda _: (run_dir / "status.json").write_text(ended) and False)
    assert Status.read(run_dir).state == "finished"


def test_without_locks_a_run_is_alive_while_its_process_is(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.lockf", none)
    RunFolder(tmp_path, 1).record_checkpoint(None)
    folder_lock.holders.clear()
    assert is_locked(tmp_path) is None and Status.read(tmp_path).state == "running"
    monkeypatch.setattr("socket.gethostname", lambda: "another machine")  # whose processes cannot be seen
    assert Status.read(tmp_path).state == "running"
    monkeypatch.undo()
    monkeypatch.setattr("fcntl.lockf", none)
    written = json.loads((tmp_path / "status.json").read_text())
    ended = subprocess.Popen(["true"])
    ended.wait()
    (tmp_path / "status.json").write_text(json.dumps(written | {"pid": ended.pid}))
    assert Status.read(tmp_path).state == "failed"


@pytest.mark.parametrize("state", ["running", "interrupted"])
def test_a_run_with_nothing_left_to_do_is_finished(state, tmp_path, capsys):
    """Killed between its last checkpoint and its last word, or told to make fewer steps: nothing to requeue."""
    tmp_path /= "a run"
    command = [
        "train", "show_o_tiny", "objective.reca.batch_size=2", "objective.i2t.weight=0", "log.tensorboard=false",
        f"run_dir={tmp_path}", "train.steps=1",
    ]  # fmt: skip
    assert main(command) == 0
    path = tmp_path / "status.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"state": state, "exit_code": 75}))
    assert main(["status", str(tmp_path)]) == exits.INTERRUPTED
    (tmp_path / "checkpoints/000000.old.partial/weights").mkdir(parents=True)
    assert main(command) == 0 and "nothing to do" in (told := capsys.readouterr().out)
    assert f"reca generate '{tmp_path}' --prompt" in told
    assert main(["status", str(tmp_path)]) == 0
    assert not is_locked(tmp_path) and [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["000001"]

    # A result that is torn is none, nor is one whose counters have a wrong bit.
    recipe, newest = load_recipe("show_o_tiny", command[2:]), tmp_path / "checkpoints/000001"
    counters, whole = newest / "state.json", (newest / "state.json").read_text()
    for key in ("fingerprint", "recipe", "step"):
        counters.write_text(whole.replace(f'"{key}"', f'"{key[:-1]}~"', 1))
        assert finished_steps(recipe) is None
    counters.write_text(whole)
    assert finished_steps(recipe) == 1
    next((newest / "optimizer").glob("*.safetensors")).write_bytes(b"")
    assert finished_steps(recipe) is None


def test_a_finished_run_says_that_it_was_trained_on_other_data(recipe, tmp_path, caplog):
    """It said that there was nothing to do, of a run that the new data had no part in."""
    made = recipe("train.steps=1")
    run_toy(made)
    caplog.clear()
    unread = ("data.conversations=unused", "data.workers=1", "log.every=7")
    assert finished_steps(recipe("train.steps=1", *unread)) == 1 and not caplog.records
    assert finished_steps(recipe("train.steps=1", f"data.images={tmp_path}/others")) == 1
    assert f"(data.images '{made.data.images}' -> '{tmp_path}/others')" in caplog.text
    assert "set another run_dir to train with it" in caplog.text


def test_a_finished_run_is_one_of_its_recipe(recipe):
    """Not one of fewer steps than are asked for now, and not one of other keys that change its result."""
    run_toy(recipe("train.steps=2"))
    assert finished_steps(recipe("train.steps=2")) == finished_steps(recipe("train.steps=1")) == 2
    assert finished_steps(recipe("train.steps=3")) is None
    with pytest.raises(RecipeError, match="contains a run of another recipe .optim.lr .* -> 0.5"):
        finished_steps(recipe("train.steps=2", "optim.lr=0.5"))


REFUSED = {
    "option": (["data.images=/nowhere"], "nowhere"),
    "result": (["optim.lr=0.5"], "another recipe"),
    "objective": (["objective.i2t.weight=1"], "i2t"),
    "evaluation": (["eval.every=1", "eval.suite=nothing"], "nothing"),
    "fit": (["train.fit=24GiB"], "another"),
}


@pytest.mark.parametrize("state", ["finished", "interrupted"])
@pytest.mark.parametrize("case", [*REFUSED, "memory", "weights", "signal"])
def test_a_refused_start_leaves_a_run_as_it_is(case, state, recipe, monkeypatch):
    overrides, words = REFUSED.get(case, ([], case))
    run = run_toy(recipe("train.steps=1", "log.every=1")).run_dir
    (run / "fit.json").write_text("chosen before")
    path = run / "status.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"state": state}))
    before = contents(run)

    def fails(*_, **__):
        if case == "signal":
            raise SystemExit(exits.INTERRUPTED)
        raise torch.OutOfMemoryError(case) if case == "memory" else ValueError(case)

    def chooses(recipe, own_model, write):
        write(run / "fit.json", b"anew")
        return recipe

    if not REFUSED.get(case):
        monkeypatch.setattr("reca.estimate.fit_run.fit_on_ranks", chooses)
        monkeypatch.setattr("reca.estimate.out_of_memory.advice", lambda _: "")
        monkeypatch.setattr("reca.trainer.check_finite", fails)
    with pytest.raises((ValueError, SystemExit), match=None if case == "signal" else words):
        Trainer(recipe("train.steps=2", *overrides), ToyAdapter())
    after = contents(run)
    status = Status.read(run)
    assert (status.step, status.checkpoint) == (1, "checkpoints/000001")
    if state == "finished":
        assert status.state == "finished"
    else:  # the next start of it is this one
        assert status.state == ("interrupted" if case == "signal" else "failed")
        before.pop("status.json"), after.pop("status.json")
    assert after == before


def contents(run):
    files = (path for path in run.rglob("*") if path.is_file() and path.name != folder_lock.FILE)
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"state": 3}', "[" * 100_000, json.dumps({name: [1] for name in status.FIELDS})]
    + [json.dumps(asdict(Status()) | {name: value}) for name, value in [("state", None), ("exit_code", "x")]],
    ids=lambda text: text[:12],
)
def test_a_status_that_is_none_is_written_anew(text, recipe):
    run = run_toy(recipe("train.steps=1")).run_dir
    (run / "status.json").write_text(text)
    with pytest.raises(
        ValueError, match="cannot be read: expected a JSON object with state, step,.* the next start repl"
    ):
        Status.read(run)
    run_toy(recipe("train.steps=2"))
    assert Status.read(run).state == "finished"


def test_a_status_on_a_faulty_disk_is_not_called_replaceable(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(ValueError, match=r"status.json cannot be read \(Input/output error\); check its permissions"):
        Status.read(tmp_path)


def test_what_is_chosen_is_written_when_the_start_is_accepted(tmp_path):
    folder = RunFolder(tmp_path, 1)
    folder.write_accepted(tmp_path / "fit.json", b"chosen")
    assert not (tmp_path / "fit.json").exists()
    folder.accept()
    assert (tmp_path / "fit.json").read_bytes() == b"chosen" and Status.read(tmp_path).state == "running"
    folder.close()


def test_a_torn_last_line_takes_no_other_with_it(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "loss": 0.10}\n{"step": 3, "lo')
    jsonl.truncate_after(path, 2)
    lines = jsonl.JsonLines(path)
    lines.write({"step": 3})
    lines.close()
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2, "loss": 0.10}\n{"step": 3}\n'


def test_lines_that_a_full_disk_takes_are_counted_and_spoil_no_other(tmp_path, monkeypatch, caplog):
    write, lines = os.write, jsonl.JsonLines(tmp_path / "log.jsonl")

    def full(*_):
        raise OSError(28, "No space left on device")

    lines.write({"step": 1})
    for taken in (lambda handle, line: write(handle, line[:5]), full):  # a part of the line, or nothing
        monkeypatch.setattr(os, "write", taken)
        lines.write({"step": 2})
    monkeypatch.setattr(os, "write", write)
    lines.write({"step": 3})
    lines.close()
    assert jsonl.read(tmp_path / "log.jsonl") == [{"step": 1}, {"step": 3}]
    assert lines.lost == 2 and caplog.text.count("further lines may be lost") == 1


def test_what_is_no_line_of_a_log_goes(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{}\n{"step": null}\n{"step": "3"}\n\xff\xfe\n[1]\n' + b"[" * 10**5 + b'\n{"step": 1}\n')
    jsonl.truncate_after(path, 4)
    assert path.read_bytes() == b'{"step": 1}\n'
    jsonl.truncate_after(tmp_path / "none.jsonl", 4)
    assert not (tmp_path / "none.jsonl").exists()


def test_a_recipe_that_cannot_be_written_anew_stays(recipe, monkeypatch):
    run_dir = run_toy(recipe("train.steps=1")).run_dir
    before = (run_dir / "recipe.yaml").read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    trainer = Trainer(recipe("train.steps=2"), ToyAdapter())
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        trainer.run()
    assert (run_dir / "recipe.yaml").read_bytes() == before and not list(run_dir.glob(".recipe.yaml*"))


def test_checkpoints_may_lie_on_another_disk(recipe, tmp_path, monkeypatch):
    run_dir = Path(recipe().run_dir)
    run_dir.mkdir()
    (run_dir / "checkpoints").symlink_to(tmp_path / "disk")
    with pytest.raises(ValueError, match="checkpoints is a broken link; name another folder"):
        Trainer(recipe(), ToyAdapter())
    (tmp_path / "disk").mkdir()
    run_toy(recipe("train.steps=1"))
    assert checkpoint.latest(run_dir).resolve() == tmp_path / "disk/000001"

    asked = []
    monkeypatch.setattr("shutil.disk_usage", lambda path: asked.append(Path(path).resolve()) or SimpleNamespace(free=7))
    assert checkpoint.free_space(run_dir) == 7 and asked == [tmp_path / "disk"]


def test_a_checkpoint_that_was_complete_before_a_kill_is_in_the_status(recipe):
    """A killed process may not have written it to status.json; the next start resumes from it."""
    run_dir = run_toy(recipe("train.steps=4", "checkpoint.every=2")).run_dir
    written = run_dir / "status.json"
    old = {"state": "running", "exit_code": None, "step": 2, "checkpoint": "checkpoints/000002"}
    written.write_text(json.dumps(json.loads(written.read_text()) | old))
    status = Status.read(run_dir)
    assert (status.state, status.step, status.checkpoint) == ("failed", 4, "checkpoints/000004")
    assert status.reason.endswith("resumes from step 4")
    (run_dir / "checkpoints/000004/COMPLETE").unlink()
    assert Status.read(run_dir).step == 2
    shutil.rmtree(run_dir / "checkpoints/000002")  # an older one is not what the status names
    (run_dir / "checkpoints/000004").rename(run_dir / "checkpoints/000001")
    (run_dir / "checkpoints/000001/COMPLETE").touch()
    assert Status.read(run_dir).step == 2 and "checkpoints/000002 is gone" in Status.read(run_dir).reason


def test_the_status_says_that_the_checkpoint_is_gone(recipe, capsys):
    """A finished run stays finished, but it has no weights to use."""
    run_dir = run_toy(recipe("train.steps=2")).run_dir
    assert Status.read(run_dir).reason is None
    shutil.rmtree(run_dir / "checkpoints")
    status = Status.read(run_dir)
    assert (status.state, status.exit_code, status.checkpoint) == ("finished", 0, "checkpoints/000002")
    assert main(["status", str(run_dir)]) == 0 and "checkpoints/000002 is gone" in capsys.readouterr().out
    written = run_dir / "status.json"
    written.write_text(json.dumps(json.loads(written.read_text()) | {"state": "failed", "reason": "no disk"}))
    assert (status.reason or "") in Status.read(run_dir).reason and Status.read(run_dir).reason.startswith("no disk; ")


@pytest.mark.parametrize("state", ["interrupted", "finished"])
def test_a_run_whose_checkpoints_are_gone_does_not_start_again(state, recipe):
    """They may be on a disk that is not mounted. Whoever wants to start again says so by removing the status."""
    run_dir = run_toy(recipe("train.steps=2")).run_dir
    written = run_dir / "status.json"
    written.write_text(json.dumps(json.loads(written.read_text()) | {"state": state}))
    logged = (run_dir / "log.jsonl").read_bytes()
    (run_dir / "checkpoints").rename(run_dir.with_name("elsewhere"))
    for _ in range(2):  # a refused start does not forget
        with pytest.raises(checkpoint.CheckpointError, match="names checkpoints/000002.*remove .*status.json"):
            run_toy(recipe("train.steps=4"))
    assert (run_dir / "log.jsonl").read_bytes() == logged and Status.read(run_dir).checkpoint == "checkpoints/000002"
    (run_dir / "checkpoints").rmdir()  # an empty one was made
    run_dir.with_name("elsewhere").rename(run_dir / "checkpoints")
    assert Trainer(recipe("train.steps=4"), ToyAdapter()).step == 2
    shutil.rmtree(run_dir / "checkpoints")
    written.unlink()
    assert Trainer(recipe("train.steps=4"), ToyAdapter()).step == 0


def test_a_folder_inside_a_run_is_answered_with_the_run(tmp_path):
    inside = tmp_path / "run" / "checkpoints" / "000004"
    inside.mkdir(parents=True)
    with pytest.raises(ValueError, match="not a run folder: it has no status.json$"):
        Status.read(inside)
    (tmp_path / "run" / "status.json").write_text("{}")
    with pytest.raises(ValueError, match=f"is inside the run folder {tmp_path}/run: pass that folder$"):
        Status.read(inside)
