"""GenEval-style measurement of a model in the toy world: prompts, verdicts of the detector, intervals."""

import math
import random
from collections import defaultdict
from typing import Any, NamedTuple

from torch import Tensor

from reca.demo.captions import caption
from reca.demo.scene import Scene, Thing
from reca.models.base import Adapter
from reca.toy_world.detector import shows
from reca.toy_world.scenes import RELATIONS, SHAPES, all_pairs, held_out_pairs
from reca.toy_world.splits import unseen

CATEGORIES = ("single", "colour", "two", "attribution", "position")
QUESTION = "what is this"


class Prompt(NamedTuple):
    category: str
    pairs: str  # seen, held-out, or "" where no colour is asked
    text: str
    scene: Scene
    colours: bool  # judged by
    layout: bool  # judged by


class Rate(NamedTuple):
    """Successes out of trials."""

    hits: int
    trials: int

    @property
    def share(self) -> float:
        return self.hits / self.trials if self.trials else 0.0

    def wilson(self, z: float = 1.96) -> tuple[float, float]:
        """Compute the 95 % interval (Wilson 1927)."""
        if not self.trials:
            return 0.0, 1.0
        n, p = self.trials, self.share
        centre, reach = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, (centre - reach) / (1 + z * z / n)), min(1.0, (centre + reach) / (1 + z * z / n))


class Measured(NamedTuple):
    """One model's results. rates: by "category pairs" and, pooled, by seen, held-out, understanding."""

    rates: dict[str, Rate]
    overall: float  # mean over the five categories
    samples: list[tuple[str, Tensor, bool]]  # prompt, image, verdict


def prompts(seed: int) -> list[Prompt]:
    """List the prompts of one seed. Attribution and position have their own draws."""
    rng, held = random.Random(f"prompts/{seed}"), held_out_pairs(seed)
    pools = {"seen": [p for p in all_pairs() if p not in held], "held-out": [p for p in all_pairs() if p in held]}
    made = [
        Prompt("single", "", f"a {shape}", Scene((Thing("red", shape),)), False, False)
        for shape in SHAPES
        for _ in range(6)
    ]
    for name, pool in pools.items():
        made += [Prompt("colour", name, caption(Scene((p,))), Scene((p,)), True, False) for p in pool for _ in range(3)]

    def two(pool: list[Thing]) -> Scene:
        return Scene((rng.choice(pool), rng.choice(pool)), rng.choice(RELATIONS))

    for _ in range(48):
        scene = two(all_pairs())
        made.append(Prompt("two", "", caption(scene, coloured=()), scene, False, False))
    for category, layout in (("attribution", False), ("position", True)):
        for name, pool in pools.items():
            for _ in range(48):
                scene = two(pool)
                made.append(Prompt(category, name, caption(scene), scene, not layout, layout))
    return made


def measure(model: Adapter, seed: int, sampling: dict[str, Any], every: int = 1) -> Measured:
    """Generate every prompt, judge the images, and ask about images that no training saw.

    every: n takes every n-th prompt and image only, for a quick look.
    """
    model.eval()
    asked = prompts(seed)[::every]
    images = model.generate([p.text for p in asked], [10_000 + i for i in range(len(asked))], **sampling)
    verdicts = [shows(image, p.scene, p.colours, p.layout) for p, image in zip(asked, images, strict=True)]

    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])

    def count(name: str, hit: bool) -> None:
        counts[name][0] += hit
        counts[name][1] += 1

    for p, hit in zip(asked, verdicts, strict=True):
        count(f"{p.category} {p.pairs}".strip(), hit)
        count(f"{p.category}, all", hit)
        if p.category in ("colour", "attribution"):
            count(p.pairs, hit)
    split = unseen(seed)
    shown = range(0, len(split), every)
    answers = model.answer([split.image(i) for i in shown], [QUESTION] * len(shown), max_new_tokens=9)
    for i, answer in zip(shown, answers, strict=True):
        count("understanding", answer == caption(split.scene(i)))
    rates = {name: Rate(*pair) for name, pair in counts.items()}
    overall = sum(rates[f"{c}, all"].share for c in CATEGORIES) / len(CATEGORIES)
    return Measured(rates, overall, [(p.text, x, hit) for p, x, hit in zip(asked, images, verdicts, strict=True)])
