"""The settings of a study, and its tasks, each run by one process."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Evaluations:
    """Evaluation settings.

    suites   suites of `reca eval`, for published weights
    options  keyword arguments of `reca.evaluate` per suite; those under "" apply to all suites
    draws    images per prompt on a toy dataset
    """

    suites: tuple[str, ...] = ()
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    draws: int = 1

    def of(self, suite: str) -> dict[str, Any]:
        """Return the options for a suite."""
        return {**self.options.get("", {}), **self.options.get(suite, {})}


@dataclass(frozen=True)
class Asked:
    """Settings common to all variants of a study.

    recipe      recipe with published weights; None: a toy dataset
    dataset     name of the toy dataset
    common      overrides for all variants
    of_variant  overrides for single variants, by name
    scale       fraction of a toy dataset's steps and prompts; below 1 only for a quick test
    out         output folder of all studies
    """

    umm: str
    seeds: tuple[int, ...]
    out: Path
    recipe: str | None = None
    dataset: str = "shapes"
    common: tuple[str, ...] = ()
    of_variant: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    evaluations: Evaluations = field(default_factory=Evaluations)
    scale: float = 1.0

    @property
    def setting(self) -> str:
        return "toy" if self.recipe is None else "published"


@dataclass(frozen=True)
class Task:
    """The work of one process: pre-train a model, measure it ("before"), or train and measure a variant.

    name               unique in the study: SEED/VARIANT or SEED/pretrained
    kind               pretrained, before or variant
    recipe, overrides  those of the run
    folder             folder of the run or of the pre-trained model
    result             result file; it exists once the task is done
    dataset            name of the toy dataset, if the setting is "toy"
    modification       of the pre-trained model, a key of toy.MODIFICATIONS; None: unmodified
    of_pretraining     recipe overrides in pre-training
    after              names of the tasks that it depends on
    """

    name: str
    kind: str
    setting: str
    dataset: str
    umm: str
    seed: int
    recipe: str
    overrides: tuple[str, ...]
    folder: Path
    result: Path
    scale: float
    evaluations: Evaluations
    modification: str | None = None
    of_pretraining: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    @property
    def variant(self) -> str:
        return self.name.partition("/")[2]


def short(recipe: str) -> str:
    """Return a recipe's name for folder names: its file name without path and suffix."""
    return Path(recipe).stem


def digest(*parts: Any) -> str:
    """Hash everything that determines a result, for its folder name."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:10]
