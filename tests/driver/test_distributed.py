"""Ranks over gloo: in fp64 the same steps however they are split, and checkpoints that survive a change of ranks."""

import contextlib
import inspect
import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from reca import checkpoint, distributed
from reca.config.recipe_files import load_recipe
from reca.data.batch import Batch
from reca.eval.errors import EvaluationError
from reca.eval.training import TrainingSuite
from reca.models import UMMS, umm_package
from reca.options.fields import RecipeError
from reca.trainer import Trainer
from reca.training.parallelize import shard
from tests.driver.toy import ToyAdapter, run_toy, weights, write_images, write_recipe

ROOT = Path(__file__).parents[2]
# How a step is split: ranks, how they hold the weights, and the largest micro-batch.
SPLITS = {
    "fsdp_2": (2, "fsdp", None, 3),
    "ddp_2": (2, "ddp", None, 1),
    "hsdp_4": (4, "fsdp", 2, 1),
    "ddp_4": (4, "auto", None, 3),
    "fsdp_3": (3, "fsdp", None, 2),
}
PAIRS = [(umm, name) for umm in UMMS for name in SPLITS if umm == "harmon" or name in ("fsdp_2", "ddp_2", "hsdp_4")]
# 10 samples in micro-batches of 3 or 2, on one rank and on four; 3 samples of another kind, so that one of four ranks
# computes a copy. AdamW with so large an epsilon is smooth: the noise of a gradient near zero stays small.
UNEVEN = (
    "objective.reca.batch_size=10 objective.reca.micro_batch=3 objective.i2t.batch_size=3 objective.i2t.micro_batch=2 "
    "optim.schedule=constant optim.warmup_steps=0 optim.eps=1 optim.lr=0.5 train.steps=2 data.workers=0 log.every=1 "
    "log.gap_every=2 log.tensorboard=false"
).split()
DOUBLE = [*UNEVEN, "train.precision=fp64"]
HALF = {"bagel": [*UNEVEN, "train.precision=bf16", "model.dtype=mixed"], "show_o": [*UNEVEN, "train.precision=bf16"]}
SMOOTH = ["optim.eps=1", "optim.lr=1"]
ODD = [*SMOOTH, "objective.reca.batch_size=7", "ema.half_life=2", "train.precision=fp64"]
EVALUATED = (
    "train.steps=2 data.workers=0 log.tensorboard=false objective.reca.batch_size=4 objective.reca.micro_batch=2 "
    "objective.i2t.batch_size=2 eval.every=2 eval.holdout=5 eval.suite=toy eval.prompts=3 eval.sampling=[steps=2] "
    "log.sample_every=2 log.reconstructions=2"
).split()
MEANS = [*SMOOTH, "objective.mean=micro_batch", "objective.reca.batch_size=7", "train.precision=fp64"]
CAPTIONS = (
    "objective.reca.weight=1 objective.reca.batch_size=4 objective.reca.micro_batch=1 objective.t2i.weight=1 "
    "objective.t2i.batch_size=4 objective.t2i.micro_batch=1 model.caption_drop=0.5 train.steps=2 data.workers=0"
).split()
OTHER = [*SMOOTH, "objective.reca.batch_size=3", "objective.condition=other"]


def released(name: str) -> list[str]:
    """The objective of a released recipe, and one step."""
    objective = asdict(load_recipe(name))["objective"]
    tasks = [
        f"objective.{k}.{key}={objective[k][key]}" for k in ("reca", "i2t") for key in ("batch_size", "micro_batch")
    ]
    return [*tasks, f"objective.mean={objective['mean']}", "train.steps=1", "data.workers=0", "log.every=1"]


