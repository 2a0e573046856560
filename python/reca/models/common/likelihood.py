"""How likely a model finds an answer about an image."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reca.data.batch import Batch
from reca.data.tasks import Turn
from reca.models.common.images import fit_to_view
from reca.models.common.inference import check_pairs, eval_mode
from reca.rng import CounterRNG


class LogLikelihood(NamedTuple):
    """log p(answer | image, question), summed over `tokens` tokens: the answer's and the one that ends it."""

    sum: float
    tokens: int

    @property
    def mean(self) -> float:
        return self.sum / self.tokens


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
    return [LogLikelihood(-total, round(float(term.weight))) for total, term in zip(sums, found, strict=True)]
