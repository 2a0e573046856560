"""The folder of a run: its status, its lock, and what may change when it goes on."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from reca import checkpoint, exits
from reca.cli import main
from reca.data.errors import DataError
from reca.estimate.out_of_memory import Knob
from reca.options.fields import RecipeError
from reca.runs import lineage
from reca.runs.folder import RunFolder, RunInUse
from reca.runs.folder_lock import is_locked
from reca.runs.published import file_fingerprint
from reca.runs.status import Status
from reca.trainer import Trainer
from reca.training.skipped_steps import NonFiniteError
from tests.driver.toy import ToyAdapter, run_toy, weights

ROOT = Path(__file__).parents[2]


def test_the_status_of_a_run_from_start_to_end(recipe):
    keys = ["checkpoint.every=2", "train.steps=4", "checkpoint.async_save=false"]  # so that a save ends before a step
    trainer = Trainer(recipe(*keys), ToyAdapter())
    seen, step = [], trainer.train_step

    def watched(batches):
        seen.append(json.loads((trainer.run_dir / "status.json").read_text()))
        return step(batches)

    trainer.train_step = watched
    trainer.run()
    assert [(s["state"], s["step"], s["checkpoint"]) for s in seen] == [
        ("running", 0, None),
        ("running", 0, None),
        ("running", 2, "checkpoints/000002"),
        ("running", 2, "checkpoints/000002"),
    ]
    status = Status.read(trainer.run_dir)
    assert (status.state, status.step, status.steps, status.exit_code) == ("finished", 4, 4, 0)
    assert status.checkpoint == "checkpoints/000004" and status.pid == os.getpid()


@pytest.mark.parametrize(
    ("error", "code"), [(DataError("no such image"), 4), (NonFiniteError("nan"), 5), (KeyError("a bug"), 1)]
)
def test_a_failure_is_in_the_status(recipe, error, code):
    trainer = Trainer(recipe(), ToyAdapter())

    def fails(batches):
        raise error

    trainer.train_step = fails
    with pytest.raises(type(error)):
        trainer.run()
    status = Status.read(trainer.run_dir)
    assert (status.state, status.exit_code, status.reason) == ("failed", code, str(error))


def test_a_gpu_that_is_full_is_told_with_what_helps(recipe, monkeypatch):
    peaks = 40 << 30, [Knob("train.activation_checkpointing=true", 22 << 30)]
    monkeypatch.setattr("reca.processes.own_process.call", lambda *_: peaks)
    trainer = Trainer(recipe(), ToyAdapter())

    def full(batches):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore words")

    trainer.train_step = full
    with pytest.raises(RecipeError, match=r"2.00 GiB\). .* is 40.00 GiB.*checkpointing=true: 22.00 GiB"):
        trainer.run()
    assert Status.read(trainer.run_dir).exit_code == exits.RECIPE


def test_a_failure_before_the_first_update_is_in_the_status(recipe):
    with pytest.raises(RecipeError):
        Trainer(recipe("objective.i2t.weight=1"), ToyAdapter())
    assert Status.read(Path(recipe().run_dir)).exit_code == exits.RECIPE


def test_reca_status(recipe, capsys, tmp_path):
    assert main(["status", str(tmp_path)]) == 3
    assert "is not a run folder" in capsys.readouterr().err
    run_toy(recipe("train.steps=1"))
    assert main(["status", recipe().run_dir]) == 0
    assert "state       finished" in capsys.readouterr().out
    assert main(["status", f"{recipe().run_dir}/status.json"]) == 3
    assert "status.json is inside the run folder" in capsys.readouterr().err
    (tmp_path / "run/status.json").write_text("{")
    assert main(["status", recipe().run_dir]) == 3
    assert "status.json cannot be read" in capsys.readouterr().err


HOLDERS = """
import os, signal, sys, time
from pathlib import Path
from reca.runs.folder import RunFolder
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nothing is left of a child that is killed
while run_dir := sys.stdin.readline().strip():
    if not (child := os.fork()):
        folder = RunFolder(Path(run_dir), 10)
        folder.record_checkpoint(None)
        print("holds", flush=True)
        time.sleep(60)
        os._exit(0)
    print(child, flush=True)
