"""Sizes of the Qwen2 language model that Harmon, OpenUni and BAGEL are built on."""

from dataclasses import dataclass
from typing import Any

from transformers import Qwen2Config

from reca.options.fields import config_field, count


@dataclass
class Qwen2Sizes:
    """Recipe keys of a Qwen2. The defaults are those of Qwen2.5-1.5B."""

    hidden_size: int = count(1536, "width of the Qwen2 language model")
    num_hidden_layers: int = count(28, "its layers")
    num_attention_heads: int = count(12, "its query heads")
    num_key_value_heads: int = count(2, "its key and value heads")
    intermediate_size: int = count(8960, "width of its MLPs")
    vocab_size: int = count(151936, "size of its embedding table, which may be larger than the tokenizer's vocabulary")
    rms_norm_eps: float = config_field(1e-6, "epsilon of its RMSNorms", above=0)
    rope_theta: float = config_field(1e6, "base of its rotary frequencies", above=0)


def qwen2_config(sizes: Qwen2Sizes, **options: Any) -> Qwen2Config:
    """Return the configuration of a Qwen2 in transformers. options: further arguments of Qwen2Config."""
    return Qwen2Config(
        hidden_size=sizes.hidden_size,
        num_hidden_layers=sizes.num_hidden_layers,
        num_attention_heads=sizes.num_attention_heads,
        num_key_value_heads=sizes.num_key_value_heads,
        intermediate_size=sizes.intermediate_size,
        vocab_size=sizes.vocab_size,
        rms_norm_eps=sizes.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": sizes.rope_theta},
        **options,
    )
