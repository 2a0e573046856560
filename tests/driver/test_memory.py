"""Predicted peaks against what torch's own allocator says that it hands out, in real training steps.

On CPUs that is torch.profiler's record of every allocation and release of the CPU allocator, those within kernels too.
"""

import contextlib
import gc
import itertools
import re
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor

from reca import exits, objective, units
from reca.config.recipe_files import load_recipe, recipe_names
from reca.estimate import held, memory
from reca.estimate.meta_model import build_meta
from reca.models import UMMS, umm_package
from reca.optim import freeze, gradient_norm, make_optimizer
from reca.options.fields import RecipeError
from reca.precision import autocast
from reca.processes import own_process
from reca.training import half_weights
from reca.training.parallelize import shard
from reca.training.recompute import checkpoint_activations
from reca_kernels import dispatch, native
from reca_kernels.attention import sdpa

FEW = ["objective.reca.batch_size=16", "objective.i2t.batch_size=16"]
SMALL = [*FEW, "objective.reca.micro_batch=8", "objective.i2t.micro_batch=8"]
RECOMPUTED = ["train.activation_checkpointing=true", "train.precision=bf16"]
HARMON = ["objective.reca.batch_size=8", "objective.i2t.batch_size=8"]  # whose activations are many times its weights
HARMON_SMALL = [*HARMON, "objective.reca.micro_batch=4", "objective.i2t.micro_batch=4"]
SELECTIVE = ["train.activation_checkpointing=selective", "train.precision=bf16"]
CASES = {
    "show_o": ("show_o_tiny", FEW),
    "harmon, several passes": ("harmon_tiny", [*HARMON_SMALL, *RECOMPUTED]),
    "open_uni, several passes": ("open_uni_tiny", [*SMALL, "train.precision=bf16"]),
    "show_o, every second block": ("show_o_tiny", [*FEW, "train.activation_checkpointing=2", "train.precision=bf16"]),
    "harmon, selective": ("harmon_tiny", [*HARMON, *SELECTIVE, "model.mar.head_depth=1"]),
    "bagel, several passes": ("bagel_tiny", [*SMALL, *RECOMPUTED]),
    "bagel, cast in every pass": ("bagel_tiny", [*SMALL, *RECOMPUTED, "train.cast_once=false"]),
    "bagel, scored images": (
        "bagel_tiny", ["objective.reca.weight=0", "objective.srum.weight=1", "objective.srum.batch_size=8"],
    ),
    "bagel, passes of 400 tokens": ("bagel_tiny", ["objective.reca.batch_size=24", "objective.reca.max_tokens=400"]),
    "show_o, passes of 400 tokens": (
        "show_o_tiny", ["objective.i2t.weight=0", "objective.reca.batch_size=24", "objective.reca.max_tokens=400"],
    ),
    # Narrow: as many tokens and classes as a real one, so that activations, logits and their gradient are most of it.
    "narrow": (
        "show_o_tiny",
        [
            "model.image_size=64", "model.phi.hidden_size=48", "model.phi.intermediate_size=64",
            "model.patches.entries=4096", "objective.reca.batch_size=8", "objective.reca.micro_batch=8",
            "objective.i2t.weight=0", "train.precision=bf16",
        ],
    ),
}  # fmt: skip


def model_of(recipe, device="cpu", ranks=1):
    adapter = umm_package(recipe.umm).Adapter.load(recipe.model, device)
    freeze(adapter, recipe.train.roles, recipe.train.frozen)
    checkpoint_activations(adapter, recipe.train)
    if ranks > 1:
        shard(adapter, ranks, torch.device(device), recipe.train.precision)
    return adapter


def bytes_of(tensors) -> int:
    return sum(getattr(x, "_local_tensor", x).untyped_storage().nbytes() for x in tensors)


