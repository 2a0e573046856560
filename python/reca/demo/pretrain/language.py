"""What a frozen language model must know beforehand: to caption a prompt, and to state any single fact of it at once.

A caption is read word by word, every word found by the one before. A generator's conditions come out of one pass, so
the model has to find facts without that help: "second colour red". Large language models can; a tiny one is taught.
"""

import random
from collections.abc import Callable

from reca.demo.captions import QUESTIONS, TEMPLATES, caption
from reca.demo.scene import Scene
from reca_kernels import IGNORE_INDEX

PROMPTS = tuple(dict.fromkeys(QUESTIONS + TEMPLATES))
FACTS = 0.5  # probability of a reply that states facts instead of a caption
WORDS = ("first", "second", "colour", "shape", "relation", "nothing")  # of facts, beside the captions'


def draw_reply(scene: Scene, rng: random.Random, encode: Callable[[str], list[int]]) -> tuple[list[int], list[int]]:
    """Draw a reply about a scene: its token ids and its labels, which are IGNORE_INDEX where nothing is learned."""
    ids: list[int] = []
    labels: list[int] = []
    for text, learned in _draw_parts(scene, rng):
        part = encode(text)
        ids, labels = ids + part, labels + (part if learned else [IGNORE_INDEX] * len(part))
    return ids, labels


def _draw_parts(scene: Scene, rng: random.Random) -> list[tuple[str, bool]]:
    """Draw a caption, or all facts in random order, whose names are given and whose values are learned."""
    if rng.random() >= FACTS:
        return [(caption(scene), True)]
    facts = [("relation", scene.relation or "nothing")]
    for i, number in enumerate(("first", "second")):
        thing = scene.things[i] if i < len(scene.things) else None
        facts.append((f"{number} colour", thing.colour if thing else "nothing"))
        facts.append((f"{number} shape", thing.kind if thing else "nothing"))
    rng.shuffle(facts)
    return [part for name, value in facts for part in ((name, False), (value, True))]
