"""A pass does not walk over all parameters of a model, which takes milliseconds of the host at real depths."""

import pytest
from torch import nn

from reca.models import UMMS
from reca.rng import CounterRNG
from tests.models.contract import batch, shared


@pytest.mark.parametrize("name", UMMS)
def test_a_pass_lists_no_parameters(name, monkeypatch):
    model, listed, members = shared(name), [], nn.Module._named_members

    def counted(*args, **kwargs):
        for member in members(*args, **kwargs):
            listed.append(member[0])
            yield member

    samples = {task: batch(model, task) for task in model.tasks}
    for task, sample in samples.items():
        model(sample, CounterRNG(0))  # transformers' hooks of the first pass
        with monkeypatch.context() as patch:
            patch.setattr(nn.Module, "_named_members", counted)
            model(sample, CounterRNG(0))
        assert len(listed) < 16, task  # a few modules ask for their first parameter's dtype
        listed.clear()
