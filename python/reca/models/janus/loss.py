"""Janus-Pro's losses: cross-entropy on an image's codes with teacher forcing (reca, t2i), and on replies (i2t)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from reca.data.batch import Batch
from reca.models import base
from reca.models.base import LossTerm
from reca.models.common.inference import check_lengths
from reca.models.janus import prompt
from reca.models.janus.modules import Network, SharedLlama
from reca.models.janus.prompt import Layout, Segment
from reca.models.token_loss import token_loss
from reca.rng import CounterRNG, RandomStream
from reca_kernels import IGNORE_INDEX, TextSegment, VisualSegment


@dataclass(frozen=True)
class Prepared(base.Prepared):
    """A batch's sequences. weight: number of predicted codes, or of labelled tokens of replies."""

    layout: Layout

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.layout.lengths


def prepare(net: Network, batch: Batch, rng: CounterRNG) -> Prepared:
    """Lay out the sequences of a batch and draw which conditions are dropped."""
    v, config, codes = net.vocabulary, net.config, net.image_tokens
    if batch.task == "i2t":
        layout = prompt.layout([_conversation(net, turns) for turns in batch.text], v)
        weight = int((layout.labels != IGNORE_INDEX).sum())
        return Prepared(batch.task, rng.seed, float(weight), layout)
    make, share = (reca_prompt, config.reca_drop) if batch.task == "reca" else (_t2i, config.caption_drop)
    dropped = (rng.uniform(RandomStream.CONDITION_DROP, batch.host_ids)[:, 0] < share).tolist()
    layout = prompt.layout([[*make(net, text), VisualSegment(codes - 1)] for text in batch.text], v)
    return Prepared(batch.task, rng.seed, float(codes * len(batch)), prompt.drop(layout, dropped, codes - 1, v))


def compute_loss(net: Network, prepared: Prepared, features: dict[str, Any]) -> LossTerm:
    """Compute the sum of the cross-entropy over codes, or over labelled tokens of replies."""
    if prepared.task == "i2t":
        return reply_loss(net, prepared, features["h_v"])
    return image_loss(net, prepared, features["codes"], features.get("h_v"))


def image_loss(net: Network, prepared: Prepared, codes: Tensor, h_v: Tensor | None) -> LossTerm:  # codes int64 [B, N]
    """Compute the sum of the cross-entropy of codes; tokens from boi to the second-to-last code predict the next."""
    hidden = net.hidden(prepared.layout, h_v, net.embed_codes(codes[:, :-1]))[:, -codes.shape[1] :]
    return token_loss(net.gen_head.features(hidden), net.gen_head.vision_head, codes, prepared)


def reply_loss(net: SharedLlama, prepared: Prepared, h_v: Tensor) -> LossTerm:
    """Compute the sum of the next-token cross-entropy of replies; logits are computed for labelled rows only."""
    hidden, labels = net.hidden(prepared.layout, h_v)[:, :-1], prepared.layout.labels[:, 1:]
    return token_loss(hidden, net.language_model.lm_head, labels, prepared)


def reca_prompt(net: Network, text: str) -> list[Segment]:
    """Build RECA's prompt: image and template, ending in boi."""
    config, v = net.config, net.vocabulary
    most = config.max_length - net.image_tokens
    before, image, asked = prompt.with_image(net.tokens, text, v, net.hv_tokens, config.reca_system_prompt, most)
    assert isinstance(asked, TextSegment)
    return [before, image, TextSegment([*asked.ids, v.boi])]


def check_templates(net: Network, templates: Sequence[str]) -> None:
    """Raise ValueError for a template that `reca_prompt` would truncate."""

    def length(text: str) -> int:
        return prompt.text_length(
            prompt.with_image(net.tokens, text, net.vocabulary, net.hv_tokens, net.config.reca_system_prompt)
        )

    check_lengths(templates, length, net.config.max_length - net.image_tokens - net.hv_tokens)


def _t2i(net: Network, text: str) -> list[Segment]:
    return [TextSegment(prompt.caption(net.tokens, text, net.vocabulary, net.config.max_length - net.image_tokens + 1))]


def _conversation(net: Network, turns: Any) -> list[Segment]:
    config = net.config
    return prompt.conversation(
        net.tokens, turns, net.vocabulary, net.hv_tokens, config.system_prompt, config.max_length
    )
