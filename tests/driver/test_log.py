"""What a run prints and writes: header, bar or lines, TensorBoard, Weights & Biases."""

import io
import json
import logging
import shutil
import struct
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

from reca.config.recipe_files import load_recipe
from reca.monitoring import header, trackers
from reca.monitoring.console import duration, step_line
from reca.trainer import Trainer
from tests.driver.toy import ToyAdapter, run_toy, write_images

METRICS = {"loss": 1.5, "images_per_s": 80.0, "lr": 1e-5, "grad_norm": 0.9, "memory_gib": 12.0, "data_wait": 0.03}


def log_lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00"), (59.6, "0:01:00"), (3725, "1:02:05"), (86399, "23:59:59"), (86400 * 8 + 61, "8d 0:01:01")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_columns_keep_their_places():
    small = step_line(7, 50000, METRICS, None)
    changes = {"loss": 123.4567, "images_per_s": 12345.6, "grad_norm": 1.23e-05, "memory_gib": 140.1, "data_wait": 1.0}
    large = step_line(50000, 50000, METRICS | changes, 86400 * 3)
    assert len(small) == len(large)
    for word in ("loss", "images/s", "lr", "grad norm", "memory", "data wait", "ETA"):
        assert small.index(word) == large.index(word), word
    assert small.startswith("step     7/50000  loss   1.5000  images/s    80.0  lr 1.00e-05") and "MFU" not in small
    assert "data wait   3%  MFU 41.2%  ETA    0:01:00" in step_line(7, 9, METRICS | {"mfu": 0.412}, 60)


def test_lines_where_the_output_is_no_terminal(recipe, capsys, monkeypatch):
    monkeypatch.setattr(header, "WIDTH", 10000)  # the path of the run may be long
    run_toy(recipe("train.steps=6", "log.every=2", "ema.half_life=3"))
    out, shown = capsys.readouterr()
    lines = shown.splitlines()
    assert not out and "\r" not in shown and "step/s" not in shown
    assert [line[:9] for line in lines if line.startswith("step ")] == ["step 2/6 ", "step 4/6 ", "step 6/6 "]
    assert sum("expected end 20" in line for line in lines) == 1 and lines[-1].endswith("ETA    0:00:00")
    rows = {line.split()[0]: line for line in lines if line[:1].strip()}
    assert "show_o, steps 1 to 6" in rows["run"]
    assert "reca (weight 1) 8 samples per step of 24 in " in rows["data"]
    assert "4.7k of 7.06k parameters: gen_head 4.7k of 4.7k; frozen: und_encoder" in rows["trained"]
    assert "fp32, EMA with a half-life of 3 steps" in rows["precision"]
    assert {"device", "kernels", "memory"} <= rows.keys() and "attention" in shown and "peak" not in rows


