"""Log-likelihood of answers about images."""

import functools
import logging
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reca.data.batch import Batch
from reca.data.tasks import Turn
from reca.models.common.images import fit_to_view
from reca.models.common.inference import check_pairs, eval_mode
from reca.rng import CounterRNG

log = logging.getLogger("reca")


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
    device, found = next(model.parameters()).device, []
    features: dict[str, Any] = {}
    pixels: list[Tensor] = []
    encoded = None
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
            found.append(model(sample.to(device), CounterRNG(0)))
    terms = [torch.stack((term.sum, term.weight)) for term in found]
    rows = torch.stack(terms).tolist() if terms else []  # one host synchronisation for all
    for question, (_, tokens) in zip(questions, rows, strict=True):
        if not tokens:
            _warn_of_unread(type(model).__name__, question)
    return [LogLikelihood(-total if tokens else -math.inf, round(tokens)) for total, tokens in rows]


@functools.lru_cache(maxsize=1024)  # warn once per question
def _warn_of_unread(model: str, question: str) -> None:
    log.warning(
        "the question %r fills the maximum text length of %s, so that all its answers are truncated entirely and their "
        "log-likelihood is -inf; shorten the question, or raise the model's maximum text length",
        question if len(question) <= 160 else f"{question[:160]} …",
        model,
    )
