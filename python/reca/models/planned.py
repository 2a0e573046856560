"""Attention by a plan in place of a mask, for language models of transformers: attn_implementation=PLANNED, plan=..."""

from torch import Tensor, nn
from transformers import AttentionInterface

from reca_kernels import AttentionPlan, attention

PLANNED = "reca_planned"


def _planned(
    module: nn.Module,
    query: Tensor,  # [B, H, L, d]
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # None: transformers makes masks only for implementations that it knows
    *,
    plan: AttentionPlan | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: object,
) -> tuple[Tensor, None]:
    if plan is None:
        raise ValueError(f"{type(module).__name__} attends by a plan; call the model with plan=attention_plan(...)")
    if dropout:
        raise ValueError(f"{type(module).__name__} drops {dropout:g} of its attention, which a planned one cannot")
    rows = (x.transpose(1, 2) for x in (query, key, value))
    return attention(*rows, plan, scale=scaling), None


AttentionInterface.register(PLANNED, _planned)