"""


@pytest.fixture(scope="module")
def holders():
    """A process that has imported everything, and makes others that use a folder."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", HOLDERS]
    with subprocess.Popen(command, **pipes, env=os.environ | {"PYTHONPATH": path}, bufsize=1) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def holder(tmp_path, holders):
    """The id of another process that uses tmp_path/run."""
    (tmp_path / "run").mkdir(exist_ok=True)
    print(tmp_path / "run", file=holders.stdin)
    said = {holders.stdout.readline().strip() for _ in range(2)}
    assert "holds" in said
    (pid,) = said - {"holds"}
    yield int(pid)
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(pid), signal.SIGKILL)


def killed(pid: int) -> None:
    """Kill a process, and wait until it is gone."""
    with contextlib.suppress(ProcessLookupError):
        while True:
            os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)


def test_a_folder_in_use_is_refused_and_free_again_when_its_process_is_killed(recipe, holder, monkeypatch):
    run_dir = Path(recipe().run_dir)
    monkeypatch.setattr("reca.runs.folder_lock.TIMEOUT", 0.1)
    before = (run_dir / "status.json").read_text()
    with pytest.raises(RunInUse, match=f"in use by process {holder} on "):
        Trainer(recipe(), ToyAdapter())
    assert (run_dir / "status.json").read_text() == before and is_locked(run_dir)
    assert Status.read(run_dir).state == "running"
    killed(holder)
    status = Status.read(run_dir)
    assert (status.state, status.exit_code) == ("failed", exits.INTERRUPTED) and "died without" in status.reason
    run_toy(recipe("train.steps=1"))
    assert Status.read(run_dir).state == "finished"


def test_a_start_waits_for_a_process_that_is_just_ending(recipe, holder):
    os.kill(holder, signal.SIGSTOP)
    killer = subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -KILL {holder}"])
    run_toy(recipe("train.steps=1"))
    killer.wait()


def test_locks_of_a_machine_that_is_gone_are_waited_for(tmp_path, holder, monkeypatch, caplog):
    """A file server keeps them for a while. Here a process has them until it is killed, and another machine's name."""
    monkeypatch.setattr("reca.runs.folder_lock.TIMEOUT", 0.1)
    (tmp_path / "run/.lock").write_text("process 7 on node3\n")
    killer = subprocess.Popen(["sh", "-c", f"sleep 1; kill -KILL {holder}"])
    RunFolder(tmp_path / "run", 10).close()
    killer.wait()
    assert [record.message for record in caplog.records if "in use by process 7 on node3: waiting" in record.message]


def test_a_live_process_of_another_machine_is_waited_for_in_vain(tmp_path, holder, monkeypatch):
    monkeypatch.setattr("reca.runs.folder_lock.TIMEOUT", 0.1)
    monkeypatch.setattr("reca.runs.folder_lock.LEASE", 0.5)
    (tmp_path / "run/.lock").write_text("process 7 on node3\n")
    with pytest.raises(RunInUse, match="in use by process 7 on node3"):
        RunFolder(tmp_path / "run", 10)


def test_a_full_disk_does_not_hide_the_status(recipe, monkeypatch):
    trainer = Trainer(recipe("train.steps=2"), ToyAdapter())

    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("reca.runs.folder.write_atomically", full)
    trainer.run()
    assert json.loads((trainer.run_dir / "status.json").read_text())["state"] == "finished"


def test_signals_before_the_first_update_end_the_process_as_interrupted(recipe):
    adapter = ToyAdapter()
    adapter.roles = lambda: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(1)
    with pytest.raises(SystemExit) as stop:
        Trainer(recipe(), adapter)
    assert stop.value.code == exits.INTERRUPTED
    assert Status.read(Path(recipe().run_dir)).state == "interrupted"


def test_a_signal_at_the_last_update_is_no_interruption(recipe):
    trainer = Trainer(recipe("train.steps=2"), ToyAdapter())
    trainer.progress = lambda step: step == 2 and os.kill(os.getpid(), signal.SIGTERM)
    trainer.run()
    assert Status.read(trainer.run_dir).state == "finished"


