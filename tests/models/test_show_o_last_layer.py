"""Show-o's last layer on a CPU: computing only what is read changes no number. And words in place of h_v."""

import pytest
import torch

from reca.data.batch import Batch
from reca.demo.pretrain.show_o import with_words
from reca.models.show_o import Adapter, prompt
from reca.rng import CounterRNG
from reca_kernels import IGNORE_INDEX
from tests.models.test_show_o import TEXTS, config


@pytest.fixture(scope="module")
def net():
    return Adapter.load(config()).double()


@pytest.mark.parametrize("task", ["reca", "t2i", "i2t"])
def test_rows_that_are_not_read_change_no_number(net, task):
    texts = TEXTS[task][:3] if task == "reca" else TEXTS[task]
    layout = net.prepare(Batch(task, torch.arange(len(texts)), list(texts)), CounterRNG(0)).layout
    rows = net.config.clip.hidden_size
    h_v = None if task == "t2i" else torch.randn(len(texts), net.sequence()["h_v"], rows, dtype=torch.float64)
    labels = layout.labels.clone()
    if task == "reca":
        labels[:, -5:-2] = 1  # some of the image
    read = labels != IGNORE_INDEX

    def run(**given) -> list[torch.Tensor]:
        net.zero_grad()
        found = net.hidden(layout, h_v, **given)[read]
        found.square().sum().backward()
        return [found.detach(), *(p.grad for p in net.showo.model.layers.parameters())]

    for ours, whole in zip(run(read=read, read_rows=int(read.sum())), run(), strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-9, atol=1e-9)


def test_words_stand_in_place_of_later_h_v_alone(net):
    v = net.vocabulary
    samples = [prompt.i2t_clip([7], [7], v, [], 2) for _ in range(2)]
    layout = with_words(prompt.layout(samples, v), torch.tensor([[11, 12]]), behind=2)
    assert layout.src.tolist() == [[v.mmu, v.soi, -1, -2, v.eoi, 7], [v.mmu, v.soi, 11, 12, v.eoi, 7]]
