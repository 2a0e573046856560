"""KV caches of transformers models."""

import itertools
import warnings

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaModel, PreTrainedModel

from reca.models.common import planned
from reca.models.common.kv_cache import ROOM, PromptLayer, decoding_cache, with_cache
from reca_kernels import AttentionSpan, attention_plan


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


@torch.no_grad()
def test_a_cache_for_decoding_copies_earlier_rows_only_when_its_memory_is_full(model):
    cache, rows = decoding_cache(model), torch.randn(2, 2 * ROOM, 8, generator=torch.Generator().manual_seed(0))
    places, behind = [], []
    for start, stop in [(0, 4), *((i, i + 1) for i in range(4, 2 * ROOM))]:
        behind.append(model(inputs_embeds=rows[:, start:stop], **with_cache(model, cache)).last_hidden_state)
        places.append(cache.layers[0].keys.data_ptr())
    assert sum(a != b for a, b in itertools.pairwise(places)) == 1
    torch.testing.assert_close(torch.cat(behind, 1), model(inputs_embeds=rows).last_hidden_state)


@torch.no_grad()
@pytest.mark.parametrize("key_heads", [4, 2])
def test_a_new_token_attends_to_all_rows_but_padding_and_makes_no_plan(monkeypatch, key_heads):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4}
    chosen = {"num_key_value_heads": key_heads, "attn_implementation": planned.PLANNED}
    uneven = LlamaModel(LlamaConfig(vocab_size=5, **sizes, **chosen)).eval()
    rows, plans = torch.randn(2, 7, 16), []
    monkeypatch.setattr(planned, "attention_plan", lambda *a, **k: plans.append(a) or attention_plan(*a, **k))
    samples = [(AttentionSpan(3, "pad"), AttentionSpan(1)), (AttentionSpan(4),)]
    positions = torch.tensor([[0, 0, 0, 0], [0, 1, 2, 3]])
    advance = planned.Continuation(uneven, rows[:, :4], positions, samples)
    found = [advance(None), *(advance(rows[:, i : i + 1]) for i in range(4, 7))]
    assert len(plans) == 1
    for number, first in enumerate((3, 0)):
        length = 7 - first
        alone = uneven(
            inputs_embeds=rows[number : number + 1, first:],
            position_ids=torch.arange(length)[None],
            plan=attention_plan([[AttentionSpan(length)]]),
        ).last_hidden_state[0, -4:]
        torch.testing.assert_close(torch.stack([hidden[number] for hidden in found]), alone)


def test_prompts_alone_are_kept():
    """Not the rows behind them, which would be most of the memory where an image follows a short prompt."""
    layer, rows = PromptLayer(), torch.arange(14.0).view(1, 1, 7, 2)
    layer.update(rows[:, :, :3], -rows[:, :, :3])
    for _ in range(2):
        keys, values = layer.update(rows[:, :, 3:], -rows[:, :, 3:])
        assert torch.equal(keys, rows) and torch.equal(values, -rows)
        assert layer.get_seq_length() == 3 and layer.keys.untyped_storage().nbytes() == rows[:, :, :3].nbytes


@torch.no_grad()
def test_tokens_behind_cached_prompts_go_on_from_each_ones_last_position():
    """Without spans and positions they are causal, and the padding before a shorter prompt is not read."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaModel(LlamaConfig(vocab_size=5, **sizes, attn_implementation=planned.CAUSAL)).eval()
    rows, lengths = torch.randn(2, 7, 8), (4, 1)
    positions = torch.tensor([[0, 1, 2, 3], [0, 0, 0, 0]])
    prompts = planned.CachedPrompts(model, rows[:, :4], positions, planned.padded(lengths, 4))
    for _ in range(2):
        behind = prompts(rows[:, 4:])
        for number, length in enumerate(lengths):
            alone = model(inputs_embeds=rows[number : number + 1, 4 - length :]).last_hidden_state
            torch.testing.assert_close(behind[number], alone[0, -3:])


def test_planned_attention_without_a_plan_or_with_dropout_says_so():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=5, **sizes, attn_implementation=planned.PLANNED, attention_dropout=0.5)
    model, rows = LlamaModel(config).train(), torch.zeros(1, 3, 8)
    with pytest.raises(ValueError, match="LlamaAttention needs an attention plan; pass plan="):
        model(inputs_embeds=rows)
    with pytest.raises(ValueError, match="LlamaAttention has attention dropout 0.5; .* set it to 0"):
        model(inputs_embeds=rows, plan=attention_plan([[AttentionSpan(3)]]))


def test_padding_may_be_on_either_side():
    pad, text = AttentionSpan(2, "pad"), AttentionSpan(1)
    assert planned.padded([1, 3], 3) == [(pad, text), (AttentionSpan(3),)]
    assert planned.padded([1, 3], 3, "right") == [(text, pad), (AttentionSpan(3),)]
