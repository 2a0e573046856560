"""Janus-Pro's losses: cross-entropy on an image's codes with teacher forcing (reca, t2i), and on replies (i2t)."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from reca.data.batch import Batch
from reca.models import base
from reca.models.base import LossTerm
from reca.models.janus import prompt
from reca.models.janus.modules import Network, SharedLlama
from reca.models.janus.prompt import Layout, Segment
from reca.models.token_loss import count_labels, token_loss
from reca.rng import CounterRNG, RandomStream
from reca_kernels import TextSegment, VisualSegment


@dataclass(frozen=True)
class Prepared(base.Prepared):
    """A batch's sequences. weight: number of predicted codes, or of labelled tokens of replies."""

    layout: Layout

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.layout.lengths

    @property
    def labels(self) -> Tensor:
        return self.layout.labels


def prepare(net: Network, batch: Batch, rng: CounterRNG) -> Prepared:
    """Lay out the sequences of a batch and draw which conditions are dropped."""
    v, codes = net.vocabulary, net.image_tokens
    if batch.task == "i2t":
        return Prepared(batch.task, rng.seed, *replies(net, batch))
    prompts, dropped = image_prompts(net, batch, rng)
    image = TextSegment([v.boi]), VisualSegment(codes - 1)
    layout = prompt.layout([[*given, *image] for given in prompts], v)
    return Prepared(batch.task, rng.seed, float(codes * len(batch)), prompt.drop(layout, dropped, codes - 1, v))


def replies(net: SharedLlama, batch: Batch) -> tuple[float, Layout]:
    """Lay out the conversations of a batch. Return the number of labelled tokens, too."""
    layout = prompt.layout([net.conversation(turns) for turns in batch.text], net.vocabulary)
    return count_labels(layout.labels), layout


def image_prompts(net: SharedLlama, batch: Batch, rng: CounterRNG) -> tuple[list[list[Segment]], list[bool]]:
    """Build the prompts of templates or captions, and draw which conditions are dropped."""
    reca = batch.task == "reca"
    make, share = (net.template, net.config.reca_drop) if reca else (net.caption, net.config.caption_drop)
    dropped = rng.uniform(RandomStream.CONDITION_DROP, batch.host_ids)[:, 0] < share
    return [make(text) for text in batch.text], dropped.tolist()


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
