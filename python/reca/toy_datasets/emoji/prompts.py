"""Test prompts of the emoji datasets."""

from reca.toy_datasets.captions import caption
from reca.toy_datasets.dataset import Prompt
from reca.toy_datasets.emoji.artwork import KINDS, THINGS
from reca.toy_datasets.emoji.splits import UNTOLD, held_out
from reca.toy_datasets.scene import Scene, Thing

CATEGORIES = ("single", "colour")
SINGLE, SEEN, HELD_OUT = 2, 1, 2  # images per prompt


def prompts(seed: int, untold: int = UNTOLD) -> list[Prompt]:
    """List prompts for every kind without a colour and for every pair. untold: held-out colours per kind."""
    held = held_out(seed, untold)
    made = [
        Prompt("single", "", f"a {kind}", Scene((Thing("red", kind),)), False, False)
        for kind in KINDS
        for _ in range(SINGLE)
    ]
    for thing in THINGS:
        scene, name, times = Scene((thing,)), *(("held-out", HELD_OUT) if thing in held else ("seen", SEEN))
        made += [Prompt("colour", name, caption(scene), scene, True, False)] * times
    return made
