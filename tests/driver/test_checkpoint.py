"""What is on a disk: damaged, planted, left over, full."""

import contextlib
import copy
import errno
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from reca import checkpoint, distributed, exits
from reca.checkpoint import CheckpointError, listing, manifest, reading, writing
from reca.data import cache as caching
from reca.data.cache import FeatureCache, content
from reca.data.views import View, Views
from reca.io.checkpoints import MARKER
from reca.models.common.weight_files import read_tensors
from reca.runs.finished import finished_steps
from reca.runs.lineage import load_recipe
from reca.runs.status import Status
from reca.trainer import Trainer
from tests.driver.toy import ToyAdapter, run_toy, weights


def damaged(change, recipe, steps=6):
    """A run with checkpoints at steps 3 and 6, the newest of which `change` has damaged."""
    trainer = run_toy(recipe("checkpoint.every=3", f"train.steps={steps}"))
    newest = checkpoint.latest(trainer.run_dir)
    change(newest)
    return trainer, newest


def weight_file(folder):
    return next((folder / "weights").glob("*.safetensors"))


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "weights cut": lambda folder: cut(weight_file(folder)),
    "a bit of the weights": lambda folder: flip(weight_file(folder)),
    "optimizer cut": lambda folder: cut(next((folder / "optimizer").glob("*.safetensors"))),
    "a bit of the optimizer": lambda folder: flip(next((folder / "optimizer").glob("*.safetensors"))),
    "weights gone": lambda folder: shutil.rmtree(folder / "weights"),
    "counters cut": lambda folder: (folder / "state.json").write_text("{"),
    "empty list": lambda folder: (folder / "COMPLETE").write_text(""),
    "list of something else": lambda folder: (folder / "COMPLETE").write_text("[1, 2]"),
    "list nested too deeply": lambda folder: (folder / "COMPLETE").write_text("[" * 10**5),
    "list is a folder": lambda folder: ((folder / "COMPLETE").unlink(), (folder / "COMPLETE").mkdir()),
}


def test_a_checkpoint_that_is_a_link_is_removed_as_one(recipe, tmp_path):
    """It was moved to another disk to keep it. The link stayed as 000001.old.partial, which no start could remove."""
    run_dir = run_toy(recipe("train.steps=1")).run_dir
    (run_dir / "checkpoints/000001").rename(tmp_path / "kept")
    (run_dir / "checkpoints/000001").symlink_to(tmp_path / "kept")
    run_toy(recipe("train.steps=3", "checkpoint.every=1", "checkpoint.keep=1"))
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["000003"]
    assert checkpoint.find_damage(tmp_path / "kept") == ""


