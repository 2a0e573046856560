"""Disks that fill up: at the start, in the middle, at the last save, at a signal; in every folder that is written."""

import errno
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from reca import exits
from reca.data.errors import DataError
from reca.runs.status import Status
from reca.training import compiled_blocks
from tests.driver.toy import run_toy

ROOT = Path(__file__).parents[2]
SMALL = "mount -t tmpfs -o size=24m tmpfs {disk} && exec {python} {script} {disk} {elsewhere}"


def _may_mount(namespace: list[str]) -> bool:
    if shutil.which(namespace[0]) is None:
        return False
    return subprocess.run([*namespace, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What full_disk.py saw, in a mount namespace of its own: as root, or as root of a user namespace."""
    namespaces = (["unshare", "--mount"], ["unshare", "--user", "--map-root-user", "--mount"])
    namespace = next((n for n in namespaces if _may_mount(n)), None)
    if namespace is None:
        pytest.skip("no tmpfs can be mounted here; tests/driver/test_checkpoint.py has stand-ins that raise ENOSPC")
    disk, elsewhere = tmp_path_factory.mktemp("disk"), tmp_path_factory.mktemp("elsewhere")
    script = ROOT / "tests/driver/full_disk.py"
    command = SMALL.format(disk=disk, elsewhere=elsewhere, python=sys.executable, script=script)
    path = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*namespace, "sh", "-c", command], env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_at_the_start_the_run_is_refused(outcomes):
    found = outcomes["at_the_start"]
    assert (found["code"], found["state"], found["checkpoints"]) == (4, "failed", [])
    assert "a checkpoint needs about 4.07 MiB, but" in found["said"] and "are free; free space" in found["said"]


def test_without_a_byte_it_is_one_sentence_too(outcomes):
    found = outcomes["from_nothing"]
    assert found["code"] == 4 and "Traceback" not in found["said"]
    assert found["said"].count("status.json cannot be written (No space left on device)") == 1


def test_in_the_middle_training_goes_on(outcomes):
    found = outcomes["in_the_middle"]
    assert (found["code"], found["state"], found["step"]) == (0, "finished", 4)
    assert "checkpoint at step 2 NOT saved" in found["said"] and found["partial"] == []


def test_at_the_last_save_the_run_has_failed_and_goes_on_later(outcomes):
    found = outcomes["at_the_last_save"]
    assert (found["code"], found["state"], found["step"]) == (6, "failed", 3)
    assert "its checkpoint could NOT be written" in found["said"] and "steps done" not in found["said"]
    assert found["partial"] == [] and found["checkpoints"] == ["000002", "000003"]
    assert (found["again"], found["then"]) == (0, ["000003", "000004"])


def test_at_a_signal_it_is_no_interruption(outcomes):
    found = outcomes["at_a_signal"]
    assert (found["code"], found["state"], found["step"]) == (6, "failed", 2)
    assert "the same command continues the run" not in found["said"] and found["partial"] == []


def test_a_cache_that_is_full_is_done_without(outcomes):
    found = outcomes["in_the_cache"]
    assert (found["code"], found["state"], found["partial"]) == (0, "finished", [])
    assert found["said"].count("WARNING data.cache") == 1


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("in_the_export", "pytorch_model.safetensors cannot be written"),
        ("in_the_images", "000_seed0_a-red-circle.png cannot be written"),
        ("in_the_demo", "demo/seed0"),
    ],
)
def test_what_cannot_be_written_is_one_sentence_that_names_it(outcomes, case, words):
    found = outcomes[case]
    assert found["code"] == 4 and words in found["said"] and "Traceback" not in found["said"]
    assert found.get("left", []) == []


def test_a_full_disk_under_torch_compile_is_one_sentence(recipe, monkeypatch):
    """Its own error was a traceback, with the code of a bug."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(compiled_blocks, "compile_blocks", partial(compiled_blocks.compile_blocks, backend=full))
    monkeypatch.setattr(compiled_blocks, "check_usable", lambda *_: None)
    made = recipe("train.compile=true", "train.steps=1")
    with pytest.raises(DataError, match=r"torch.compile cannot write its files to .* \(No space left on device\)"):
        run_toy(made)
    assert Status.read(Path(made.run_dir)).exit_code == exits.DATA
