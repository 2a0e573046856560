"""GenEval-style measurement of a model on a toy dataset: accuracy of generated images and of answers, intervals."""

import math
from collections import defaultdict
from collections.abc import Container
from typing import Any, NamedTuple

from torch import Tensor

from reca.models.base import Adapter
from reca.toy_datasets.captions import caption
from reca.toy_datasets.dataset import ToyDataset
from reca.toy_datasets.scene import Scene, Thing

QUESTION = "what is this"
SPARSEST = 10  # every tenth prompt still covers every category


class Rate(NamedTuple):
    """Successes out of trials."""

    hits: int
    trials: int

    @property
    def share(self) -> float:
        return self.hits / self.trials if self.trials else 0.0

    def wilson(self) -> tuple[float, float]:
        """Compute the Wilson score interval (1927) at 95 %."""
        if not self.trials:
            return 0.0, 1.0
        n, p, z = self.trials, self.share, 1.96
        centre, reach = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, (centre - reach) / (1 + z * z / n)), min(1.0, (centre + reach) / (1 + z * z / n))


class Measured(NamedTuple):
    """One model's results.

    rates    by "category pairs" and, pooled, by seen, held-out and understanding
    samples  the first image of every prompt
    """

    rates: dict[str, Rate]
    overall: float  # mean over the categories
    samples: list[tuple[str, Tensor, bool]]  # prompt, image, verdict


def spacing(scale: float) -> int:
    """Return the `every` of `measure` for a fraction of the prompts."""
    return min(max(1, round(1 / scale)), SPARSEST)


def measure(
    model: Adapter, dataset: ToyDataset, seed: int, sampling: dict[str, Any], every: int = 1, draws: int = 1
) -> Measured:
    """Generate images for all prompts and judge them; ask for captions of unseen images.

    every: n uses only every n-th prompt and image. draws: images per prompt.
    """
    once = dataset.prompts(seed)[::every]
    asked = once * draws
    images = model.generate([p.text for p in asked], [10_000 + i for i in range(len(asked))], **sampling)
    verdicts = [dataset.shows(image, p) for p, image in zip(asked, images, strict=True)]

    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])

    def count(name: str, hit: bool) -> None:
        counts[name][0] += hit
        counts[name][1] += 1

    for p, hit in zip(asked, verdicts, strict=True):
        count(f"{p.category} {p.pairs}".strip(), hit)
        count(f"{p.category}, all", hit)
        if p.category in ("colour", "attribution"):
            count(p.pairs, hit)
    split, held_out = dataset.splits["unseen"](seed), dataset.held_out(seed)
    shown = range(0, len(split), every)
    answers = model.answer([split.image(i) for i in shown], [QUESTION] * len(shown), max_new_tokens=9)
    for i, answer in zip(shown, answers, strict=True):
        hit = answer == caption(split.scene(i))
        count("understanding", hit)
        count(f"understanding {_pairs(split.scene(i), held_out)}", hit)
    rates = {name: Rate(*pair) for name, pair in counts.items()}
    overall = sum(rates[f"{c}, all"].share for c in dataset.categories) / len(dataset.categories)
    samples = [(p.text, x, hit) for p, x, hit in zip(asked, images, verdicts, strict=True)]
    return Measured(rates, overall, samples[: len(once)])


def _pairs(scene: Scene, held_out: Container[Thing]) -> str:
    return "held-out" if any(thing in held_out for thing in scene.things) else "seen"
