"""Compiled blocks of every model: how often they are compiled, and whether they do the same."""

import pytest
import torch
from torch._dynamo.utils import counters

from reca.compiled_blocks import compile_blocks, wanted
from reca.config import TrainConfig
from reca.models import UMMS
from reca.recompute import checkpoint_activations
from tests.models.contract import TEXTS, batch, load, loss

# Graphs of all blocks of a model, for every task and size: each kind of block, in parts around its attention, and once
# more for a single sample, for inputs without a gradient, and in BAGEL for a prompt of no rows.
GRAPHS = {"show_o": 12, "harmon": 8, "open_uni": 6, "bagel": 22, "janus": 12}
SIZES = [(0, 1, 2, 3), (1, 2, 3), (2,)]
OTHERS = [(3, 1), (2, 0, 3), (1,), (0, 3, 2, 1)]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("umm", UMMS)
def test_new_layouts_do_not_compile_again(umm):
    """Nor do other sizes of a micro-batch, with blocks that are run again in the backward pass."""
    model = load(umm).train()
    compile_blocks(model, "eager")
    checkpoint_activations(model, TrainConfig(activation_checkpointing=True))

    def graphs(sizes):
        for rows in sizes:
            for task in sorted(model.tasks & TEXTS.keys()):
                sample = loss(model, batch(model, task, rows))
                if sample.requires_grad:  # a task that what RECA trains has no part in
                    sample.backward()
        return counters["stats"]["unique_graphs"]

    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        made, more = graphs(SIZES), graphs(OTHERS)
    print(f"{umm}: {made} graphs, then {more - made} more")
    assert 0 < made <= GRAPHS[umm] and more == made


def test_no_graph_is_made_without_a_gradient():
    model = load("janus").train()
    compile_blocks(model, "eager")
    with torch.no_grad():
        loss(model, batch(model, "reca"))
    model.generate(["a red square"], [0])
    assert not counters["stats"]["unique_graphs"]


def test_on_for_gpus_by_default(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr("reca.compiled_blocks.has_triton", lambda: True)
    assert wanted(TrainConfig(), gpu) and not wanted(TrainConfig(), cpu)
    assert not wanted(TrainConfig(deterministic=True), gpu) and wanted(TrainConfig(compile=True), cpu)
    assert not wanted(TrainConfig(compile=False), gpu)
    monkeypatch.setattr("reca.compiled_blocks.has_triton", lambda: False)
    assert not wanted(TrainConfig(), gpu)
