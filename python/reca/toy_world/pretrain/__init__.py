"""Where the demo starts from: per UMM, a tiny model that understands more than it can draw.

Everything of the demo that depends on the UMM is in its file here. A file has START and
`pretrain(recipe, seed, folder, scale, progress) -> Adapter`, which leaves in `folder` what `START.begins_at` names.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from reca.config import Recipe, RecipeError
from reca.models.base import Adapter

UMMS = ("show_o", "harmon", "open_uni", "bagel")

Progress = Callable[[int, float], None]  # (step, loss)


@dataclass(frozen=True)
class Start:
    """
    recipe       the tiny recipe that post-training runs
    steps        steps of pre-training
    pretrain     makes the model
    begins_at    the override by which a recipe starts from what pretrain left in {folder}
    sampling     how pictures are drawn for measuring
    says         the model, in a sentence of the report
    assumes      what its pre-training assumes, sentences of the report
    generation   name, meaning and overrides of the arm whose h_v comes from the generation side; None: there is none
    left_out     rows that other UMMs have and this one cannot, with the reason
    """

    recipe: str
    steps: int
    pretrain: Callable[[Recipe, int, Path, float, Progress], Adapter]
    begins_at: str
    sampling: dict[str, Any]
    says: str
    assumes: tuple[str, ...]
    generation: tuple[str, str, tuple[str, ...]] | None = None
    left_out: dict[str, str] = field(default_factory=dict)


def start(umm: str) -> Start:
    """Raises RecipeError for a UMM without a demo."""
    if umm not in UMMS:
        raise RecipeError(f"there is no demo of {umm!r}; --umm (UMM= of make) is one of {', '.join(UMMS)}")
    return import_module(f"reca.toy_world.pretrain.{umm}").START


def scaled(count: int, scale: float, least: int = 2) -> int:
    """A share of a budget; all of it at scale 1."""
    return max(least, round(count * scale))