def split(name: str) -> tuple[int, list[str]]:
    """The ranks of a split, and its recipe keys."""
    ranks, strategy, shard, micro_batch = SPLITS[name]
    keys = [f"parallel.strategy={strategy}", f"objective.reca.micro_batch={micro_batch}"]
    keys.append(f"parallel.reduce_every_micro_batch={str(name == 'hsdp_4').lower()}")
    if name == "hsdp_4":  # 3 or 2 samples a rank, of which 2 fit into a pass: some ranks compute a copy
        keys.append("objective.reca.max_tokens=110")
    return ranks, [*keys, f"parallel.shard={shard}"] if shard else keys


def jobs(toy: Path, folder: Path) -> list[list]:
    """Toy runs, every UMM on every number of ranks, and the README's command for eight GPUs at a small size."""
    toy = str(toy)
    chained = [*ODD, f"train.init_from={folder}/toy_1"]
    by_ranks: dict[int, list[list]] = {ranks: [] for ranks in (1, 2, 3, 4)}
    by_ranks[1] = [[f"{umm}_1", 1, f"{umm}_tiny", DOUBLE] for umm in UMMS]
    for umm, name in PAIRS:
        ranks, keys = split(name)
        by_ranks[ranks].append([f"{umm}_{name}", ranks, f"{umm}_tiny", [*DOUBLE, *keys]])
    return [
        ["toy_1", 1, toy, ODD],
        ["chained_1", 1, toy, chained],
        ["unclipped_1", 1, toy, [*ODD, "optim.max_grad_norm=null"]],
        ["means_1", 1, toy, MEANS],
        ["other_1", 1, toy, OTHER],
        ["released_1", 1, "show_o_tiny", released("show_o_512")],
        ["single_1", 1, "show_o_tiny", UNEVEN],
        *[[f"{umm}_half_1", 1, f"{umm}_tiny", keys] for umm, keys in HALF.items()],
        ["captions_1", 1, "bagel_tiny", CAPTIONS],
        ["evaluated_1", 1, "show_o_tiny", EVALUATED],
        *by_ranks[1],
        ["grown", 1, toy, [*ODD, "train.steps=2"]],
        ["toy_2", 2, toy, [*ODD, "parallel.strategy=fsdp"]],
        *[[f"{umm}_half_2", 2, f"{umm}_tiny", [*keys, "parallel.strategy=fsdp"]] for umm, keys in HALF.items()],
        ["captions_2", 2, "bagel_tiny", CAPTIONS],
        ["evaluated_2", 2, "show_o_tiny", [*EVALUATED, "parallel.strategy=fsdp"]],
        ["chained_2", 2, toy, [*chained, "parallel.strategy=fsdp"]],
        ["means_2", 2, toy, [*MEANS, "parallel.strategy=fsdp"]],
        ["unclipped_2", 2, toy, [*ODD, "parallel.strategy=fsdp", "optim.max_grad_norm=null"]],
        ["halves_2", 2, toy, [*ODD, "parallel.strategy=fsdp", "train.steps=3"]],
        ["halves_2", 2, toy, [*ODD, "parallel.strategy=fsdp"]],
        ["parts", 2, toy, [*ODD, "parallel.strategy=fsdp", "train.steps=2"]],
        ["grown", 2, toy, [*ODD, "parallel.strategy=fsdp", "train.steps=4"]],
        *by_ranks[2],
        ["parts", 3, toy, [*ODD, "parallel.strategy=ddp", "train.steps=4"]],
        ["recomputed_3", 3, "show_o_tiny", [*UNEVEN, "train.activation_checkpointing=true", "parallel.strategy=fsdp"]],
        *by_ranks[3],
        ["other_4", 4, toy, OTHER],
        ["toy_4", 4, toy, [*ODD, "parallel.shard=2"]],
        ["grown", 4, toy, [*ODD, "parallel.shard=2"]],
        *by_ranks[4],
        ["released_8", 8, "show_o_tiny", released("show_o_512")],
        ["parts", 1, toy, ODD],
    ]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")])}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The folder of all runs, which are made by one launch."""
    folder = tmp_path_factory.mktemp("runs")
    toy = write_recipe(folder, write_images(folder / "images"))
    command = [sys.executable, str(ROOT / "tests/driver/launch_ranks.py"), str(folder), json.dumps(jobs(toy, folder))]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (folder / "stderr").write_text(done.stderr)
    return folder


