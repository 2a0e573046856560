"""Show-o's losses: cross-entropy over the full vocabulary on the masked codes of an image or on a reply."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from reca.data.batch import Batch
from reca.data.tasks import Turn
from reca.models import base
from reca.models.base import LossTerm
from reca.models.show_o import prompt
from reca.models.show_o.conditioner import Conditioner, conditioner
from reca.models.show_o.masking import sample_mask
from reca.models.show_o.modules import Network
from reca.models.show_o.prompt import Layout
from reca.models.token_loss import count_labels, token_loss
from reca.rng import CounterRNG, RandomStream
from reca_kernels import IGNORE_INDEX


@dataclass(frozen=True)
class Prepared(base.Prepared):
    """A batch's sequences. weight: their number of predicted tokens.

    masked  bool [B, N]: the masked codes of each image; None: no image is generated
    """

    layout: Layout
    masked: Tensor | None = None

    @property
    def tokens(self) -> list[int]:
        return [sum(run.length for run in runs if run.mode != "pad") for runs in self.layout.runs]

    @property
    def labels(self) -> Tensor:
        return self.layout.labels


def prepare(net: Network, batch: Batch, rng: CounterRNG) -> Prepared:
    """Lay out the sequences of a batch and draw the masks of its images."""
    make = {"reca": _reca_samples, "t2i": t2i_samples, "i2t": i2t_samples}[batch.task]
    layout, masked = prompt.layout(make(net, batch, rng), net.vocabulary), None
    labelled = count_labels(layout.labels)
    if batch.task != "i2t":
        masked = sample_mask(rng, batch.host_ids, net.image_tokens)
        labelled += int(masked.sum())
    return Prepared(batch.task, rng.seed, labelled, layout, masked)


def compute_loss(net: Network, prepared: Prepared, features: dict[str, Any]) -> LossTerm:
    """Compute the sum of the cross-entropy over predicted tokens."""
    layout, h_v, prompt_requires_grad = prepared.layout, features.get("h_v"), True
    if prepared.masked is not None:
        layout = prompt.apply_mask(layout, features["codes"], prepared.masked, net.vocabulary)
    if prepared.task == "reca":
        prompt_requires_grad = conditioner(net, "reca").prompt_requires_grad()
    read = layout.labels != IGNORE_INDEX
    hidden = net.hidden(layout, h_v, prompt_requires_grad, read=read, read_rows=int(prepared.weight))
    return token_loss(hidden, net.showo.lm_head, layout.labels, prepared)


def _reca_samples(net: Network, batch: Batch, rng: CounterRNG) -> list[prompt.Sample]:
    return reca_samples(net, batch.text)


def reca_samples(net: Network, templates: Sequence[str]) -> list[prompt.Sample]:
    """Build the reconstruction sequences of these templates. Raises ValueError for one that is too long."""
    source, samples = conditioner(net, "reca"), []
    for text in templates:
        try:
            samples.append(source.reca_sample(net.tokens(prompt.TEMPLATE.format(text)), net.vocabulary))
        except ValueError as error:
            raise ValueError(f"{error}; shorten it in data.templates: {text!r}") from error
    return samples


def t2i_samples(net: Network, batch: Batch, rng: CounterRNG) -> list[prompt.Sample]:
    """Build the text-to-image sequences of captions, some of which are dropped."""
    dropped = rng.uniform(RandomStream.CONDITION_DROP, batch.host_ids)[:, 0] < net.config.caption_drop
    texts = [[] if drop else net.tokens(text) for text, drop in zip(batch.text, dropped.tolist(), strict=True)]
    return [prompt.t2i(text, net.vocabulary, net.config.max_text_tokens, net.image_tokens) for text in texts]


def i2t_samples(net: Network, batch: Batch, rng: CounterRNG) -> list[prompt.Sample]:
    """Build the sequences of conversations about images."""
    source, system = conditioner(net, "i2t"), net.tokens(net.config.system_prompt)
    return [
        source.conversation_sample(*conversation(net, source, turns), net.vocabulary, system) for turns in batch.text
    ]


def conversation(net: Network, source: Conditioner, turns: Sequence[Turn]) -> tuple[list[int], list[int]]:
    """Return ids and labels of a conversation, truncated to the text budget left by image and system prompt.

    Raises ValueError if nothing is left.
    """
    budget = source.conversation_budget(len(net.tokens(net.config.system_prompt)))
    if budget < 1:
        raise ValueError(
            f"model.max_text_tokens={net.config.max_text_tokens} leaves {budget} tokens for a conversation besides "
            f"{source.tokens()} tokens of h_v and the system prompt; raise it by at least {1 - budget}"
        )
    ids, labels = prompt.conversation(net.tokens, turns, net.vocabulary)
    return ids[:budget], labels[:budget]