@pytest.mark.parametrize("change", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(change, recipe, caplog):
    whole, newest = damaged(change, recipe)
    kept = weights(whole.adapter)
    again = Trainer(recipe("checkpoint.every=3"), ToyAdapter())
    assert again.step == 3 and "000006 is DAMAGED" in caplog.text and "going back to" in caplog.text
    assert newest.with_name("000006.damaged").is_dir()
    again.run()
    assert all(torch.equal(value, kept[name]) for name, value in weights(again.adapter).items())
    assert checkpoint.latest(again.run_dir).name == "000006"


def test_a_checkpoint_that_a_live_run_replaces_is_not_called_damaged(recipe, monkeypatch, caplog):
    old = checkpoint.latest(run_toy(recipe("train.steps=2")).run_dir)
    find, new = listing.find_damage, old.with_name("000004")

    def replaced(folder):
        monkeypatch.setattr(listing, "find_damage", find)
        return find(folder.rename(new).with_name(folder.name))

    monkeypatch.setattr(listing, "find_damage", replaced)
    assert checkpoint.latest_valid(old.parents[1]) == new and "DAMAGED" not in caplog.text


def test_a_check_of_sizes_reads_no_contents(recipe):
    newest = damaged(lambda folder: flip(weight_file(folder)), recipe)[1]
    assert not checkpoint.find_damage(newest, contents=False) and checkpoint.find_damage(newest)
    sound = {path: path.read_bytes() for path in newest.rglob("*") if path.is_file() and path.name != "COMPLETE"}
    assert len(sound) == 3
    for path, data in sound.items():
        path.write_bytes(data[:-1])
        assert path.name in checkpoint.find_damage(newest, contents=False)
        path.write_bytes(data)


@pytest.mark.parametrize("refused", ["optim.lr=0.5", "data.images=/nowhere", "train.roles=[nothing]", "unreadable"])
def test_a_start_that_is_refused_renames_no_damaged_checkpoint(refused, recipe, monkeypatch):
    """Recipe, data and model refuse a start before it is accepted; a disk that fails, behind that."""
    _, newest = damaged(DAMAGE["a bit of the weights"], recipe)
    before = {path: path.read_bytes() for path in newest.parent.rglob("*") if path.is_file()}
    overrides = [] if refused == "unreadable" else [refused]
    with monkeypatch.context() as patch:
        if refused == "unreadable":
            patch.setattr(reading.HuggingFaceStorageReader, "read_data", fail_with(OSError(errno.EIO, "no disk")))
        with pytest.raises((ValueError, RuntimeError, OSError)):
            Trainer(recipe("checkpoint.every=3", *overrides), ToyAdapter())
    assert {path: path.read_bytes() for path in newest.parent.rglob("*") if path.is_file()} == before
    Trainer(recipe("checkpoint.every=3"), ToyAdapter())
    assert sorted(path.name for path in newest.parent.iterdir()) == ["000003", "000006.damaged"]


def test_every_damaged_checkpoint_of_a_step_is_kept(recipe):
    """What was damaged at one step, once more and a third time, is all there, each with its own contents."""
    _, newest = damaged(lambda folder: (folder / "state.json").write_text("0"), recipe)
    for time in "12":
        Trainer(recipe("checkpoint.every=3", "train.steps=6"), ToyAdapter()).run()
        (newest / "state.json").write_text(time)
    Trainer(recipe("checkpoint.every=3", "train.steps=6"), ToyAdapter())
    kept = {path.parent.name: path.read_text() for path in newest.parent.glob("*.damaged*/state.json")}
    assert kept == {"000006.damaged": "0", "000006.damaged.2": "1", "000006.damaged.3": "2"}


@pytest.mark.parametrize("change", DAMAGE.values(), ids=DAMAGE)
def test_without_a_sound_checkpoint_the_folders_to_remove_are_named(change, recipe):
    trainer = run_toy(recipe("train.steps=2"))
    change(checkpoint.latest(trainer.run_dir))
    with pytest.raises(CheckpointError, match="no checkpoint .* is sound .*remove .*000002 and .*status.json to start"):
        Trainer(recipe(), ToyAdapter())
    with pytest.raises(CheckpointError, match="000002"):
        checkpoint.load_weights(checkpoint.find_valid(trainer.run_dir), ToyAdapter())


@pytest.mark.parametrize("trained", ["more", "fewer"])
def test_a_checkpoint_of_other_parameters_than_the_run_trains_is_refused(trained, recipe):
    folder = checkpoint.latest(run_toy(recipe("train.steps=1")).run_dir)
    adapter = ToyAdapter()  # trains its tower, too
    if trained == "fewer":
        adapter.tower.requires_grad_(False)
        adapter.layers[1].requires_grad_(False)
    start = weights(adapter)
    with pytest.raises(CheckpointError, match=r"2 differ, the first .*(tower|layers\.1)\.weight"):
        checkpoint.load(folder, adapter)
    assert all(torch.equal(value, start[name]) for name, value in weights(adapter).items())


def test_numbers_are_compared_as_numbers_and_names_are_digits(recipe):
    trainer = Trainer(recipe("checkpoint.every=1", "checkpoint.keep=2", "train.steps=1000001"), ToyAdapter())
    trainer.step = 999_997
    folder = trainer.run_dir / "checkpoints"
    for name in ("999999.partial", "best", "1e9", "²"):  # a digit for str.isdigit only
        (folder / name).mkdir(parents=True)
        (folder / name / "COMPLETE").touch()
    trainer.run()
    assert [path.name for path in checkpoint.list_complete(trainer.run_dir)] == ["1000000", "1000001"]


def test_a_folder_without_its_list_is_no_checkpoint_and_is_written_anew(recipe):
    _, newest = damaged(lambda folder: (folder / "COMPLETE").unlink(), recipe)
    again = Trainer(recipe("checkpoint.every=3"), ToyAdapter())
    assert again.step == 3
    again.run()
    assert checkpoint.latest_valid(again.run_dir) == newest


def test_leftovers_of_killed_processes_go(recipe):
    trainer = run_toy(recipe("train.steps=2"))
    folder = trainer.run_dir / "checkpoints"
    for name in ("000003.partial", "000001.old.partial"):
        (folder / name / "weights").mkdir(parents=True)
    Trainer(recipe(), ToyAdapter())
    assert [path.name for path in folder.iterdir()] == ["000002"]


def test_a_checkpoint_half_removed_does_not_count(recipe, monkeypatch):
    """Removal that is stopped anywhere leaves a folder that no run takes for a checkpoint."""
    trainer = run_toy(recipe("checkpoint.every=1", "train.steps=3", "checkpoint.keep=0"))
    real, first = shutil.rmtree, checkpoint.list_complete(trainer.run_dir)[0]

    def stopped(folder, *args, **kwargs):
        if Path(folder).exists() and not str(folder).endswith(".damaged"):
            real(Path(folder) / "weights")
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", stopped)
    with pytest.raises(KeyboardInterrupt):
        listing.remove(first)
    assert first not in checkpoint.list_complete(trainer.run_dir)


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def planted(tmp_path):
    """Bytes that make a folder when they are unpickled, and the check that they never were."""
    trap = tmp_path / "sprung"
    torch.save({"state_dict": Trap(trap)}, tmp_path / "code.pth")
    yield [pickle.dumps(Trap(trap)), (tmp_path / "code.pth").read_bytes()]
    assert not trap.exists()


def test_the_trap_works(tmp_path, planted):
    """The two tests below would see code that runs."""
    for data in planted:
        (tmp_path / "file").write_bytes(data)
        with pytest.raises(Exception):  # noqa: B017
            torch.load(tmp_path / "file", weights_only=True)
    assert isinstance(pickle.loads(pickle.dumps(Trap(tmp_path / "elsewhere"))), type(None))
    assert (tmp_path / "elsewhere").is_dir()


def try_everything(recipe, run_dir):
    """Every way that a run is read."""
    for read in (
        lambda: Status.read(run_dir),
        lambda: checkpoint.latest_valid(run_dir),
        lambda: checkpoint.load_weights(checkpoint.find_valid(run_dir), ToyAdapter()),
        lambda: checkpoint.load(run_dir / "checkpoints/000002", ToyAdapter(), torch.optim.SGD([torch.zeros(1)])),
        lambda: load_recipe(run_dir / "recipe.yaml"),
        lambda: Trainer(recipe("train.steps=3"), ToyAdapter()).run(),
    ):
        with contextlib.suppress(RuntimeError, ValueError):
            read()


def test_no_file_of_a_run_runs_code(recipe, planted, tmp_path):
    trainer = run_toy(recipe("train.steps=2"))
    shutil.copytree(trainer.run_dir, tmp_path / "sound")
    files = manifest.files(trainer.run_dir)
    assert len(files) > 6
    # names that torch's own formats and loaders look for
    names = [".metadata", "__0_0.distcp", "optimizer.pt", "state.pkl", "pytorch_model.bin"]
    others = [f"{folder}{name}" for folder in ("", "checkpoints/000002/optimizer/") for name in names]
    for name in [*files, *others]:
        for data in planted if name in others else planted[:1]:
            shutil.rmtree(trainer.run_dir)
            shutil.copytree(tmp_path / "sound", trainer.run_dir)
            path = trainer.run_dir / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            marker = trainer.run_dir / "checkpoints/000002/COMPLETE"
            if name.startswith("checkpoints/000002") and path != marker:  # and the list says that this is right
                folder = marker.parent
                inside = [file for file in manifest.files(folder) if file != "COMPLETE"]
                marker.write_text(json.dumps(manifest.entries(folder, inside)))
            try_everything(recipe, trainer.run_dir)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".index.json"])
