"""The content of a caption: one thing, or two with a relation between them."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Thing:
    colour: str
    kind: str


@dataclass(frozen=True)
class Scene:
    """One thing, or two of which the first is `relation` (such as left_of) the second."""

    things: tuple[Thing, ...]
    relation: str | None = None


@lru_cache(maxsize=64)
def draw_held_out(seed: int, colours: Sequence[str], kinds: Sequence[str], per_kind: int = 3) -> frozenset[Thing]:
    """Draw the things that captions never name: `per_kind` colours of every kind, with colours used evenly."""
    if 2 * per_kind > len(colours):  # rejection sampling below would rarely succeed
        others = draw_held_out(seed, colours, kinds, len(colours) - per_kind)
        return frozenset(Thing(c, k) for k in kinds for c in colours) - others
    rng = random.Random(seed)
    times, rest = divmod(per_kind * len(kinds), len(colours))
    while True:
        drawn = list(colours) * times + rng.sample(list(colours), rest)
        rng.shuffle(drawn)
        chunks = [drawn[i * per_kind : (i + 1) * per_kind] for i in range(len(kinds))]
        if all(len(set(chunk)) == per_kind for chunk in chunks):
            return frozenset(Thing(c, k) for k, chunk in zip(kinds, chunks, strict=True) for c in chunk)