class RealSteps:
    """Training steps of a recipe, each with one draw of the batches that the prediction is made with."""

    def __init__(self, recipe, adapter, device="cpu", ranks=1):
        self.recipe, self.adapter, self.optimizer = recipe, adapter, make_optimizer(adapter, recipe.optim)
        self.context = autocast(recipe.train.precision, torch.device(device))
        adapter.train()
        nothing = contextlib.nullcontext()
        self.batches = {t: memory._batches(adapter, recipe, t, ranks, nothing) for t in recipe.active_tasks()}
        self.passes = {t: memory._passes(getattr(recipe.objective, t), ranks, mine) for t, mine in self.batches.items()}
        for mine in self.batches.values():
            for batch in mine:
                batch.prepared = batch.prepared.to(device)
        self.draws = max(map(len, self.batches.values()))

    def step(self, draw: int) -> None:
        work = {t: [mine[min(draw, len(mine) - 1)]] * self.passes[t] for t, mine in self.batches.items()}
        passes, cast_once = sum(self.passes.values()), self.recipe.train.cast_once
        with half_weights.held(self.adapter, self.context, passes, cast_once):
            objective.backward(self.adapter, work, self.recipe.objective, self.recipe.train.seed, self.context)
        gradient_norm(self.adapter, self.recipe.optim.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def pixels(self) -> int:
        return sum(
            self.passes[t] * sum(x.numel() for x in (*(mine[0].gen or ()), *(mine[0].und or ())))
            for t, mine in self.batches.items()
        )

    def before(self) -> int:
        moments = [x for state in self.optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
        return bytes_of((*self.adapter.parameters(), *self.adapter.buffers(), *moments)) + self.pixels()


def measured(recipe, monkeypatch, ranks: int = 1) -> int:
    """The peak on a CPU, by torch.profiler.

    Attention runs by autograd, as fake tensors and GPUs have it; a CPU's own form needs less memory.
    """
    monkeypatch.setattr(sdpa, "usable", lambda *_: False)
    steps = RealSteps(recipe, model_of(recipe, ranks=ranks), ranks=ranks)
    steps.step(0)
    most = 0
    for draw in range(steps.draws):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            steps.step(draw)
        events = profile.profiler.kineto_results.events()
        changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        most = max(most, *itertools.accumulate(size for _, size in changes))
    return steps.before() + most


@pytest.mark.parametrize("case", CASES)
def test_peak_is_that_of_a_real_step(case, monkeypatch):
    recipe = load_recipe(*CASES[case])
    predicted, real = memory.predict(recipe, gpu=False).total, measured(recipe, monkeypatch)
    print(f"{case}: predicted {predicted:,}, measured {real:,}, {predicted / real:.4f}")
    assert predicted == pytest.approx(real, rel=0.1)


SHARDED = ["parallel.strategy=fsdp", *RECOMPUTED, "objective.reca.micro_batch=16", "objective.i2t.micro_batch=16"]


def test_peak_of_the_reference_implementation(monkeypatch):
    """Its gradients of indexing are added up in place, which fake tensors do out of place."""
    monkeypatch.setenv("RECA_BACKEND", "reference")
    recipe = load_recipe(*CASES["narrow"])
    assert memory.predict(recipe, gpu=False).total == pytest.approx(measured(recipe, monkeypatch), rel=0.01)


def test_peak_is_that_of_a_real_step_of_two_ranks(monkeypatch):
    """With collectives that do nothing: with gloo the peak depends on when its threads let go of their copies."""
    recipe = load_recipe("show_o_tiny", SHARDED)
    predicted = memory.predict(recipe, 2, gpu=False).total
    with memory._ranks(2, 2):
        real = measured(recipe, monkeypatch, 2)
    print(f"two ranks: predicted {predicted:,}, measured {real:,}, {predicted / real:.4f}")
    assert predicted == pytest.approx(real, rel=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_peak_is_that_of_a_real_step_on_a_gpu(case):
    """Untried: this project has had no GPU since it was written.

    cuBLAS keeps a workspace, 32 MiB on Hopper and more than such a model: see the environment in full_gpu_run.
    """
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    for dtype in (torch.float32, torch.bfloat16):
        torch.addmm(*torch.ones(3, 16, 16, device="cuda", dtype=dtype))
    gc.collect()
    before = torch.cuda.memory_allocated()
    recipe = load_recipe(*CASES[case])
    steps = RealSteps(recipe, model_of(recipe, "cuda"), "cuda")
    for mine in steps.batches.values():
        mine[:] = [batch.to(torch.device("cuda")) for batch in mine]
    steps.step(0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    for draw in range(steps.draws):
        steps.step(draw)
    real = torch.cuda.max_memory_allocated() - before
    assert memory.predict(recipe).total == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize(
    ("keys", "moments", "ema"),
    [
        ([], 8, 0),
        (["optim.moments=bf16"], 4, 0),
        (["optim.offload=true"], 0, 0),
        (["ema.half_life=9"], 8, 4),
    ],
)
def test_moments_and_averages_by_their_type_and_place(keys, moments, ema):
    """Bytes per trained weight."""
    recipe = load_recipe("open_uni_tiny", ["objective.reca.batch_size=2", *keys])
    adapter, _ = memory.build_meta(recipe)
    trained = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
    for found in (memory.peak_of(recipe, ["reca"], 1, 8, gpu=False), held.held(adapter, recipe, 1, 8)):
        assert (found.moments, found.ema) == pytest.approx((moments * trained, ema * trained), rel=0.01)


def test_another_process_predicts_the_same_and_raises_the_same():
    recipe = load_recipe("show_o_tiny", ["objective.i2t.weight=0", "objective.reca.batch_size=2"])
    assert own_process.call(memory.predict, recipe) == memory.predict(recipe)
    with pytest.raises(RecipeError, match="no_such"):
        own_process.call(umm_package, "no_such")


@pytest.mark.parametrize("umm", ["harmon", "show_o"])
def test_kernels_of_a_gpu_are_predicted_where_none_are_built(umm, monkeypatch):
    """A machine without a compiler has no native module; its CPU would run the reference implementation."""
    recipe = load_recipe(f"{umm}_tiny", [*FEW, "train.precision=bf16"])
    expected = memory.predict(recipe)
    monkeypatch.setattr(native, "module", None)
    monkeypatch.setattr(native, "missing", "not built")
    monkeypatch.setattr(dispatch, "_decide", dispatch._decide.__wrapped__)  # without the choices made before
    assert memory.predict(recipe) == expected
    monkeypatch.setenv("RECA_BACKEND", "reference")
    assert memory.predict(recipe).total > expected.total


def test_a_process_that_is_killed_has_an_error_that_says_so():
    with pytest.raises(own_process.Killed, match="memory") as error:
        own_process.call(signal.raise_signal, signal.SIGKILL)
    assert exits.expected(error.value) == exits.RECIPE


@pytest.mark.parametrize("umm", UMMS)
def test_a_template_that_only_the_stand_in_tokenizer_refuses(umm, tmp_path):
    """Of many question marks each is a token there; a real tokenizer has one for several."""
    (tmp_path / "templates.txt").write_text("what is this" + "?" * 20000)
    recipe = load_recipe(f"{umm}_tiny", [f"data.templates={tmp_path}/templates.txt"])
    adapter, fake = build_meta(recipe)
    assert memory.largest_sample(adapter, recipe, "reca", fake) > 0


def test_sharding_takes_less_however_small_the_activations():
    """Full-size tensors from which DTensor propagates shapes have no memory in a real run either."""
    keys = ["objective.i2t.weight=0", "objective.reca.batch_size=8", "objective.reca.micro_batch=1"]
    recipe = load_recipe("show_o_tiny", [*keys, "parallel.strategy=fsdp"])
    one, eight = (memory.predict(recipe, ranks, gpu=False) for ranks in (1, 8))
    assert eight.total < one.total
    assert eight.moments < one.moments / 7


TABLE = re.findall(r"^\| `(\w+)` \| (.*) \|$", (Path(__file__).parents[2] / "docs" / "memory.md").read_text(), re.M)


def test_the_table_of_cards_has_every_recipe():
    assert {name for name, _ in TABLE} == {name for name in recipe_names() if not name.endswith("_tiny")}
    assert all(re.match(r"1 \(\d+\.\d\d GiB\)", cells.split(" | ")[1]) for _, cells in TABLE)  # train.fit, 80 GiB


@pytest.mark.parametrize("name", ["show_o_512", "janus_pro_1b"])
def test_the_table_of_cards_is_what_is_predicted(name):
    """Of recipes that take one card as they are; the others are made in the same way, and take minutes."""
    written = dict(TABLE)[name].split(" | ")[0]
    need = memory.needed(memory.predict(load_recipe(name)).total)
    assert written == f"1 ({units.size(need)})"


def test_all_of_bagel_is_trained_on_one_card():
    """With the settings that the table of cards names, none of which changes a result."""
    size, keys = dict(TABLE)["bagel_7b"].split(" | ")[1].split("): ")
    recipe = load_recipe("bagel_7b", keys.split(" "))
    assert recipe.active_tasks() == ["reca"] and not recipe.lora.rank
    need = memory.needed(memory.predict(recipe).total)
    assert size == f"1 ({units.size(need)}" and need <= 80 << 30
