"""What the UMMs' losses of answers have in common."""

import io
from importlib import import_module

import pytest
import torch
from PIL import Image

from reca.config import load_recipe
from reca.data.batch import Batch
from reca.data.pixels import make_view
from reca.models import UMMS, umm_package
from reca.rng import CounterRNG
from reca.toy_world import understood


@pytest.mark.parametrize("umm", UMMS)
def test_answers_are_counted_on_the_host(umm, monkeypatch):
    """A GPU that has to be asked how many there are is waited for."""
    model = umm_package(umm).Adapter.load(load_recipe(f"{umm}_tiny").model).eval()
    source, view = understood("i2t"), model.views("i2t").und
    samples = [source[i] for i in range(3)]
    und = [make_view(Image.open(io.BytesIO(sample.image)), view) for sample in samples]
    adapter = import_module(f"reca.models.{umm}.adapter")
    counts, loss = [], adapter.masked_linear_cross_entropy

    def recorded(*args, max_labelled=None, **kwargs):
        counts.append(max_labelled)
        return loss(*args, max_labelled=max_labelled, **kwargs)

    monkeypatch.setattr(adapter, "masked_linear_cross_entropy", recorded)
    term = model(Batch("i2t", torch.arange(3), [sample.text for sample in samples], und=und), CounterRNG(0))
    assert counts == [int(term.weight)] and counts[0] > 3 * 3
