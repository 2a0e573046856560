"""Weights that are cast once a step: the same bits as autocast's, in every model, and fewer bytes."""

import weakref

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from reca import distributed, objective
from reca.config.recipe import ObjectiveConfig, TrainConfig
from reca.config.recipe_files import load_recipe
from reca.models import UMMS
from reca.precision import autocast
from reca.rng import CounterRNG
from reca.training import half_weights, lora
from reca.training.compiled_blocks import compile_blocks
from reca.training.parallelize import shard
from reca.training.recompute import checkpoint_activations
from tests.models.contract import batch, load

CAST = torch.ops.aten._to_copy.default


class Casts(TorchDispatchMode):
    """Counts casts of parameters, and the bytes that they read and write."""

    def __init__(self, model):
        super().__init__()
        self.shapes = {p.shape for block in model.blocks() for p in block.parameters() if p.ndim > 1}
        self.count = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is CAST and args[0].dtype != out.dtype and args[0].shape in self.shapes:
            self.count += 1
            self.bytes += args[0].nbytes + out.nbytes
        return out


def step(model, context, holding):
    """Gradients of a step of three passes. holding: with copies for all of them."""
    model.zero_grad(set_to_none=True)
    work = {"reca": [batch(model, "reca", rows) for rows in ((0, 1), (2, 3), (1, 3))]}
    with half_weights.held(model, context, 3, cast_once=holding):
        objective.backward(model, work, ObjectiveConfig(), 0, context)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("umm", UMMS)
def test_gradients_are_those_of_autocast(umm):
    model, context, seen = load(umm), autocast("bf16", torch.device("cpu")), []
    before = dict(model.named_parameters())
    for holding in (False, True):
        with Casts(model) as casts:
            seen.append((step(model, context, holding), casts))
    (wanted, plain), (found, held) = seen
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert gradient.dtype == torch.float32 and torch.equal(found[name], gradient), name
    assert all(p is before[name] for name, p in model.named_parameters())
    print(f"{umm}: {plain.count} casts of weights and gradients, {plain.bytes} bytes; {held.count}, {held.bytes}")
    assert held.count < plain.count / 2 and held.bytes < plain.bytes / 2


