"""FSDP2 over gloo: the same update for any split of it, and checkpoints that survive a change of ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def launch(ranks: int, recipe: Path, *overrides: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [str(ROOT / "tests/driver/launch_toy.py"), str(recipe), *overrides]
    path = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


def final(run_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(run_dir / "final.pt")


def same(a: dict, b: dict, atol: float) -> None:
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=0, atol=atol, msg=name)


@pytest.fixture
def path(recipe, tmp_path):
    recipe()
    return tmp_path / "toy.yaml"


def test_one_rank_accumulating_equals_two_ranks(path, tmp_path):
    launch(1, path, f"run_dir={tmp_path}/one")
    launch(2, path, f"run_dir={tmp_path}/two")
    same(final(tmp_path / "one"), final(tmp_path / "two"), atol=2e-6)


def test_two_ranks_resume_exactly_and_reshard_to_one(path, tmp_path):
    launch(2, path, f"run_dir={tmp_path}/whole")
    launch(2, path, f"run_dir={tmp_path}/parts", "train.updates=3")
    launch(2, path, f"run_dir={tmp_path}/parts", "train.updates=5")
    launch(1, path, f"run_dir={tmp_path}/parts")
    same(final(tmp_path / "whole"), final(tmp_path / "parts"), atol=2e-6)


def test_replicas_of_shards(path, tmp_path):
    """HSDP: four ranks in two replicas of two shards."""
    launch(1, path, f"run_dir={tmp_path}/one")
    launch(4, path, f"run_dir={tmp_path}/four", "parallel.shard=2")
    same(final(tmp_path / "one"), final(tmp_path / "four"), atol=2e-6)


def test_ranks_start_from_another_run(path, tmp_path):
    launch(1, path, f"run_dir={tmp_path}/before")
    chained = f"train.init_from={tmp_path}/before"
    launch(1, path, f"run_dir={tmp_path}/one", chained)
    launch(2, path, f"run_dir={tmp_path}/two", chained)
    same(final(tmp_path / "one"), final(tmp_path / "two"), atol=2e-6)
    started, once = (final(tmp_path / name)["layers.0.weight"] for name in ("one", "before"))
    assert not torch.allclose(started, once, atol=1e-3)


def test_the_norm_of_shards_without_clipping(path, tmp_path):
    for ranks, name in ((1, "one"), (2, "two")):
        launch(ranks, path, f"run_dir={tmp_path}/{name}", "optim.clip=null", "log.every=1")
    same(final(tmp_path / "one"), final(tmp_path / "two"), atol=2e-6)
    one, two = (
        [json.loads(line)["grad_norm"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert len(one) > 2 and two == pytest.approx(one, rel=1e-5)
