"""The dry run on one batch: every tiny recipe learns it, and what cannot is told the reason."""

import hashlib
import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch

from reca import cli, exits
from reca.commands.overfit import overfit
from reca.config.recipe import Recipe
from reca.config.recipe_files import load_recipe
from reca.models import UMMS
from tests.driver.forks import exit_codes, fork_ranks, in_new_process
from tests.driver.toy import ToyAdapter, run_toy

SMALL = [f"objective.{task}.{key}=2" for task in ("reca", "i2t", "t2i") for key in ("batch_size", "micro_batch")]
SMALL += ["data.workers=0", "train.threads=1"]
SLOW = {"harmon": (40, ["optim.lr=0.01"]), "open_uni": (30, [])}


@pytest.mark.parametrize("umm", UMMS)
def test_every_tiny_recipe_learns_its_batch(umm, tmp_path):
    steps, keys = SLOW.get(umm, (15, []))
    found = overfit(load_recipe(f"{umm}_tiny", [*SMALL, *keys, f"run_dir={tmp_path}/run"]), steps, 0.6)
    assert found.reached and not found.fault(), found
    assert all(norm > 0 for norm in found.gradients.values()) and not list(tmp_path.iterdir())


def contents(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_run_that_is_there_stays_as_it_is(recipe):
    r = recipe("checkpoint.every=2")
    run_dir = run_toy(r).run_dir
    before = contents(run_dir.parent)
    killed = run_dir.parent / ".run.overfit-12"
    killed.mkdir()
    (killed / "status.json").write_text("{}")
    found = overfit(r, 40, 0.9, ToyAdapter())
    assert found.reached and contents(run_dir.parent) == before
    assert found.losses[1:] != found.losses[:-1] and len(found.losses) == 41


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["optim.lr=0"], "the learning rate is 0: set optim.lr"),
        (["optim.lr=1e-9"], "because the learning rate is too small: 6 steps of optim.lr=1e-09 change weights"),
        (["optim.lr=300", "optim.max_grad_norm=null"], r"the loss rises .* optim.lr=300 is too large"),
        (["optim.lr=1e-4"], r"the loss falls, but not far enough: at this rate it needs about \d+ steps"),
    ],
)
def test_a_learning_rate_that_does_not_do(recipe, keys, said):
    found = overfit(recipe(*keys), 6, 0.5, ToyAdapter())
    assert not found.reached
    assert re.search(said, found.fault()), found.fault()


class Broken(ToyAdapter):
    """Loses its gradient, its loss, or the part of its loss that depends on weights."""

    def __init__(self, how: str):
        super().__init__()
        self.how, self.calls = how, 0

    def roles(self):
        return super().roles() | {"layers.1.weight": "bridge", "layers.1.bias": "bridge"}

    trainable_roles = frozenset({"gen_head", "bridge"})

    def loss(self, prepared, features, rng):
        self.calls += 1
        term = super().loss(prepared, features, rng)
        if self.how == "nan" or (self.how == "nan later" and self.calls > 12):
            return term._replace(sum=term.sum * float("nan"))
        if self.how == "no gradient":
            return term._replace(sum=0 * term.sum + term.sum.detach())
        if self.how == "negative":
            return term._replace(sum=term.sum - 100 * term.weight)
        if self.how == "weak":
            return term._replace(sum=1e-3 * term.sum + term.weight)
        if self.how == "one role":
            return term._replace(sum=self.layers[1](features["h_v"]).square().sum())
        return term


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("nan", "the loss of reca is not finite before any update: look at the data"),
        ("nan later", r"loss or gradient became non-finite after 2 steps"),
        ("no gradient", "the gradient is zero in gen_head and bridge: no loss depends on its trained parameters"),
        ("negative", "and the target is a fraction of it: it must be positive"),
        ("weak", "the loss is constant although weights change: it hardly depends on what is trained"),
    ],
)
def test_a_model_that_does_not_learn(recipe, how, said):
    found = overfit(recipe(), 6, 0.5, Broken(how))
    assert said in found.fault() and "nan%" not in " ".join(found.describe())


def test_a_role_that_no_loss_reaches_is_noted_where_the_rest_learns(recipe):
    found = overfit(recipe("optim.lr=0.01"), 60, 0.9, Broken("one role"))
    assert found.reached and not found.fault()
    assert found.describe()[-1].startswith("note       the gradient is zero in gen_head")


def test_what_cannot_be_trained_at_all(tmp_path):
    keys = [*SMALL, f"run_dir={tmp_path}/run", "train.frozen=[*]"]
    with pytest.raises(ValueError, match="nothing is trained"):
        overfit(load_recipe("show_o_tiny", keys), 5)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="--overfit must be at least 2"):
        overfit(load_recipe("show_o_tiny", keys), 1)


def write_gradients(cases: dict[str, tuple[int, Recipe]], folder: Path) -> None:
    """Write the gradients of every case and rank, from forks of a process that computes none itself."""

    def work(rank: int, name: str, recipe: Recipe) -> None:
        torch.set_num_threads(1)  # a forked process lacks the other threads of OpenMP, and would wait for them
        found = overfit(recipe, 2, 0.9, ToyAdapter()).gradients
        (folder / f"{name}_{rank}.json").write_text(json.dumps(found))

    for name, (ranks, recipe) in cases.items():
        assert exit_codes(fork_ranks(ranks, partial(work, name=name, recipe=recipe))) == [0] * ranks


def test_the_gradients_of_ranks_are_those_of_one(recipe, tmp_path):
    strategies = {"ddp": (2, "strategy=ddp"), "fsdp": (2, "strategy=fsdp"), "shard": (4, "shard=2")}
    several = {
        name: (ranks, recipe(f"parallel.{key}", "parallel.timeout_minutes=1"))
        for name, (ranks, key) in strategies.items()
    }
    assert in_new_process(write_gradients, {"one": (1, recipe()), **several}, tmp_path) == 0
    one = json.loads((tmp_path / "one_0.json").read_text())
    assert one
    for name, (ranks, _) in several.items():
        for rank in range(ranks):
            assert json.loads((tmp_path / f"{name}_{rank}.json").read_text()) == pytest.approx(one, rel=1e-5), name


def test_a_fused_backward_pass_has_no_gradients_to_show(recipe):
    r = recipe("optim.fused_backward=true", "optim.max_grad_norm=null", "objective.reca.micro_batch=8")
    found = overfit(r, 40, 0.9, ToyAdapter())
    assert found.reached and found.gradients == {}


def test_the_command(tmp_path, capsys):
    given = ["train", "show_o_tiny", *SMALL, f"run_dir={tmp_path}/a/run", "--overfit", "8"]
    assert cli.main([*given, "--overfit-to", "0.9"]) == 0
    out = capsys.readouterr().out
    assert "after 8 steps on the same batch" in out and "gradients  shared_lm" in out and "tasks      reca " in out
    assert cli.main([*given, "--overfit-to", "0.01"]) == exits.NOT_LEARNING
    assert "reca: the dry run did not learn its batch: the loss falls" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
