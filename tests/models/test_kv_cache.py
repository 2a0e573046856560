"""KV caches of transformers models."""

import warnings

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaModel, PreTrainedModel

from reca.models.common.kv_cache import with_cache


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaModel(LlamaConfig(vocab_size=5, **sizes)).eval()


@torch.no_grad()
def test_rows_after_a_cache_are_those_of_the_whole_sequence(model):
    rows, cache = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0)), DynamicCache(config=model.config)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # of an argument that will go
        model(inputs_embeds=rows[:, :4], **with_cache(model, cache))
        behind = model(inputs_embeds=rows[:, 4:], **with_cache(model, cache)).last_hidden_state
    torch.testing.assert_close(behind, model(inputs_embeds=rows).last_hidden_state[:, 4:])


def test_earlier_transformers(model):
    class Earlier(PreTrainedModel):
        def forward(self, input_ids=None, past_key_values=None, use_cache=None):
            raise NotImplementedError

    earlier, cache = Earlier.__new__(Earlier), DynamicCache(config=model.config)
    assert with_cache(earlier, cache) == {"past_key_values": cache, "use_cache": True}