@pytest.mark.parametrize("dora", [False, True])
def test_gradients_with_lora_are_those_of_autocast(dora):
    """DoRA reads the weights of its layers for the norms of their rows, in fp32."""
    model, context = load("show_o"), autocast("bf16", torch.device("cpu"))
    lora.choose_trained(model, load_recipe("show_o_tiny", ["lora.rank=4", f"lora.dora={str(dora).lower()}"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:  # which is zero at first
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) / 8)
    wanted, found = (step(model, context, holding) for holding in (False, True))
    assert found.keys() == wanted.keys()
    assert not [name for name, gradient in wanted.items() if not torch.equal(found[name], gradient)]


class Alive(TorchDispatchMode):
    """Keeps count of the copies of blocks' trained matrices: how many each has had, and which are there now."""

    def __init__(self, model):
        super().__init__()
        blocks = [p for block in model.blocks() for p in block.parameters() if p.requires_grad and p.ndim > 1]
        self.casts = dict.fromkeys((p.data_ptr() for p in blocks), 0)
        self.copies = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is CAST and out.dtype == torch.bfloat16 and args[0].data_ptr() in self.casts:
            self.casts[args[0].data_ptr()] += 1
            self.copies.append(weakref.ref(out.untyped_storage()))
        return out

    def now(self):
        return sum(copy() is not None for copy in self.copies)


@pytest.mark.parametrize("umm", UMMS)
def test_blocks_that_are_computed_again_keep_no_copies(umm):
    """Nor is a bit of the gradient another, of one pass or of several."""
    model, context = load(umm), autocast("bf16", torch.device("cpu"))
    wanted = step(model, context, True)
    with Alive(model) as plain, context:
        model(batch(model, "reca"), CounterRNG(0))
        assert plain.now() >= len(plain.casts) / 2
    checkpoint_activations(model, TrainConfig(activation_checkpointing=True))
    found = step(model, context, False)
    assert found.keys() == wanted.keys()
    assert not [name for name, gradient in wanted.items() if not torch.equal(found[name], gradient)]
    with Alive(model) as alive, context:
        model(batch(model, "reca"), CounterRNG(0))
        assert alive.copies and bool(alive.now()) == model.repeats_blocks() == (umm == "harmon")


@pytest.mark.parametrize("umm", [*UMMS, "bagel vae"])
@pytest.mark.parametrize("trained", ["by default", "as a whole"])
def test_a_model_knows_whether_its_blocks_run_twice(umm, trained):
    model, most = load(umm), 0
    if trained == "as a whole":
        for block in model.blocks():
            block.requires_grad_(True)
    for task in model.tasks:
        with Alive(model) as alive, autocast("bf16", torch.device("cpu")):
            torch.set_autocast_cache_enabled(False)
            try:
                model(batch(model, task), CounterRNG(0))
            finally:
                torch.set_autocast_cache_enabled(True)
        most = max(most, *alive.casts.values())
    assert most == (2 if model.repeats_blocks() else 1)


def test_nothing_is_held_in_fp32_or_for_one_pass():
    model = load("janus")
    weights = list(model.parameters())
    for context, passes in ((autocast("fp32", torch.device("cpu")), 3), (autocast("bf16", torch.device("cpu")), 1)):
        with half_weights.held(model, context, passes):
            assert all(a is b for a, b in zip(model.parameters(), weights, strict=True))


def test_weights_are_back_after_an_error():
    model, context = load("janus"), autocast("bf16", torch.device("cpu"))
    weights = list(model.parameters())
    with pytest.raises(RuntimeError, match="broken"), half_weights.held(model, context, 2):
        raise RuntimeError("broken")
    assert all(a is b for a, b in zip(model.parameters(), weights, strict=True))


def test_copies_of_a_new_step_do_not_compile_again():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, context, graphs = load("janus"), autocast("bf16", torch.device("cpu")), []
    compile_blocks(model, "eager")
    for _ in range(3):
        step(model, context, True)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[2] > 0
    torch._dynamo.reset()


@pytest.fixture
def alone():
    """A process group of this process."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    distributed.shut_down()


class Copies(TorchDispatchMode):
    """Counts the matrices that FSDP2 casts, each of which it has as a row."""

    def __init__(self, matrices):
        super().__init__()
        self.sizes, self.count = {p.numel() for p in matrices}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count += func is CAST and out.dtype == torch.bfloat16 and out.ndim == 1 and out.numel() in self.sizes
        return out


@pytest.mark.parametrize("umm", ["harmon", "bagel"])  # a block that runs twice in a pass; blocks of two experts
def test_whole_replicas_of_fsdp2_are_cast_once_a_step(umm, alone, monkeypatch):
    seen = []
    for keeping in (False, True):
        model, context = load(umm), autocast("bf16", torch.device("cpu"))
        shard(model, 1, torch.device("cpu"), "bf16")
        assert model.has_whole_replicas
        monkeypatch.setattr(model, "has_whole_replicas", keeping)
        matrices = [p for block in model.blocks() for p in block.parameters() if p.requires_grad and p.ndim > 1]
        with Copies(matrices) as copies:
            gradients = {name: gradient.to_local() for name, gradient in step(model, context, True).items()}
        seen.append((gradients, copies.count))
        for block in model.blocks():  # nothing of a step is left to the next, whose weights are others
            assert all(isinstance(p, DTensor) for p in block.parameters() if p.requires_grad)
    (wanted, plain), (found, kept) = seen
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], g) for name, g in wanted.items())
    print(f"{umm}: {plain} casts of {len(matrices)} matrices in three passes; kept, {kept}")
    assert kept == len(matrices) and plain >= 6 * kept  # of each pass in both directions
