"""Show-o with CLIP as released.

Sequences have a fixed length: the prompt is padded to its budget, and padding is computed. Embeddings are looked up and
concatenated. The mask is dense and additive, [B, 1, L, L]. GELU is composed of elementary operators. Logits are
computed for all rows over the whole vocabulary, in fp32, and sliced to the image; cross-entropy covers all image rows
and ignores those that are not masked.
"""

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.step.release.eager import NewGELU
from reca.models.base import LossTerm
from reca.models.show_o.conditioner import conditioner
from reca.models.show_o.loss import Prepared
from reca.models.show_o.model import ShowO
from reca.rng import CounterRNG
from reca_kernels import IGNORE_INDEX


def formulate(adapter: ShowO, checkpointed: bool) -> None:
    """Replace the loss by the released one. It is never checkpointed: the release requests this without effect."""
    adapter.showo.set_attn_implementation("sdpa")
    if adapter.config.phi.hidden_act in ("gelu_new", "gelu_pytorch_tanh"):
        for layer in adapter.showo.model.layers:
            layer.mlp.activation_fn = NewGELU()
    adapter.loss = types.MethodType(loss, adapter)


def loss(self: ShowO, prepared: Prepared, features: dict[str, Any], rng: CounterRNG) -> LossTerm:
    """Return the sum of the cross-entropy over masked codes."""
    v, codes, masked = self.vocabulary, features["codes"], prepared.masked
    image_ids = codes + v.offset
    labels = torch.where(masked, image_ids, IGNORE_INDEX)
    ids, n = prompt_ids(self, prepared), features["h_v"].shape[1]
    ids = torch.cat([ids, torch.where(masked, v.mask, image_ids), ids.new_full((len(ids), 1), v.eoi)], dim=1)
    with torch.set_grad_enabled(conditioner(self, "reca").prompt_requires_grad() and torch.is_grad_enabled()):
        embedded, visual = self.showo.model.embed_tokens(ids), self.mm_projector(features["h_v"])
        embedded = torch.cat([embedded[:, :2], visual.to(embedded.dtype), embedded[:, 2:]], dim=1)
    mask = attention_mask(ids, v.pad, n, codes.shape[1]).to(embedded.dtype)
    logits = self.showo(inputs_embeds=embedded, attention_mask=mask, use_cache=False).logits.float()
    image = logits[:, -1 - codes.shape[1] : -1]
    total = F.cross_entropy(
        image.reshape(-1, image.shape[-1]), labels.reshape(-1), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    return LossTerm.of(total, prepared)


def prompt_ids(self: ShowO, prepared: Prepared) -> Tensor:
    """Return mmu, soi, eoi, bos, text, eos, padding up to the budget, and the soi of the image: [B, budget + 1]."""
    v, budget, layout = self.vocabulary, self.config.max_reca_tokens, prepared.layout
    rows = []
    for ids, spans in zip(layout.src, layout.runs, strict=True):
        first = spans[0].length if spans[0].mode == "pad" else 0
        start, visual, text = spans[-5].length, spans[-4].length, spans[-3].length - 1
        behind = first + start + visual
        kept = torch.cat([ids[first : first + start], ids[behind : behind + text]])
        rows.append(F.pad(kept, (0, budget - len(kept)), value=v.pad))
    return F.pad(torch.stack(rows), (0, 1), value=v.soi).long()


def attention_mask(ids: Tensor, pad: int, visual: int, image: int) -> Tensor:
    """Return the additive mask, [B, 1, L, L]: causal; h_v is visible to all rows, image rows to each other.

    Padding is masked. ids: without the tokens of h_v, which follow the second token.
    """
    length = ids.shape[1] + visual
    place = torch.arange(length, device=ids.device)
    sees = place[:, None] >= place
    sees[:, 2 : 2 + visual] = True
    sees[-1 - image : -1, -1 - image : -1] = True
    padding = ids == pad
    padding = torch.cat([padding[:, :2], padding.new_zeros(len(ids), visual), padding[:, 2:]], dim=1)
    sees = sees[None, None] & ~padding[:, None, None]
    return torch.zeros(sees.shape, device=ids.device).masked_fill(~sees, torch.finfo(torch.float32).min)
