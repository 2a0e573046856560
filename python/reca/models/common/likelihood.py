"""How likely a model finds an answer about an image."""

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
    """log p(answer | image, question), summed over `tokens` tokens: the answer's and the one that ends it.

    An answer behind a question that is too long, of which the model reads no token, has none and -inf.
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
    """Compute the log-likelihood of answers, one sample at a time, by the loss of image-to-text training.

    model: an Adapter. The images are seen as `answer` sees them. One at a time, since a sample's sum is wanted and a
    loss adds up batches; beside the dozens of passes that drew the image, this is one.
    """
    check_pairs(images=images, questions=questions, answers=answers)
    view = model.views("i2t").und
    assert view is not None
    device, found = next(model.parameters()).device, []
    with eval_mode(model), model.inference_autocast():
        for image, question, answer in zip(images, questions, answers, strict=True):
            pixels = fit_to_view(image, view).to(device)
            sample = Batch("i2t", torch.zeros(1, dtype=torch.int64), [[Turn(question, answer)]], und=[pixels])
            found.append(model(sample.to(device), CounterRNG(0)))
    sums = torch.stack([term.sum for term in found]).tolist() if found else []  # one wait for all of them
    tokens = [round(float(term.weight)) for term in found]
    for question, read in zip(questions, tokens, strict=True):
        if not read:
            _warn_of_unread(type(model).__name__, question)
    return [LogLikelihood(-total if n else -math.inf, n) for total, n in zip(sums, tokens, strict=True)]


@functools.lru_cache(maxsize=1024)  # once for all the answers to a question
def _warn_of_unread(model: str, question: str) -> None:
    log.warning(
        "the question %r fills all that %s reads, so that no token of its answers is read and none can be told from "
        "another: their log-likelihood is -inf; shorten the question, or raise the model's length of texts",
        question if len(question) <= 160 else f"{question[:160]} …",
        model,
    )
