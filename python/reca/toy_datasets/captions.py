"""The texts of all toy datasets: captions, phrases around them, questions and templates."""

import random
from collections.abc import Container, Iterable

from reca.toy_datasets.scene import Scene, Thing

# Phrases around a caption. They carry no information about the image and vary the position of the caption.
BEFORE = ("", "", "", "draw", "a picture of", "please draw", "i want to see")
AFTER = ("please", "in a picture", "on a dark ground", "drawn with care", "as a small picture on a dark ground")
MOST_AFTER = 3
QUESTIONS = ("what is this", "describe the picture", "what do you see")
TEMPLATES = (
    "describe the picture",
    "what do you see",
    "describe what you see in this picture",
    "what is this a picture of",
    "describe this small picture with care",
    "i want to see what is in this picture",
    "draw what you see",
    "please draw this picture",
)
WRAPPING = ("USER", "ASSISTANT", ":", "\n")


def vocabulary(names: Iterable[str]) -> tuple[str, ...]:
    """List all words in a toy dataset's texts. names: its colours, kinds of things and relations."""
    around = " ".join((*BEFORE, *AFTER, *QUESTIONS, *TEMPLATES)).split()
    return tuple(dict.fromkeys(["a", *names, *WRAPPING, *around]))


def caption(
    scene: Scene, coloured: Container[Thing] | None = None, rng: random.Random | None = None, share: float = 1.0
) -> str:
    """Describe the scene in at most seven words.

    coloured: things whose colours are named, each with probability `share` if `rng` is given; None: all things.
    """
    parts = []
    for thing in scene.things:
        named = (coloured is None or thing in coloured) and (rng is None or rng.random() < share)
        parts.append(f"a {thing.colour} {thing.kind}" if named else f"a {thing.kind}")
    return f" {scene.relation} ".join(parts)


def phrase(words: str, rng: random.Random) -> str:
    """Embed a caption in random phrases of a user's request."""
    parts = [rng.choice(BEFORE), words, *(rng.choice(AFTER) for _ in range(rng.randint(0, MOST_AFTER)))]
    return " ".join(part for part in parts if part)