def test_a_log_holds_every_update_once(recipe):
    """Steps that were made after the checkpoint a run goes back to are made, and written, again."""
    trainer = Trainer(recipe("train.steps=5", "checkpoint.every=2"), ToyAdapter())
    step = trainer.train_step

    def fails_at_three(batches):
        if trainer.step == 3:
            with (trainer.run_dir / "log.jsonl").open("a") as file:
                file.write('{"step": 4, "lo')  # torn by a kill
            raise OSError("the machine goes down")
        return step(batches)

    trainer.train_step = fails_at_three
    with pytest.raises(OSError):
        trainer.run()
    run_toy(recipe("train.steps=5", "checkpoint.every=2"))
    lines = [json.loads(line) for line in (trainer.run_dir / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]


FREE = [
    "ema.half_life=3",
    "train.deterministic=true",
    "log.hang_seconds=0",
    "data.workers=1", "data.prefetch=5", "data.max_bad_fraction=0.5", "data.cache={folder}/cache", "train.threads=1",
    "train.max_skips=9", "train.activation_checkpointing=true", "checkpoint.keep=0", "log.every=3", "parallel.shard=1",
    "objective.reca.micro_batch=8", "objective.t2i.batch_size=3", "objective.i2t.micro_batch=1", "data.captions=null",
    "data.conversations={folder}/none.json",
]  # fmt: skip


@pytest.mark.parametrize("change", FREE)
def test_what_changes_no_result_may_change(recipe, change, tmp_path):
    run_toy(recipe("train.steps=2"))
    assert Trainer(recipe(change.format(folder=tmp_path)), ToyAdapter()).step == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("optim.lr=0.5", "optim.lr 0.01 -> 0.5"),
        ("train.seed=1", "train.seed 0 -> 1"),
        ("objective.reca.batch_size=4", "objective.reca.batch_size 8 -> 4"),
        ("objective.t2i.weight=1", "objective.t2i.weight 0.0 -> 1.0"),
        ("model.weights=owner/name", "model.weights None -> 'owner/name'"),
        ("model.system_prompt=/think", "-> '/think'"),
        ("data.template_count=5", "data.template_count None -> 5 has other contents"),
    ],
)
def test_what_changes_the_result_is_refused(recipe, change, words):
    run_toy(recipe("train.steps=2"))
    with pytest.raises(RecipeError, match="contains a run of another recipe") as refused:
        Trainer(recipe(change), ToyAdapter())
    assert words in str(refused.value) and str(refused.value).count("->") == 1


def test_a_key_that_a_checkpoint_does_not_know_had_its_default(recipe):
    """As of a run that an earlier version has begun."""
    trainer = run_toy(recipe("train.steps=2"))
    state = checkpoint.read_state(checkpoint.latest(trainer.run_dir))
    del state["recipe"]["train"]["skip_spikes"], state["recipe"]["model"]["system_prompt"], state["recipe"]["optim"]
    default = recipe("optim.lr=1e-5")
    lineage.reject_changed(default, trainer.run_dir, state, state["fingerprint"])
    with pytest.raises(RecipeError, match="train.skip_spikes None -> 6.0"):
        lineage.reject_changed(
            recipe("optim.lr=1e-5", "train.skip_spikes=6"), trainer.run_dir, state, state["fingerprint"]
        )


def test_micro_batches_matter_where_each_has_its_own_mean(recipe):
    run_toy(recipe("train.steps=2", "objective.mean=micro_batch"))
    with pytest.raises(RecipeError, match="objective.reca.micro_batch 2 -> 4"):
        Trainer(recipe("objective.mean=micro_batch", "objective.reca.micro_batch=4"), ToyAdapter())


