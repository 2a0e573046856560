"""The loader's threads prepare batches for the loss: once each, with the draws of their task, in order."""

import itertools
import threading
from dataclasses import dataclass, replace

import pytest
import torch
from PIL import Image

from reca.data.batch import Batch, task_rng
from reca.data.config import DataConfig
from reca.data.loader import open_loader
from reca.data.views import View, Views
from reca.models.base import Adapter, LossTerm, Prepared


@pytest.fixture
def folder(tmp_path):
    for i in range(12):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i:02d}.png")
    return tmp_path


def batches(folder, prepare, workers, n=6, **options):
    data = DataConfig(images=str(folder), workers=workers, decoder="pillow")
    loader = open_loader(data, "reca", Views(gen=View(4), und=None), seed=7, micro_batch=2, prepare=prepare, **options)
    try:
        return list(itertools.islice(iter(loader), n))
    finally:
        loader.close()


@dataclass(frozen=True)
class Ids(Prepared):
    ids: torch.Tensor
    thread: str


def prepare(batch: Batch, rng) -> Ids:
    return Ids(batch.task, rng.seed, float(len(batch)), batch.host_ids, threading.current_thread().name)


@pytest.mark.parametrize("workers", [0, 1, 2, 8])
@pytest.mark.parametrize("neighbours", [False, True])
def test_every_batch_is_prepared_in_its_order(folder, workers, neighbours):
    """With one thread too, though a batch waits for its samples."""
    for number, batch in enumerate(batches(folder, prepare, workers, neighbours=neighbours)):
        assert batch.prepared.ids.tolist() == batch.sample_ids.tolist() == [2 * number, 2 * number + 1]
        assert batch.prepared.seed == task_rng(7, "reca").seed and batch.prepared.weight == 2.0
        assert (batch.prepared.thread == threading.main_thread().name) == (workers == 0)
        assert (batch.neighbour is not None) == neighbours


@pytest.mark.parametrize("workers", [0, 2])
def test_what_prepare_raises_is_raised_to_the_reader(folder, workers):
    def fails(batch, rng):
        raise ValueError("a template has 9 tokens")

    with pytest.raises(ValueError, match="a template has 9 tokens"):
        batches(folder, fails, workers)


def test_without_prepare_there_is_none(folder):
    assert all(batch.prepared is None for batch in batches(folder, None, 2))


def test_what_is_prepared_follows_its_batch_and_no_other():
    batch = Batch("reca", torch.arange(2), ["a", "b"])
    batch.prepared = prepare(batch, task_rng(0, "reca"))
    assert batch.to("meta").prepared.ids.is_meta and not batch.prepared.ids.is_meta
    assert replace(batch, sample_ids=torch.arange(2, 4)).prepared is None


class Counting(Adapter):
    """Prepares, and says what it was given."""

    condition_keys = ()

    def __init__(self):
        super().__init__()
        self.calls = []

    def prepare(self, batch, rng):
        self.calls.append(rng.seed)
        return prepare(batch, rng)

    def loss(self, prepared, features, rng):
        return LossTerm.of(torch.tensor(float(prepared.seed)), prepared)


def test_other_draws_are_prepared_anew():
    """A batch of the loader's seed, evaluated with another: masks and noise must not come from two seeds."""
    model, batch, own = Counting(), Batch("reca", torch.arange(2), ["a", "b"], features={}), task_rng(0, "reca")
    batch.prepared = prepare(batch, own)
    assert model(batch, own).weight == 2 and model.calls == []
    other = task_rng(1, "reca")
    model(batch, other)
    assert model.calls == [other.seed] and batch.prepared.seed == own.seed
