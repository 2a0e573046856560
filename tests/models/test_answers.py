"""What the UMMs' losses of answers have in common."""

import io

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from reca.config.recipe_files import load_recipe
from reca.data.batch import Batch
from reca.data.transforms import make_view
from reca.models import UMMS, umm_package
from reca.models.common.greedy import greedy_tokens
from reca.rng import CounterRNG
from reca.toy_datasets.shapes import understood
from reca_kernels import masked_linear_cross_entropy
from tests.models.fake_gpu import modules_of


def test_decoding_stops_when_every_sequence_has_ended():
    """Sequences end at different steps, and one that has ended goes on until the last has."""
    script = torch.tensor([[3, 1, 4, 4, 4], [5, 5, 5, 1, 4]])  # 1 is the end
    steps = iter(F.one_hot(script.T, 6).float())
    assert torch.equal(greedy_tokens(lambda _: next(steps), 5, eos=1), script[:, :4])
    steps = iter(F.one_hot(script.T, 6).float())
    assert torch.equal(greedy_tokens(lambda _: next(steps), 3, eos=1), script[:, :3])


@pytest.mark.parametrize("umm", UMMS)
def test_answers_are_counted_on_the_host(umm, monkeypatch):
    """A GPU that has to be asked how many there are is waited for."""
    model = umm_package(umm).Adapter.load(load_recipe(f"{umm}_tiny").model).eval()
    source, view = understood("i2t"), model.views("i2t").und
    samples = [source[i] for i in range(3)]
    und = [make_view(Image.open(io.BytesIO(sample.image)), view) for sample in samples]
    counts, loss, name = [], masked_linear_cross_entropy, "masked_linear_cross_entropy"

    def recorded(*args, max_labelled=None, **kwargs):
        counts.append(max_labelled)
        return loss(*args, max_labelled=max_labelled, **kwargs)

    for module in modules_of(umm):
        if name in vars(module):
            monkeypatch.setattr(module, name, recorded)
    term = model(Batch("i2t", torch.arange(3), [sample.text for sample in samples], und=und), CounterRNG(0))
    assert counts == [int(term.weight)] and counts[0] > 3 * 3