def test_no_weight_file_runs_code(planted, tmp_path, suffix):
    for data in planted:
        path = tmp_path / f"weights{suffix}"
        path.write_bytes(data)
        with pytest.raises(ValueError):
            read_tensors(path)


def test_no_cached_feature_runs_code(planted, tmp_path):
    cache = FeatureCache(tmp_path / "cache", Views(gen=View(4), und=None), "identity")
    address = content(b"image")
    for data in planted:
        path = cache.path(address)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        assert cache.get(address) is None


def test_features_that_were_read_once_are_kept_up_to_a_size(tmp_path, monkeypatch):
    row = torch.arange(8.0)
    monkeypatch.setattr(caching, "KEPT_BYTES", row.nbytes)
    cache = FeatureCache(tmp_path / "cache", Views(gen=View(4), und=None), "identity")
    addresses = [content(bytes([i])) for i in range(2)]
    cache.put(addresses, {"h_v": torch.stack([row, row + 1])})
    cache.flush()
    assert [cache.get(address)["h_v"].tolist() for address in addresses] == [row.tolist(), (row + 1).tolist()]
    for address in addresses:
        cache.path(address).unlink()
    assert torch.equal(cache.get(addresses[0])["h_v"], row) and cache.get(addresses[1]) is None


def test_what_a_rank_cannot_write_is_not_saved(recipe, monkeypatch, caplog):
    """Every step of saving, failing: the earlier checkpoint stays, nothing is left over, and training continues."""
    for step in ("_make_room", "_write", "_write_state", "_checksums", "_publish"):
        trainer = Trainer(recipe(f"run_dir={recipe().run_dir}/{step}"), ToyAdapter())
        trainer.step = 1
        assert trainer.save() is not None
        trainer.step = 2
        with monkeypatch.context() as patch:
            patch.setattr(writing, step, lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            assert trainer.save() is None
        assert [path.name for path in (trainer.run_dir / "checkpoints").iterdir()] == ["000001"], step
        assert "No space left on device" in caplog.text
        caplog.clear()
        assert trainer.save().name == "000002"


def test_a_complete_checkpoint_counts_although_old_ones_cannot_be_listed(recipe, monkeypatch, caplog):
    trainer = Trainer(recipe(), ToyAdapter())
    monkeypatch.setattr(writing, "list_complete", lambda _: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    assert trainer.save().name == "000000"
    assert "cannot be listed (Input/output error), so none is removed" in caplog.text


def test_a_checkpoint_that_is_larger_than_the_free_space_is_not_begun(recipe, monkeypatch, caplog):
    trainer = Trainer(recipe(), ToyAdapter())
    monkeypatch.setattr(writing, "free_space", lambda _: 50_000)
    monkeypatch.setattr(writing, "_write", lambda *_: pytest.fail("it was begun"))
    assert trainer.save() is None and "NOT saved: it needs about" in caplog.text
    assert list((trainer.run_dir / "checkpoints").iterdir()) == []


def test_all_ranks_begin_at_the_checkpoint_that_rank_0_sees(recipe, monkeypatch):
    """A network file system shows it to the others later, which would begin at the first step."""
    folder = checkpoint.latest(run_toy(recipe("train.steps=1")).run_dir)
    gather, lists = distributed.all_gather, iter([[[folder], []]])
    monkeypatch.setattr(listing, "list_complete", lambda _: [])
    monkeypatch.setattr(
        distributed,
        "all_gather",
        lambda own, group=None: next(lists, [own]) if isinstance(own, list) else gather(own, group),
    )
    assert checkpoint.latest_valid(folder.parents[1]) == folder


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EFBIG])
def test_a_disk_that_fails_the_library_is_reported_with_its_reason(recipe, monkeypatch, caplog, code):
    """It raises errors of its own, which hold the first one of every rank."""
    trainer = Trainer(recipe(), ToyAdapter())
    monkeypatch.setattr(writing.HuggingFaceStorageWriter, "write_data", fail_with(OSError(code, os.strerror(code))))
    assert trainer.save() is None
    assert f"NOT saved: [Errno {code}] {os.strerror(code)}. " in caplog.text
    assert f"free space in {trainer.run_dir}, or make it writable" in caplog.text


