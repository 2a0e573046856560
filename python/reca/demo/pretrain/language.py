"""Targets for training a language model that is frozen later: captions of a prompt, and single facts about it.

A caption is generated word by word, each conditioned on the previous ones. The conditions of an image generator are
computed in one pass, so the model must state any fact directly, such as "second colour red". Large language models can;
a tiny one has to be trained to.
"""

import random
from collections.abc import Callable

from reca.toy_datasets.captions import QUESTIONS, TEMPLATES, caption
from reca.toy_datasets.scene import Scene
from reca_kernels import IGNORE_INDEX

PROMPTS = tuple(dict.fromkeys(QUESTIONS + TEMPLATES))
FACTS = 0.5  # probability of a reply that states facts instead of a caption
WORDS = ("first", "second", "colour", "shape", "relation", "nothing")  # words of facts that captions lack


def draw_reply(scene: Scene, rng: random.Random, encode: Callable[[str], list[int]]) -> tuple[list[int], list[int]]:
    """Draw a reply about a scene. Returns token ids and labels, which are IGNORE_INDEX for the names of facts."""
    ids: list[int] = []
    labels: list[int] = []
    for text, learned in _draw_parts(scene, rng):
        part = encode(text)
        ids, labels = ids + part, labels + (part if learned else [IGNORE_INDEX] * len(part))
    return ids, labels


def _draw_parts(scene: Scene, rng: random.Random) -> list[tuple[str, bool]]:
    """Draw a caption, or all facts in random order. Returns pairs of text and whether it is a training target."""
    if rng.random() >= FACTS:
        return [(caption(scene), True)]
    facts = [("relation", scene.relation or "nothing")]
    for i, number in enumerate(("first", "second")):
        thing = scene.things[i] if i < len(scene.things) else None
        facts.append((f"{number} colour", thing.colour if thing else "nothing"))
        facts.append((f"{number} shape", thing.kind if thing else "nothing"))
    rng.shuffle(facts)
    return [part for name, value in facts for part in ((name, False), (value, True))]
