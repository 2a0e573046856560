"""Log-likelihood of answers about images."""

import functools
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reca.data.batch import Batch
from reca.data.tasks import Turn
from reca.models.common.images import fit_to_view
from reca.models.common.inference import check_pairs, eval_mode
from reca.rng import CounterRNG
from reca_kernels import IGNORE_INDEX

log = logging.getLogger("reca")

UNREAD = (
    "the question %r fills the maximum text length of %s, so that all its answers are truncated entirely and their "
    "log-likelihood is -inf; shorten the question, or raise the model's maximum text length"
)
CUT = (
    "the answer %r and its question are longer than the maximum text length of %s: the answer's end is truncated, and "
    "its log-likelihood is that of its first tokens; shorten it, or raise the model's maximum text length"
)


class LogLikelihood(NamedTuple):
    """log p(answer | image, question), summed over `tokens` tokens: those of the answer and the end token.

    If the question is so long that the answer is truncated entirely, `tokens` is 0 and `sum` is -inf.
    """

    sum: float
    tokens: int

    @property
    def mean(self) -> float:
        return self.sum / self.tokens if self.tokens else -math.inf


@torch.no_grad()
def log_likelihood(
    model: Any, images: Sequence[Tensor], questions: Sequence[str], answers: Sequence[str]
) -> list[LogLikelihood]:
    """Compute the log-likelihood of answers, one sample at a time, with the i2t training loss.

    model: an Adapter. Images are resized and cropped as in `answer`. Samples are not batched because the loss sums over
    a batch; the cost is one pass per sample, against the dozens of passes that generated the image. An image is encoded
    once for consecutive samples that have it as the same tensor.
    """
    check_pairs(images=images, questions=questions, answers=answers)
    view = model.views("i2t").und
    assert view is not None
    device, found, rng = next(model.parameters()).device, [], CounterRNG(0)
    features: dict[str, Any] = {}
    pixels: list[Tensor] = []
    encoded = end_token = None
    with eval_mode(model), model.inference_autocast():
        for image, question, answer in zip(images, questions, answers, strict=True):
            if not pixels or image is not encoded:
                pixels, encoded = [fit_to_view(image, view).to(device)], image
                features.clear()
            sample = Batch(
                "i2t",
                torch.zeros(1, dtype=torch.int64),
                [[Turn(question, answer)]],
                und=pixels,
                features=features or None,
                on_encoded=features.update,
            )
            sample.prepared = model.prepare(sample, rng)
            if end_token is None:
                end_token = _last_label(model.prepare(replace(sample, text=[[Turn("", "")]]), rng))
            last = _last_label(sample.prepared)
            if last is None:
                _warn_once(UNREAD, question, type(model).__name__)
            elif last != end_token:
                _warn_once(CUT, answer, type(model).__name__)
            found.append(model(sample.to(device), rng))
    terms = [torch.stack((term.sum, term.weight)) for term in found]
    rows = torch.stack(terms).tolist() if terms else []  # one host synchronisation for all
    return [LogLikelihood(-total if tokens else -math.inf, round(tokens)) for total, tokens in rows]


def _last_label(prepared: Any) -> int | None:
    labels = prepared.labels[prepared.labels != IGNORE_INDEX]
    return int(labels[-1]) if len(labels) else None


@functools.lru_cache(maxsize=1024)
def _warn_once(message: str, text: str, model: str) -> None:
    log.warning(message, text if len(text) <= 160 else f"{text[:160]} …", model)