def test_checksums_tell_every_change(tmp_path):
    save_file({"a": torch.arange(10)}, tmp_path / "a.safetensors")
    (tmp_path / "b").write_text("b")
    listed = manifest.entries(tmp_path, manifest.files(tmp_path))
    assert manifest.damage(tmp_path, listed) == []
    flip(tmp_path / "a.safetensors")
    assert manifest.damage(tmp_path, listed) == ["a.safetensors does not match its checksum"]
    (tmp_path / "b").unlink()
    cut(tmp_path / "a.safetensors")
    size = listed["a.safetensors"]["bytes"]
    assert manifest.damage(tmp_path, listed) == [
        f"a.safetensors has {size - 100} of {size} bytes",
        "b is missing",
    ]


def test_exit_codes_are_those_of_the_exceptions():
    from reca.data.errors import DataError
    from reca.options.fields import RecipeError
    from reca.runs.folder import RunInUse
    from reca.trainer import NotSavedError
    from reca.training.skipped_steps import NonFiniteError

    expected = {
        RecipeError: 3, CheckpointError: 3, ValueError: 3, DataError: 4, OSError: 4, NonFiniteError: 5,
        NotSavedError: 6, RunInUse: 7,
    }  # fmt: skip
    assert {kind: exits.expected(kind("text")) for kind in expected} == expected
    assert exits.expected(KeyError("text")) is None and exits.code_of(KeyError("text")) == 1
    assert exits.code_of(SystemExit(75)) == 75 and exits.code_of(KeyboardInterrupt()) == 130


