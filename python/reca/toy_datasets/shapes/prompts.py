"""Test prompts of the toy dataset `shapes`."""

import random

from reca.toy_datasets.captions import caption
from reca.toy_datasets.dataset import Prompt
from reca.toy_datasets.scene import Scene, Thing
from reca.toy_datasets.shapes.scenes import RELATIONS, SHAPES, all_pairs, held_out_pairs

CATEGORIES = ("single", "colour", "two", "attribution", "position")


def prompts(seed: int) -> list[Prompt]:
    """List the prompts of one seed. Attribution and position prompts are sampled separately."""
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
