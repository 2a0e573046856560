"""All commands end with the same code for the same kind of error: docs/failure.md defines them."""

import shlex
import subprocess
import sys

import pytest

from reca.cli import main


@pytest.mark.parametrize(
    ("code", "command"),
    [
        # options that are missing or invalid, and names that stand for nothing
        (3, "eval geneval show_o_tiny --limit 1"),
        (3, "eval geneval show_o_tiny --judge none"),
        (3, "eval geneval_long show_o_tiny --judge owlv2:x"),
        (3, "eval toy show_o_tiny --steps what"),
        (3, "eval toy show_o_tiny --against base"),
        (3, "eval toy show_o_tiny --against missing"),
        (3, "eval toy missing"),
        (3, "eval missing show_o_tiny"),
        (3, "compare missing base"),
        (3, "compare base missing"),
        (3, "compare base base"),
        (3, "compare missing missing"),
        (3, "generate missing --prompt a"),
        (3, "generate show_o_tiny --prompt a --sampling steps=x"),
        (3, "export missing --out out"),
        (3, "serve missing"),
        (3, "status missing"),
        (3, "study missing"),
        (3, "check missing"),
        (3, "get suite missing"),
        (3, "get weights missing"),
        # files that are missing or cannot be read
        (4, "eval geneval show_o_tiny --judge mask2former:missing.pth --limit 1"),
        (4, "eval geneval_long show_o_tiny --judge owlv2:x --data missing"),
        (4, "eval toy show_o_tiny --images missing"),
        (4, "eval toy show_o_tiny --records missing"),
        (4, "edit bagel_tiny --image missing --instruction a"),
        (4, "answer show_o_tiny --image missing --question a"),
        (4, "answer show_o_tiny --image file --question a"),
        (4, "best-of show_o_tiny missing --out out"),
        (4, "best-of show_o_tiny file --out out"),
        (4, "train show_o_tiny data.images=missing"),
        (4, "data check missing"),
        (4, "data view missing"),
        # folders that cannot be written to
        (4, "eval toy show_o_tiny --out file/out"),
        (4, "generate show_o_tiny --prompt a --out file/out"),
        (4, "generate show_o_tiny --prompt a --out file"),
        (4, "best-of show_o_tiny prompts --out file/out"),
        (4, "export show_o_tiny --out file/out"),
        (4, "train show_o_tiny run_dir=file/run"),
        (4, "cache show_o_tiny data.cache=file/cache"),
        (4, "study main --scale 0.01 --out file/out"),
        (4, "demo --scale 0.01 --out file/out"),
        (4, "data view reca.toy_datasets.shapes:unlabeled --out file/out"),
    ],
)
def test_an_error_of_one_kind_has_one_code(code, command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "prompts").write_text("a red circle")
    assert main(shlex.split(command)) == code
    printed = capsys.readouterr().err
    assert "reca: " in printed and "Traceback" not in printed and "[Errno" not in printed


@pytest.mark.parametrize(
    "command",
    [
        "train show_o_tiny run_dir=s3://bucket/out",
        "cache show_o_tiny data.cache=s3://bucket/out",
        "generate show_o_tiny --prompt a --out s3://bucket/out",
        "data view reca.toy_datasets.shapes:unlabeled --out s3://bucket/out",
    ],
)
def test_outputs_are_not_written_to_a_folder_named_like_an_address(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command)) == 4
    printed = capsys.readouterr().err
    assert "s3://bucket/out" in printed and "is an address" in printed and not (tmp_path / "s3:").exists()


def test_an_end_without_shutdown_leaks_no_semaphore():
    """tqdm makes such a lock from Python 3.14 on."""
    code = """
import multiprocessing
from reca import exits
lock = multiprocessing.get_context("forkserver").RLock()
exits.end_now(3)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)  # until the tracker has ended
    assert (done.returncode, done.stderr) == (3, "")