ERRORS = [
    OSError(errno.EIO, "Input/output error"),
    PermissionError(errno.EACCES, "Permission denied"),
    FileNotFoundError("No such file or directory"),  # what safetensors makes of EMFILE and EACCES
    MemoryError("Cannot allocate memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
]
READ = ("read_metadata", "read_data")


def fail_with(error):
    def fail(*_):
        raise error

    return fail


@pytest.mark.parametrize("function", READ)
@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_an_error_while_a_sound_checkpoint_is_read_is_no_damage(error, function, recipe, monkeypatch):
    trainer = run_toy(recipe("train.steps=2"))
    monkeypatch.setattr(reading.HuggingFaceStorageReader, function, fail_with(error))
    with pytest.raises(type(error), match=str(error.args[-1])):
        checkpoint.load_weights(checkpoint.find_valid(trainer.run_dir), ToyAdapter())


@pytest.mark.parametrize("function", READ)
def test_contents_that_cannot_be_parsed_are_damage(function, recipe, monkeypatch):
    trainer = run_toy(recipe("train.steps=2"))
    monkeypatch.setattr(reading.HuggingFaceStorageReader, function, fail_with(SafetensorError("header too large")))
    with pytest.raises(CheckpointError, match="000002 is damaged .*header too large.* remove it"):
        checkpoint.load_weights(checkpoint.find_valid(trainer.run_dir), ToyAdapter())


def test_counters_that_are_nested_too_deeply_are_damage(tmp_path):
    (tmp_path / "COMPLETE").write_text("{}")
    (tmp_path / "state.json").write_text("[" * 10**5)
    with pytest.raises(CheckpointError, match="is damaged .*nested too deeply"):
        checkpoint.read_state(tmp_path)


def test_counters_of_another_version_are_named(recipe):
    """Their checksum is right. Each key is missing, or has a value of another type."""
    run = recipe("train.steps=2", "ema.half_life=2")
    folder = checkpoint.latest(run_toy(run).run_dir)
    whole = json.loads((folder / "state.json").read_text())
    inner = [(key, name) for key in ("skipped", "monitor", "ema") for name in whole[key]]
    listed = [path for path in manifest.files(folder) if path != MARKER]
    readers = [lambda: Trainer(recipe("train.steps=3", "ema.half_life=2"), ToyAdapter()), lambda: finished_steps(run)]
    for place in [*((key,) for key in reading.RUN_STATE), ("recipe", "train"), *inner]:
        for value in ("text", ...):
            state = copy.deepcopy(whole)
            part = state[place[0]] if place[1:] else state
            part[place[-1]] = value
            if value is ...:
                del part[place[-1]]
            (folder / "state.json").write_text(json.dumps(state))
            (folder / MARKER).write_text(json.dumps(manifest.entries(folder, listed)))
            weights = [lambda: checkpoint.load_weights(folder, ToyAdapter())]
            for read in readers + weights if place == ("step",) else readers:
                with pytest.raises(CheckpointError, match=rf"state.json does not fit .*: {'.'.join(place)} is missing"):
                    read()
            if place != ("step",):  # weights can be used without what a run resumes from
                weights[0]()


@pytest.mark.parametrize("gone", ["state.json", "COMPLETE", "weights", "."])
def test_files_that_go_while_they_are_read(gone, recipe, monkeypatch):
    """What differs from the checksums is damage, whatever the error was; a checkpoint that is gone is none."""
    folder = checkpoint.latest(run_toy(recipe("train.steps=2")).run_dir)

    def remove(*_):
        path = folder / gone
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise FileNotFoundError(path)

    monkeypatch.setattr(reading.HuggingFaceStorageReader, "read_data", remove)
    other = {".": "was removed by a training run", "COMPLETE": "is not a complete checkpoint .no COMPLETE file"}
    with pytest.raises(CheckpointError, match=other.get(gone, f"is damaged .*{gone}")):
        checkpoint.load_weights(checkpoint.find_valid(folder.parents[1]), ToyAdapter())


@pytest.mark.parametrize(
    ("path", "number"),
    [
        ("000002/COMPLETE", errno.EMFILE),
        ("000002/state.json", errno.EIO),
        ("000002/state.json", errno.ESTALE),
        ("", errno.EACCES),
        ("", errno.ENOMEM),
    ],
)
def test_a_checkpoint_that_the_disk_does_not_give_is_neither_renamed_nor_passed_over(path, number, recipe, monkeypatch):
    folder = checkpoint.latest(run_toy(recipe("train.steps=2")).run_dir)

    def refusing(real):
        def refuse(where, *args, **kwargs):
            if Path(where) == folder.parent / path:
                raise OSError(number, os.strerror(number), str(where))
            return real(where, *args, **kwargs)

        return refuse

    monkeypatch.setattr(Path, "open", refusing(Path.open))
    monkeypatch.setattr(os, "listdir", refusing(os.listdir))
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        Trainer(recipe(), ToyAdapter())
    assert caught.value.errno == number and exits.code_of(caught.value) == exits.DATA
    monkeypatch.undo()
    assert [path.name for path in folder.parent.iterdir()] == ["000002"]