def final(run_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(run_dir / "final.pt")


def same(a: dict, b: dict, atol: float) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=0, atol=atol, msg=name)


def log(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]


def metrics(run_dir: Path) -> list[dict]:
    """Those of every step that do not depend on who computes it."""
    lines = [line for line in log(run_dir) if "loss" in line]
    return [{k: v for k, v in line.items() if k.endswith(("loss", "/weight", "grad_norm"))} for line in lines]


@pytest.mark.parametrize(("umm", "name"), PAIRS)
def test_every_model_makes_the_same_steps_however_they_are_split(runs, umm, name):
    """In fp64, to 1e-12: what is left is the order of sums."""
    one, other = runs / f"{umm}_1", runs / f"{umm}_{name}"
    assert {value.dtype for value in final(other).values() if value.is_floating_point()} == {torch.float64}
    same(final(one), final(other), atol=1e-12)
    for a, b in zip(metrics(one), metrics(other), strict=True):
        assert b == pytest.approx(a, rel=1e-12)
    assert "reca/gap" in [line for line in log(other) if "loss" in line][-1]


@pytest.mark.parametrize("umm", HALF)
def test_blocks_of_shards_compute_in_bf16(runs, umm):
    """What they are given is cast: tensors, and nothing inside an attention plan."""
    for a, b in zip(metrics(runs / f"{umm}_half_1"), metrics(runs / f"{umm}_half_2"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=0.02)


@pytest.mark.parametrize("umm", UMMS)
def test_the_step_is_large_beside_the_tolerance(runs, umm):
    made, recipe = final(runs / f"{umm}_1"), load_recipe(f"{umm}_tiny")
    start = umm_package(umm).Adapter.load(recipe.model).named_parameters()
    assert max((made[key] - value.detach()).abs().max() for key, value in start) > 0.02


def test_a_rank_whose_captions_are_all_dropped_beside_one_whose_are_not(runs):
    """Of BAGEL, in fp32: whole and frozen experts, and a pass without a graph before the one with."""
    same(final(runs / "captions_1"), final(runs / "captions_2"), atol=2e-6)


def test_fp64_makes_the_steps_of_fp32(runs):
    for a, b in zip(metrics(runs / "show_o_1"), metrics(runs / "single_1"), strict=True):
        assert b == pytest.approx(a, rel=1e-5) and b != a


def test_the_release_of_show_o_on_eight_ranks(runs):
    """10 samples in micro-batches of 2 and 1: it starts, counts every sample once, and says what it changes."""
    one, eight = runs / "released_1", runs / "released_8"
    (a,), (b,) = metrics(one), metrics(eight)
    for name in ("reca", "i2t"):
        assert b[f"{name}/weight"] == a[f"{name}/weight"]
        assert b[f"{name}/loss"] == pytest.approx(a[f"{name}/loss"], rel=0.01)  # of means that depend on the split
    said = [line["warning"] for line in log(eight) if "warning" in line]
    assert any("reca 2 or 1 instead of 2; i2t 2 or 1 instead of 2" in text for text in said)
    assert not any("instead of" in line.get("warning", "") for line in log(one))


def test_means_of_the_same_micro_batches_do_not_depend_on_the_ranks(runs):
    """7 samples in 2, 2, 2 and 1, on one rank and on two."""
    one, two = runs / "means_1", runs / "means_2"
    same(final(one), final(two), atol=1e-12)
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert b == pytest.approx(a, rel=1e-12)


def test_activation_checkpointing_on_ranks_of_unequal_micro_batches(runs):
    same(final(runs / "single_1"), final(runs / "recomputed_3"), atol=2e-6)


def test_h_v_of_another_sample_does_not_depend_on_the_ranks(runs):
    """The control, 3 samples on 4 ranks: each h_v comes from a sample of another rank, and one rank computes a copy."""
    same(final(runs / "other_1"), final(runs / "other_4"), atol=2e-6)


def test_no_block_returns_a_view(runs):
    """An in-place operation on one would lose the hook by which FSDP2 gathers the block, of which torch warns."""
    assert "returned a view" not in (runs / "stderr").read_text()


def test_runs_go_on_with_another_number_of_ranks(runs):
    """Two steps on each number, 7 samples each: 2 ranks of shards, 3 of replicas, 1; or 1, 2 of shards, 4 of both."""
    for name in ("parts", "grown"):
        same(final(runs / "toy_1"), final(runs / name), atol=1e-12)


def test_runs_go_on_bit_for_bit_with_as_many_ranks(runs):
    same(final(runs / "toy_2"), final(runs / "halves_2"), atol=0)


def test_ranks_that_share_the_weights_evaluate_together(runs):
    """Three prompts and five held-out images on two ranks: both make as many passes, to the figures of one."""
    one, two = ([line for line in log(runs / f"evaluated_{n}") if "evaluation" in line] for n in (1, 2))
    assert [line["step"] for line in one] == [line["step"] for line in two] == [0, 2]
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys() >= {"holdout/loss", "holdout/gap", "toy/score", "samples/contrast"}
        assert b["holdout/loss"] == pytest.approx(a["holdout/loss"], rel=1e-4)
    assert (runs / "evaluated_2/samples/000002_reconstructions.png").is_file()
    assert len(list((runs / "evaluated_2/eval/training/toy/000002").rglob("*.png"))) == 3


def averages(run_dir: Path) -> dict[str, torch.Tensor]:
    """The EMA in the newest checkpoint of a run."""
    found = ToyAdapter()
    checkpoint.load_weights(checkpoint.find_valid(run_dir), found, ema=True)
    return dict(found.named_parameters())


def test_the_average_does_not_depend_on_the_ranks(runs):
    """Bit for bit where a run goes on with as many, and whatever the ranks are within the noise of sums."""
    one, two, halves, parts = (averages(runs / name) for name in ("toy_1", "toy_2", "halves_2", "parts"))
    assert all(torch.equal(value, halves[name]) for name, value in two.items())
    same(one, two, atol=2e-6)
    same(one, parts, atol=2e-6)
    assert not torch.allclose(one["layers.0.weight"], final(runs / "toy_1")["layers.0.weight"].float(), atol=1e-3)


def test_two_ranks_and_replicas_of_shards(runs):
    """HSDP: four ranks in two replicas of two shards."""
    for name in ("toy_2", "toy_4"):
        same(final(runs / "toy_1"), final(runs / name), atol=1e-12)


def test_ranks_start_from_another_run(runs):
    same(final(runs / "chained_1"), final(runs / "chained_2"), atol=1e-12)
    started, once = (final(runs / name)["layers.0.weight"] for name in ("chained_1", "toy_1"))
    assert not torch.allclose(started, once, atol=1e-3)


def test_the_norm_of_shards_without_clipping(runs):
    one, two = runs / "unclipped_1", runs / "unclipped_2"
    same(final(one), final(two), atol=1e-12)
    norms = [[line["grad_norm"] for line in metrics(folder)] for folder in (one, two)]
    assert len(norms[0]) > 2 and norms[1] == pytest.approx(norms[0], rel=1e-5)


def test_torchrun_starts_the_command(tmp_path):
    """As the README does."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "reca"]
    command += ["train", "show_o_tiny", *released("show_o_512"), "train.threads=1", f"run_dir={tmp_path}/run"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "1 step done" in done.stdout and len(metrics(tmp_path / "run")) == 1


@pytest.fixture
def alone(monkeypatch):
    """The device of a process group of one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    one = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    monkeypatch.setattr(os, "environ", os.environ | one | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    yield distributed.initialize(30)
    distributed.shut_down()


def minutes(device: torch.device, group: dist.ProcessGroup | None = None) -> float:
    """How long a collective of a group may take."""
    backend = (group or dist.group.WORLD)._get_backend(device)
    return backend.options._timeout.total_seconds() / 60


@pytest.mark.filterwarnings("error::FutureWarning")  # torch 2.15 deprecates the private function of earlier ones
def test_collectives_may_take_less_time_after_the_first_step(alone):
    """In groups of training. Others, such as that of checkpoints, keep their limit."""
    shards, other = distributed.mesh(alone, 1, 1).get_group("shard"), dist.new_group()
    assert minutes(alone) == 30 and distributed.mesh(alone, 1, 1).get_group("shard") is shards
    before = minutes(alone, other)
    distributed.set_timeout(5, alone)
    assert [minutes(alone, group) for group in (None, shards, other)] == [5, 5, before]
    distributed.shut_down()
    distributed.set_timeout(5, alone)  # without a group, nothing


@pytest.mark.parametrize(("start", "steps", "limit"), [(9, 4, 4), (3, 4, 3)])
def test_a_run_gives_its_first_step_more_time(start, steps, limit, alone, recipe):
    """It compiles. Also the first step of a run that goes on does."""
    keys = f"parallel.timeout_minutes={start}", f"parallel.step_timeout_minutes={steps}"
    for end, expected in ((2, [start, limit]), (5, [start, limit, limit])):
        trainer = Trainer(recipe(f"train.steps={end}", *keys), ToyAdapter())
        seen, loss = [], trainer.adapter.loss
        trainer.adapter.loss = lambda *given, loss=loss, seen=seen: seen.append(minutes(alone)) or loss(*given)
        trainer.run()
        assert seen[:: len(seen) // len(expected)] == expected


def test_a_model_that_a_run_has_sharded_is_not_sharded_again(alone, recipe, tmp_path):
    """torch's own error was an AssertionError with the whole model as its text."""
    model = run_toy(recipe("train.steps=1")).adapter
    with pytest.raises(RecipeError, match=r"sharded over the processes of an earlier run.*as train\.init_from"):
        Trainer(recipe("train.steps=1", f"run_dir={tmp_path}/next"), model)


def test_a_process_joins_a_second_group_after_the_first(alone):
    """As runs of one script do: nothing of the first group may be used again."""
    for _ in range(2):
        assert distributed.initialize(30) == alone and distributed.is_joined()
        sum_of_one = torch.ones(1)
        dist.all_reduce(sum_of_one, group=distributed.mesh(alone, 1, 1).get_group("shard"))
        assert sum_of_one == 1 and distributed.all_gather("own", distributed.gloo_group()) == ["own"]
        distributed.shut_down()
        assert not distributed.is_joined() and distributed.gloo_group() is None and distributed.world_size() == 1


def test_a_run_after_another_in_the_same_group_has_its_own_timeout(alone):
    distributed.set_timeout(5, alone)
    shards, threads = distributed.mesh(alone, 1, 1), distributed.gloo_group()
    assert distributed.initialize(45) == alone and minutes(alone) == 45
    assert distributed.mesh(alone, 1, 1) is shards and distributed.gloo_group() is threads


def test_numbers_of_the_host_do_not_pass_the_gpu(alone, monkeypatch):
    """Training on GPUs has a group for them, whose collectives do not wait for kernels."""
    host, reduce, groups = distributed._gloo("host", timedelta(minutes=1)), dist.all_reduce, []

    def recorded(value, *options, group=None):
        groups.append((value.device.type, group))
        return reduce(value, *options, group=group)

    monkeypatch.setattr(dist, "all_reduce", recorded)
    assert distributed.max_over_ranks([3, 1]) == [3, 1]
    assert distributed.any_rank(True) and not distributed.any_rank(False)
    assert groups == [("cpu", host)] * 3


def test_a_checkpoint_in_the_background_has_a_group_of_its_own(alone, tmp_path, monkeypatch):
    """Ranks may reach its collectives and those of training in different orders: in one group they would not meet."""
    adapter, found = ToyAdapter(), []
    taken = checkpoint.snapshot({"step": 1}, adapter, torch.optim.AdamW(adapter.layers.parameters()))

    def recording(collective):
        def recorded(*given, **options):
            found.append(inspect.signature(collective).bind(*given, **options).arguments.get("group"))
            return collective(*given, **options)

        return recorded

    for name in ("all_gather_object", "gather_object", "scatter_object_list", "broadcast_object_list", "all_reduce"):
        monkeypatch.setattr(dist, name, recording(getattr(dist, name)))
    (tmp_path / "checkpoints").mkdir()
    writer = checkpoint.BackgroundWriter(tmp_path, checkpoint.Keep(1), lambda: False)
    assert writer.start(taken) is None and writer.wait() == checkpoint.latest(tmp_path)
    own = distributed.gloo_group()
    assert own is not None and own is not dist.group.WORLD and len(found) > 5 and all(group is own for group in found)


def test_a_checkpoint_after_a_pass_without_gradients(alone, tmp_path):
    """FSDP2 keeps what is in no block gathered then, and the optimizer has no such tensors."""
    adapter = ToyAdapter()
    shard(adapter, 1, alone, "fp32")
    optimizer = torch.optim.AdamW(adapter.parameters())
    pixels = list(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
    with torch.no_grad():
        adapter.encode(Batch("reca", torch.arange(2), ["a"] * 2, gen=pixels, und=None))
    gathered = [name for name, parameter in adapter.named_parameters() if not isinstance(parameter, DTensor)]
    assert gathered == ["tower.weight", "tower.bias"]
    folder, again = checkpoint.save(tmp_path, {"step": 1}, adapter, optimizer, checkpoint.Keep(1)), ToyAdapter(seed=1)
    checkpoint.load(folder, again, torch.optim.AdamW(again.parameters()))
    same(weights(ToyAdapter()), weights(again), atol=0)


def test_ranks_wait_for_a_judge_longer_than_for_a_step(alone, tmp_path, monkeypatch):
    keys = ["eval.every=1", "eval.suite=toy", "eval.prompts=2"]
    (tmp_path / "run").mkdir()
    suite = TrainingSuite(load_recipe(write_recipe(tmp_path, tmp_path), keys), tmp_path / "run")
    gather, waited = dist.all_gather_object, []

    def judge(*_):
        monkeypatch.setattr(dist, "all_gather_object", gathered)
        raise ValueError("the judge is slow and fails")

    def gathered(values, value, group=None):
        waited.append(minutes(alone, group))
        return gather(values, value, group)

    monkeypatch.setattr("reca.eval.training.judge_and_score", judge)
    for step in range(2):
        distributed.set_timeout(5, alone)
        with pytest.raises(EvaluationError, match="slow and fails"):
            suite.run(ToyAdapter(), step, alone, contextlib.nullcontext())
        monkeypatch.setattr(dist, "all_gather_object", gather)
    assert waited == [60 * distributed.HOURS] * 2


TORCHRUN = {"TORCHELASTIC_RUN_ID": "1", "RANK": "11", "WORLD_SIZE": "12", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}


def restore_group_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo at the end that torch counts groups that failed, and names later ones differently."""
    world = dist.distributed_c10d._world
    monkeypatch.setattr(world, "group_count", world.group_count)


@pytest.mark.parametrize(("rank", "said"), [(0, "1/2 clients joined"), (1, "The client socket has timed out")])
def test_a_rank_whose_peer_does_not_come_says_so(rank, said, monkeypatch):
    """As where another machine has too few GPUs, or the wrong address of rank 0; it was a traceback of torch."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    given = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    restore_group_count(monkeypatch)
    with pytest.raises(
        RecipeError, match=f"rank {rank} could not join the 2 processes of this run at 127.0.0.1:{port} "
    ) as raised:
        distributed.initialize(0.001)
    assert said in str(raised.value) and "MASTER_ADDR" in str(raised.value)


HERE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"RANK": "0"}, "RANK=0, WORLD_SIZE=(not set), MASTER_ADDR=(not set), MASTER_PORT=(not set): start it with"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"}, "MASTER_PORT=x: start it"),
        ({"RANK": "8", "WORLD_SIZE": "2"} | HERE, "(RANK must be from 0 to below WORLD_SIZE, which counts"),
        ({"RANK": "-1", "WORLD_SIZE": "2"} | HERE, "RANK=-1, WORLD_SIZE=2, MASTER_ADDR=127.0.0.1"),
        ({"RANK": "a", "WORLD_SIZE": "2"} | HERE, "RANK=a, WORLD_SIZE=2"),
    ],
)
def test_variables_of_a_launcher_that_no_group_has_are_named(given, said, monkeypatch):
    """A rank beyond their number, as where WORLD_SIZE counts the machines, waited for others until the timeout."""
    monkeypatch.setattr(os, "environ", given)
    restore_group_count(monkeypatch)
    with pytest.raises(RecipeError, match=re.escape(said)):
        distributed.initialize(1)


@pytest.mark.parametrize(
    ("given", "warned"),
    [
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3"}, "SLURM_STEP_NUM_TASKS=8, but RANK is not set"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE=2, but RANK"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4, but RANK"),
        ({"SLURM_NTASKS": "8"}, ""),  # of a job, in whose script this is the only process
        ({"SLURM_STEP_NUM_TASKS": "1", "WORLD_SIZE": "", "RANK": ""}, ""),
        ({"SLURM_STEP_NUM_TASKS": "8", "TORCHELASTIC_RUN_ID": "1"}, ""),
    ],
)
def test_a_process_that_trains_alone_beside_others_says_so(given, warned, monkeypatch, caplog):
    """As with `srun -n 8 reca train`: each of them trained a run of its own."""
    monkeypatch.setattr(os, "environ", given)
    distributed.initialize(1)
    assert (warned in caplog.text) if warned else not caplog.text


def test_every_process_has_a_gpu_of_its_own(monkeypatch):
    def gpu(visible: int, **environment: str) -> int:
        monkeypatch.setattr(os, "environ", environment)
        return distributed._gpu(visible)

    assert gpu(8) == 0
    assert gpu(4, **TORCHRUN) == 3
    assert gpu(8, RANK="11", SLURM_LOCALID="3") == 3
    assert gpu(1, RANK="11", SLURM_LOCALID="3") == 0  # srun --gpus-per-task=1
    assert gpu(8, RANK="11") == gpu(8, RANK="11", LOCAL_RANK="", LOCAL_WORLD_SIZE="8(x2)") == 3
    for visible in (1, 2):
        with pytest.raises(RecipeError, match=f"4 processes on a machine with {visible} GPUs"):
            gpu(visible, **TORCHRUN)
    assert gpu(1, RANK="11", LOCAL_WORLD_SIZE="4") == 0
    with pytest.raises(RecipeError, match="4 processes on a machine with 2 GPUs"):
        gpu(2, RANK="11", LOCAL_WORLD_SIZE="4")


def test_a_rank_with_a_gpu_joins_with_it(monkeypatch):
    """By NCCL, and with a gloo group for numbers of the host."""
    joined, groups, chosen = {}, [], []
    monkeypatch.setattr(os, "environ", TORCHRUN)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(dist, "is_initialized", lambda: bool(joined))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **given: joined.update(given, backend=backend))
    monkeypatch.setattr(distributed, "_gloo", lambda use, timeout: groups.append(use))
    device = distributed.initialize(30)
    assert chosen == [device] == [torch.device("cuda", 3)]
    assert joined == {"backend": "nccl", "timeout": timedelta(minutes=30), "device_id": device}
    assert sorted(groups) == ["host", "threads"]
