"""SigLIP's transformer encoder: BAGEL's vision tower and OpenUni's connector."""

from typing import Protocol

from transformers import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipEncoder


class EncoderSizes(Protocol):
    """Recipe keys that a SigLIP encoder is built from."""

    num_attention_heads: int
    intermediate_size: int


def siglip_encoder(sizes: EncoderSizes, *, width: int, layers: int, eps: float = 1e-6) -> SiglipEncoder:
    """Build a bidirectional encoder of `layers` layers. width: hidden size; eps: epsilon of its LayerNorms."""
    return SiglipEncoder(
        SiglipVisionConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=sizes.num_attention_heads,
            intermediate_size=sizes.intermediate_size,
            hidden_act="gelu_pytorch_tanh",
            attn_implementation="sdpa",
            layer_norm_eps=eps,
        )
    )