def test_the_header_names_the_sources_of_a_mixture(recipe, images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(header, "WIDTH", 10000)
    other = write_images(tmp_path / "other")
    run_toy(recipe("train.steps=1", f"data.images=[{{source: {images}, weight: 3}}, {other}]"))
    assert f"8 samples per step of 48 in {images}, {other}: 8 per GPU" in capsys.readouterr().err


def test_a_bar_on_a_terminal(recipe, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    run_toy(recipe("train.steps=3"))
    shown = terminal.getvalue()
    assert "run: 100%" in shown and "3/3" in shown and "trained    4.7k" in shown
    assert "step 1/3" not in shown and "expected end" in shown


def test_nothing_is_printed_where_a_caller_shows_progress(recipe, capsys):
    Trainer(recipe("train.steps=2"), ToyAdapter(), progress=lambda step: None).run()
    assert capsys.readouterr() == ("", "")


def test_speed_is_a_mean_since_the_last_line(recipe):
    trainer = run_toy(recipe("train.steps=6", "log.every=3"))
    for line in log_lines(trainer.run_dir):
        assert line["images_per_s"] == pytest.approx(8 / line["step_s"])
        assert line["images_per_s_per_gpu"] == line["images_per_s"]
        assert line["data_wait"] == pytest.approx(line["data_wait_s"] / line["step_s"]) and 0 < line["data_wait"] < 1
        assert 0.05 < line["memory_gib"] < 100 and "mfu" not in line


PROMPTS = "log.prompts=[a red square, 'a cat: \"x\"/y']"


def test_tensorboard_has_the_images_under_their_prompts(recipe):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = run_toy(recipe(PROMPTS, "log.sample_every=3", "log.tensorboard=true"))
    events = accumulator.EventAccumulator(str(trainer.run_dir / "tensorboard"), {"images": 0, "scalars": 0})
    events.Reload()
    assert events.Tags()["images"] == ["samples/0 a red square", 'samples/1 a cat: "x"/y']
    for tag in events.Tags()["images"]:
        assert [(e.step, e.width, e.height) for e in events.Images(tag)] == [(3, 4, 4), (6, 4, 4)]
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert {p.name for p in (trainer.run_dir / "samples").iterdir()} == {"000003.png", "000006.png"}


@pytest.mark.parametrize("done", [0, 2])
def test_tensorboard_shows_steps_that_are_made_again_once(tmp_path, monkeypatch, done):
    """Also those of a run that was killed before its first checkpoint, with the evaluation before its first step."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first, loss in ((0, 1.0), (done and done + 1, 2.0)):
        monkeypatch.setattr("time.time", lambda start=loss: 1e9 + start)  # files are read in the order of their seconds
        board = trackers.TensorBoard(tmp_path, done if loss == 2 else 0)
        for step in range(first, 5):
            board.scalars(step, {"loss": loss})
        board.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == [0, 1, 2, 3, 4]
    assert [e.value for e in events.Scalars("loss")] == ([2.0] * 5 if done == 0 else [1.0] * 3 + [2.0] * 2)


def wandb_records(folder: Path) -> list:
    """What a run of the real package has written without a network: a log in LevelDB's format, in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, found, parts, place = next(folder.glob("*.wandb")).read_bytes(), [], b"", 7  # behind the file's own header
    while place < len(data):
        if (left := 32768 - place % 32768) < 7:  # no room for a header
            place += left
            continue
        length, kind = struct.unpack_from("<4xHB", data, place)  # behind a checksum
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            found.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return found


def test_weights_and_biases_without_a_network(recipe, monkeypatch):
    """The real package: a run and its continuation are one run there, with the images and their prompts."""
    pytest.importorskip("wandb", reason="wandb is not installed: pip install 'reca[log]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    keys = ["log.wandb=reca-tests", PROMPTS, "log.sample_every=2"]
    trainer = run_toy(recipe(*keys, "train.steps=2"))
    run_toy(recipe(*keys, "train.steps=4"))
    name = (trainer.run_dir / trackers.WANDB_ID).read_text().strip()
    folders = sorted((trainer.run_dir / "wandb").glob("offline-run-*"))
    assert folders and all(folder.name.endswith(f"-{name}") for folder in folders)
    steps, captions = [], []
    for folder in folders:
        for record in wandb_records(folder):
            if record.WhichOneof("record_type") == "run":
                assert (record.run.project, record.run.run_id) == ("reca-tests", name)
            values = {"/".join(i.nested_key) or i.key: i.value_json for i in record.history.item}
            if "loss" in values:
                steps.append(int(values["step"]))
            if "samples/captions" in values:
                captions.append(json.loads(values["samples/captions"]))
    assert steps == [1, 2, 3, 4] and captions == [["a red square", 'a cat: "x"/y']] * 2


class Service:
    """Weights & Biases, which keeps the history and the last values of a run, and cannot cut them back."""

    __spec__ = ModuleSpec("wandb", None)  # accelerate looks for it
    run = None  # the one that is active

    def __init__(self):
        self.history, self.summary, self.finished = [], {}, 0

    def init(self, **settings):
        assert settings["resume"] == "allow"
        return self

    def log(self, values):
        self.history.append(values)
        self.summary |= values

    def Image(self, image, caption):
        return image.size, caption

    def finish(self):
        self.finished += 1

    def Settings(self, **_): ...
    def define_metric(self, *_, **__): ...


def test_weights_and_biases_has_every_step_once(recipe, monkeypatch):
    """A run is killed at step 5, and goes on from the checkpoint of step 2."""
    monkeypatch.setitem(sys.modules, "wandb", service := Service())
    keys = ["log.wandb=project", PROMPTS, "log.sample_every=4"]
    trainer = run_toy(recipe(*keys, "train.steps=5", "checkpoint.every=2", "checkpoint.keep=0"))
    assert service.finished == 1
    for step in (4, 5):
        shutil.rmtree(trainer.run_dir / f"checkpoints/{step:06d}")
    run_toy(recipe(*keys, "train.steps=7"))
    assert service.finished == 2
    assert [values["step"] for values in service.history if "loss" in values] == [1, 2, 3, 4, 5, 6, 7]
    assert [line["step"] for line in log_lines(trainer.run_dir)] == [1, 2, 3, 4, 5, 6, 7]
    samples = [((4, 4), "a red square"), ((4, 4), 'a cat: "x"/y')]
    assert next((row["step"], row["samples"]) for row in service.history if "samples" in row) == (4, samples)


def test_a_run_of_weights_and_biases_that_the_caller_began_is_his(recipe, monkeypatch, tmp_path):
    """It got the metrics of reca's run, was finished by it, and refused what the caller logged afterwards."""
    monkeypatch.setitem(sys.modules, "wandb", service := Service())
    service.run = service
    for name in ("a", "b"):
        run_toy(recipe("log.wandb=project", "train.steps=2", f"run_dir={tmp_path}/{name}"))
    assert service.finished == 0 and [values["step"] for values in service.history] == [1, 2, 1, 2]


def test_an_id_of_weights_and_biases_that_a_full_disk_left_empty(recipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", service := Service())
    (path := Path(recipe().run_dir) / trackers.WANDB_ID).parent.mkdir()
    path.touch()
    run_toy(recipe("log.wandb=project", "train.steps=1"))
    assert len(path.read_text().strip()) == 8 and service.finished == 1


@pytest.mark.parametrize(
    ("fields", "variable", "given"),
    [
        ({"console": None, "finish_timeout": None}, None, {"finish_timeout": trackers.FINISH}),
        ({"console": None, "finish_timeout": None}, "0", {}),  # the user's
        ({"console": None}, None, {}),  # an older version
    ],
)
def test_weights_and_biases_gives_up_its_upload(monkeypatch, tmp_path, fields, variable, given):
    """Without a network at the end of a run `finish` waited forever, and SIGTERM did not end it."""
    settings, service = [], Service()
    service.Settings = lambda **values: settings.append(values)
    service.Settings.model_fields = fields
    monkeypatch.setitem(sys.modules, "wandb", service)
    monkeypatch.delenv("WANDB_FINISH_TIMEOUT", raising=False)
    if variable is not None:
        monkeypatch.setenv("WANDB_FINISH_TIMEOUT", variable)
    trackers.WandB(tmp_path, "project", {})
    assert settings == [{"console": "off", **given}]


class Broken:
    name = "Broken"

    def __init__(self, run_dir, *_):
        raise OSError("no network\nmore words")


class Breaking:
    """A service that fails after a while."""

    name = "Breaking"

    def __init__(self, run_dir, *_):
        self.calls = []

    def scalars(self, step, values):
        self.calls.append(step)
        if step == 2:
            raise RuntimeError("it is gone")

    def close(self):
        raise RuntimeError("it is gone")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Broken, ["Broken cannot be used (no network): logging to log.jsonl without it"]),
        (Breaking, ["Breaking cannot be written (it is gone): it is disabled"]),
    ],
)
def test_a_service_that_fails_does_not_end_the_run(recipe, monkeypatch, caplog, kind, said):
    monkeypatch.setattr(trackers, "WandB", kind)
    trainer = run_toy(recipe("log.wandb=project"))
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == said
    assert [line["step"] for line in log_lines(trainer.run_dir)] == [1, 2, 3, 4, 5, 6]


def test_a_package_that_is_not_installed(recipe, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with caplog.at_level(logging.INFO, "reca"):
        run_toy(recipe("log.wandb=project", "train.steps=1"))
    assert "wandb is not installed (pip install 'reca[log]'): logging to log.jsonl without it" in caplog.text


def test_a_package_that_lacks_another_one_is_not_called_missing(recipe, monkeypatch, caplog):
    def lacking(*_):
        raise ImportError("No module named 'other'", name="other")

    monkeypatch.setattr(trackers, "WandB", lacking)
    lacking.name = "Weights & Biases"
    with caplog.at_level(logging.INFO, "reca"):
        run_toy(recipe("log.wandb=project", "train.steps=1"))
    assert "Weights & Biases cannot be used (No module named 'other'): logging to log.jsonl" in caplog.text
    assert "not installed" not in caplog.text


def test_samples_that_cannot_be_written_do_not_end_the_run(recipe, caplog):
    r = recipe(PROMPTS, "log.sample_every=1", "train.steps=1")
    Path(r.run_dir).mkdir(parents=True)
    (Path(r.run_dir) / "samples").write_text("a file")
    assert run_toy(r).step == 1
    assert "samples/000001.png cannot be written" in caplog.text


def test_a_bar_is_closed_with_its_log(recipe, monkeypatch, tmp_path):
    """It redirects the handler of the root logger."""
    from reca.monitoring.log import RunLog

    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    before = [logging.StreamHandler(terminal)]
    monkeypatch.setattr(logging.getLogger(), "handlers", before)
    log = RunLog(recipe(), tmp_path, 0)
    assert logging.getLogger().handlers != before
    log.close()
    assert logging.getLogger().handlers == before


def test_nothing_of_it_on_other_ranks(recipe, monkeypatch, tmp_path):
    monkeypatch.setattr("reca.distributed.rank", lambda: 1)
    from reca.monitoring.log import RunLog

    monkeypatch.setattr(trackers, "WandB", lambda *_: pytest.fail("another rank has a run of its own"))
    log = RunLog(recipe("log.wandb=project", "log.tensorboard=true"), tmp_path, 0)
    log.record(1, METRICS)
    log.warn(1, "one")
    log.sample_images(1, [torch.zeros(3, 4, 4, dtype=torch.uint8)])
    log.close()
    assert not any((tmp_path / name).exists() for name in ("log.jsonl", "tensorboard", "samples", "rank_1.log"))


def test_the_log_changes_no_bit(recipe, tmp_path):
    """Counting FLOPs draws no random number and touches no parameter."""
    keys = ["train.steps=2", "log.tensorboard=false", "data.workers=0", "train.threads=1"]
    made = []
    for name, more in (("plain", []), ("counted", ["log.peak_flops=1e12", "log.every=1"])):
        trainer = Trainer(load_recipe("show_o_tiny", [*keys, *more, f"run_dir={tmp_path}/{name}"]))
        trainer.run()
        made.append(dict(trainer.adapter.named_parameters()))
    assert all(torch.equal(value, made[1][key]) for key, value in made[0].items())
    assert all(0 < line["mfu"] < 1 for line in log_lines(tmp_path / "counted"))