def test_data_may_move_and_not_change(recipe, images, tmp_path):
    whole = run_toy(recipe(f"run_dir={tmp_path}/whole"))
    run_toy(recipe("train.steps=2"))
    moved = images.rename(tmp_path / "other disk")
    resumed = run_toy(recipe(f"data.images={moved}", f"data.captions={moved}"))
    assert all(torch.equal(value, weights(resumed.adapter)[name]) for name, value in weights(whole.adapter).items())

    run_toy(recipe(f"run_dir={tmp_path}/again", f"data.images={moved}", "train.steps=2"))
    (moved / "003.png").write_bytes(b"x" + (moved / "003.png").read_bytes())
    with pytest.raises(RecipeError, match=r"\(24 samples as before, but other ones: .* files count as changed\)"):
        Trainer(recipe(f"run_dir={tmp_path}/again", f"data.images={moved}"), ToyAdapter())
    (moved / "003.png").unlink()
    with pytest.raises(RecipeError, match=r"data.images='.*' has other contents \(24 samples, now 23\)"):
        Trainer(recipe(f"run_dir={tmp_path}/again", f"data.images={moved}"), ToyAdapter())


def test_folders_of_weights_are_told_apart_by_what_is_in_them(tmp_path):
    """Two results of one architecture have the same names and sizes."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(bytes(2**21))
    own = file_fingerprint(f"{tmp_path}/one")
    assert own == file_fingerprint(f"{tmp_path}/two")
    (tmp_path / "two/.cache").mkdir()
    (tmp_path / "two/.cache/lock").touch()  # of the hub's client
    assert own == file_fingerprint(f"{tmp_path}/two")
    (tmp_path / "two/model.safetensors").write_bytes(bytes(2**21 - 1) + b"x")
    assert own != file_fingerprint(f"{tmp_path}/two")
    one, two = (file_fingerprint(f"{tmp_path}/{name}/model.safetensors") for name in ("one", "two"))
    assert one != two and file_fingerprint("owner/name") == "owner/name"


def test_a_template_that_the_model_refuses_ends_the_start(recipe, tmp_path, monkeypatch):
    """And not the step that draws it."""

    def check(adapter, templates):
        if long := [text for text in templates if len(text) > 20]:
            raise ValueError(f"a template has 9 tokens: {long[0]!r}")

    monkeypatch.setattr(ToyAdapter, "check_templates", check)
    (tmp_path / "templates.txt").write_text("draw it\n" * 50 + "draw it, and say why you do so\n")
    with pytest.raises(ValueError, match="a template has 9 tokens: 'draw it, and say why you do so'"):
        Trainer(recipe(f"data.templates={tmp_path}/templates.txt"), ToyAdapter())


def test_a_long_template_is_refused_before_weights_are_read(tmp_path, monkeypatch):
    from reca.config.recipe_files import load_recipe
    from reca.models.janus import Adapter

    monkeypatch.setattr(Adapter, "load", lambda *_: pytest.fail("weights were read"))
    (tmp_path / "a.png").touch()
    (tmp_path / "templates.txt").write_text(f"describe this picture\n{'red ' * 400}\n")
    given = [f"run_dir={tmp_path}", f"data.images={tmp_path}", f"data.templates={tmp_path}/templates.txt"]
    with pytest.raises(ValueError, match="shorten it in data.templates: 'red red"):
        Trainer(load_recipe("janus_tiny", [*given, "objective.i2t.weight=0"]))


def test_templates_may_move_and_not_change(recipe, tmp_path):
    (tmp_path / "one.txt").write_text("Draw this.\nDraw that.\n")
    run_toy(recipe("train.steps=2", f"data.templates={tmp_path}/one.txt"))
    (tmp_path / "one.txt").rename(tmp_path / "two.txt")
    Trainer(recipe(f"data.templates={tmp_path}/two.txt"), ToyAdapter())
    (tmp_path / "two.txt").write_text("Draw this.\nDraw those.\n")
    with pytest.raises(RecipeError, match="data.templates.*has other contents"):
        Trainer(recipe(f"data.templates={tmp_path}/two.txt"), ToyAdapter())


def rates(run_dir):
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [round(line["lr"], 6) for line in lines if "lr" in line]


def test_a_longer_run_keeps_its_schedule_unless_told(recipe, caplog):
    linear = ["optim.schedule=linear", "optim.lr=1"]
    run_toy(recipe(*linear, "train.steps=4"))
    longer = run_toy(recipe(*linear, "train.steps=6"))
    assert rates(longer.run_dir) == [1, 0.75, 0.5, 0.25, 0, 0]
    assert "learning-rate schedule, which still ends at step 4" in caplog.text
    told = run_toy(recipe(*linear, "train.steps=8", "optim.decay_steps=16"))
    assert rates(told.run_dir)[6:] == [0.625, 0.5625]
    assert "now ends at step 16; before it was step 4" in caplog.text
    kept = run_toy(recipe(*linear, "train.steps=9"))
    assert rates(kept.run_dir)[8:] == [0.5]


def test_a_finished_run_says_so(recipe, capsys, tmp_path):
    command = [
        "train", "show_o_tiny", "objective.reca.batch_size=2", "objective.i2t.weight=0", "log.tensorboard=false",
        f"run_dir={tmp_path}/run",
    ]  # fmt: skip
    assert main([*command, "train.steps=2"]) == 0
    assert capsys.readouterr().out.startswith("2 steps done.")
    for fewer in (2, 1):
        assert main([*command, f"train.steps={fewer}"]) == 0
        assert f"already has 2 steps, and train.steps={fewer}: nothing to do" in capsys.readouterr().out
    assert checkpoint.latest(tmp_path / "run").name == "000002"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.images=/nowhere"], "/nowhere does not exist"),
        (["data.images=null"], "data.images is null"),
        (["data.templates=/nowhere.txt"], "template file /nowhere.txt"),
        (["model.weights=/nowhere/model.safetensors"], "model.weights=/nowhere/model.safetensors does not exist"),
        (["train.roles=[und_lm, everything]"], "'everything', which is not a role"),
        (["train.frozen=[nothing.*]"], "no parameter matches 'nothing.*'"),
        (["train.init_from=/nowhere"], "train.init_from=/nowhere is not a run folder"),
    ],
)
def test_mistakes_are_seen_before_weights_are_read(overrides, words, tmp_path, monkeypatch):
    from reca.config.recipe_files import load_recipe
    from reca.models.show_o import Adapter

    monkeypatch.setattr(Adapter, "load", lambda *_: pytest.fail("weights were read"))
    recipe = load_recipe("show_o_512", [f"run_dir={tmp_path}", f"data.images={tmp_path}", *overrides])
    recipe.objective.i2t.weight = 0.0
    monkeypatch.setattr("reca.preflight.host_memory", lambda: 2**40)
    (tmp_path / "a.png").touch()
    with pytest.raises(ValueError) as error:
        Trainer(recipe)
    assert words in str(error.value)


def test_memory_is_checked_before_weights_are_read(tmp_path, monkeypatch):
    from reca.config.recipe_files import load_recipe

    (tmp_path / "a.png").touch()
    monkeypatch.setattr("reca.preflight.host_memory", lambda: 2**34)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    recipe = load_recipe("bagel_7b", [f"run_dir={tmp_path}", f"data.images={tmp_path}"])
    with pytest.raises(RecipeError, match=r"needs at least 1\d\d\.\d\d GiB .* this machine has 16.00 GiB"):
        Trainer(recipe)
    recipe.optim.offload = True
    with pytest.raises(
        RecipeError, match=r"offload=true needs 48.7\d GiB of host memory .* this one has 16.00 GiB.*adamw_8bit"
    ):
        Trainer(recipe)


def test_files_are_readable_as_the_umask_allows(recipe, tmp_path):
    """Colleagues read them too: libraries that write weights give their files mode 0600."""
    before = os.umask(0o022)
    try:
        trainer = run_toy(recipe("train.steps=2", f"data.cache={tmp_path}/cache"))
    finally:
        os.umask(before)
    files = [path for folder in (trainer.run_dir, tmp_path / "cache") for path in folder.rglob("*") if path.is_file()]
    assert any(path.suffix == ".safetensors" for path in (tmp_path / "cache").rglob("*"))
    assert {path.name: path.stat().st_mode & 0o777 for path in files} == {path.name: 0o644 for path in files}
