"""Janus-Pro's losses: cross-entropy of an image's codes under teacher forcing (reca, t2i), and of replies (i2t)."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from reca.data.batch import Batch
from reca.models import base
from reca.models.base import LossTerm
from reca.models.janus import prompt
from reca.models.janus.modules import Network
from reca.models.janus.prompt import Layout, Segment
from reca.rng import CounterRNG, RandomStream
from reca_kernels import IGNORE_INDEX, TextSegment, VisualSegment, masked_linear_cross_entropy


@dataclass(frozen=True)
class Prepared(base.Prepared):
    """A batch's sequences. weight: how many codes, or tokens of replies, are predicted."""

    layout: Layout


def prepare(net: Network, batch: Batch, rng: CounterRNG) -> Prepared:
    """Lay out the sequences of a batch and draw which of them lose their condition."""
    v, config, codes = net.vocabulary, net.config, net.image_tokens
    if batch.task == "i2t":
        layout = prompt.layout([_conversation(net, turns) for turns in batch.text], v)
        weight = int((layout.labels != IGNORE_INDEX).sum())
        return Prepared(batch.task, rng.seed, float(weight), layout)
    make, share = (_reca, config.reca_drop) if batch.task == "reca" else (_t2i, config.caption_drop)
    dropped = (rng.uniform(RandomStream.CONDITION_DROP, batch.host_ids)[:, 0] < share).tolist()
    layout = prompt.layout([[*make(net, text), VisualSegment(codes - 1)] for text in batch.text], v)
    return Prepared(batch.task, rng.seed, float(codes * len(batch)), prompt.drop(layout, dropped, codes - 1, v))


def compute_loss(net: Network, prepared: Prepared, features: dict[str, Any]) -> LossTerm:
    """Sum the cross-entropy over codes, or over the tokens of replies."""
    if prepared.task == "i2t":
        total = reply_loss(net, prepared, features["h_v"])
    else:
        total = image_loss(net, prepared, features["codes"], features.get("h_v"))
    return LossTerm.of(total, prepared)


def image_loss(net: Network, prepared: Prepared, codes: Tensor, h_v: Tensor | None) -> Tensor:  # codes int64 [B, N]
    """Sum the cross-entropy of codes; every row from boi to the last code but one predicts the code behind it."""
    hidden = net.hidden(prepared.layout, h_v, net.embed_codes(codes[:, :-1]))[:, -codes.shape[1] :]
    head = net.gen_head.vision_head
    return masked_linear_cross_entropy(
        net.gen_head.features(hidden).flatten(0, 1),
        head.weight,
        codes.flatten(),
        head.bias,
        reduction="sum",
        max_labelled=codes.numel(),
    )


def reply_loss(net: Network, prepared: Prepared, h_v: Tensor) -> Tensor:
    """Sum the next-token cross-entropy of replies; logits exist for labelled rows only."""
    return masked_linear_cross_entropy(
        net.hidden(prepared.layout, h_v)[:, :-1].flatten(0, 1),
        net.language_model.lm_head.weight,
        prepared.layout.labels[:, 1:].flatten(),
        reduction="sum",
        max_labelled=int(prepared.weight),
    )


def _reca(net: Network, text: str) -> list[Segment]:
    config, v = net.config, net.vocabulary
    most = config.max_length - net.image_tokens
    before, image, asked = prompt.with_image(net.tokens, text, v, net.hv_tokens, config.reca_system_prompt, most)
    assert isinstance(asked, TextSegment)
    return [before, image, TextSegment([*asked.ids, v.boi])]


def _t2i(net: Network, text: str) -> list[Segment]:
    return [TextSegment(prompt.caption(net.tokens, text, net.vocabulary, net.config.max_length - net.image_tokens + 1))]


def _conversation(net: Network, turns: Any) -> list[Segment]:
    config = net.config
    return prompt.conversation(
        net.tokens, turns, net.vocabulary, net.hv_tokens, config.system_prompt, config.max_length
    )
