"""What a study is asked to do, and its tasks: what one process does."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Evaluations:
    """What is measured.

    suites   of `reca eval`, at real size
    options  of its own for each suite, as `reca.evaluate` takes them, and those of all under ""
    draws    images of every prompt in an embedded world
    """

    suites: tuple[str, ...] = ()
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    draws: int = 1

    def of(self, suite: str) -> dict[str, Any]:
        """Return the options of a suite."""
        return {**self.options.get("", {}), **self.options.get(suite, {})}


@dataclass(frozen=True)
class Asked:
    """What holds for all arms of a study.

    recipe  of published weights; None: an embedded world
    world   its name
    common  overrides of every arm
    of_arm  overrides of single arms, by name
    scale   share of the world's steps and prompts; below 1 only to see that it runs
    out     the folder of studies
    """

    umm: str
    seeds: tuple[int, ...]
    out: Path
    recipe: str | None = None
    world: str = "shapes"
    common: tuple[str, ...] = ()
    of_arm: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    evaluations: Evaluations = field(default_factory=Evaluations)
    scale: float = 1.0

    @property
    def setting(self) -> str:
        return "world" if self.recipe is None else "published"


@dataclass(frozen=True)
class Task:
    """What one process does: train, if there are steps to make, and measure; or pre-train a start of the world.

    name     unique in the study: SEED/VARIANT, or SEED/start
    kind     start, before or arm
    recipe, overrides  of the run
    folder   of the run; of a start, the folder of the pre-trained model
    result   file that says the task is done, and what came of it
    world    name of the embedded world, where the setting is one
    variant  of the world's start
    of_start overrides of the recipe that the world's start was pre-trained by
    after    names of tasks that must be done before
    """

    name: str
    kind: str
    setting: str
    world: str
    umm: str
    seed: int
    recipe: str
    overrides: tuple[str, ...]
    folder: Path
    result: Path
    scale: float
    evaluations: Evaluations
    variant: str | None = None
    of_start: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    @property
    def arm(self) -> str:
        return self.name.partition("/")[2]


def short(recipe: str) -> str:
    """Name a recipe in the names of folders: its name, or that of its file without the path."""
    return Path(recipe).stem


def digest(*parts: Any) -> str:
    """Hash what decides a result, for the name of its folder."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:10]
