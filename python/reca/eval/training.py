"""Evaluation of eval.suite during training: the steps of `reca eval`, in RUN/eval/training/SUITE/STEP."""

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reca import distributed
from reca.config.recipe import Recipe
from reca.data.pixels import read_image
from reca.eval import report
from reca.eval.checks import check
from reca.eval.errors import EvaluationError
from reca.eval.evaluation import generation_of, judge_and_score, sampling_of, save
from reca.eval.files import DURING_TRAINING
from reca.eval.generate import generate_images
from reca.eval.settings import Settings, open_settings
from reca.eval.targets import Target, write_generation
from reca.io.folders import make_inside
from reca.io.paths import is_file
from reca.models.base import Adapter
from reca.options.fields import RecipeError, format_value
from reca.options.names import argument, written_as
from reca.options.sampling import read_pairs
from reca.precision import fp32_products

KEYS = {  # of options of an evaluation
    "data": "eval.suite_data",
    "judge": "eval.judge",
    "judge_options": "eval.judge_options",
    "images_per_item": "eval.images_per_prompt",
}


def key(name: str, value: Any) -> str:
    """Write an option of an evaluation as the recipe key that sets it."""
    if name not in KEYS:
        return argument(name, value)
    given = f"[{', '.join(f'{k}={v}' for k, v in value.items())}]" if isinstance(value, dict) else value
    return KEYS[name] + ("" if value is None else f"={given}")


class Scored(NamedTuple):
    """Results of a suite in the format of `reca.eval`, and the generated images."""

    results: dict[str, Any]
    images: list[Tensor]


class TrainingSuite:
    """Generates images for the prompts of a suite with the model of a run, and judges and scores them.

    Raises RecipeError if the suite, its files or its judge cannot be used.
    """

    def __init__(self, recipe: Recipe, run_dir: Path):
        config = recipe.eval
        assert config.suite is not None
        self.recipe, self.run_dir, self.name = recipe, run_dir, config.suite.partition("?")[0]
        try:
            with written_as(key):
                self.settings: Settings = open_settings(
                    config.suite,
                    config.suite_data,
                    judge=config.judge,
                    judge_options=read_pairs(config.judge_options, "eval.judge_options"),
                    images_per_item=config.images_per_prompt,
                    limit=config.prompts,
                    sampling=read_pairs(config.sampling, "eval.sampling"),
                    seed=config.seed,
                )
                if self.settings.suite.ability != "generate":
                    raise RecipeError(f"{self.name} generates no images from prompts; use `reca eval {self.name} RUN`")
                check(self.settings, [self._side(0)], None, None)
        except ValueError as error:
            raise RecipeError(f"eval.suite={format_value(config.suite)}: {error}") from error

    def run(
        self, adapter: Adapter, step: int, device: torch.device, autocast: contextlib.AbstractContextManager
    ) -> Scored | None:
        """Evaluate the model after `step`. All ranks must call it; rank 0 runs the judge and returns the results.

        autocast: context for the model; the judge runs outside of it, as in `reca eval`.
        Returns None on other ranks. If generating, judging or writing fails, all ranks raise.
        """
        side = self._side(step)
        with distributed.fail_together():
            if distributed.rank() == 0:
                shutil.rmtree(side.folder, ignore_errors=True)  # from an interrupted or repeated step
                make_inside(self.run_dir, side.folder / "images")
                write_generation(side.folder, self._made(side, step), self.settings.items())
        with autocast:
            generate_images(
                adapter, self.settings.suite, self.settings.items(), side.folder / "images", self.settings.count,
                sampling_of(self.settings, side), self.settings.seed, alike=True,
            )  # fmt: skip
        with distributed.fail_together(distributed.waiting_group()), fp32_products():
            return self._score(side, device) if distributed.rank() == 0 else None

    def _side(self, step: int) -> Target:
        folder = self.run_dir / DURING_TRAINING / self.settings.suite.folder / f"{step:06d}"
        return Target(str(self.run_dir), self.recipe, True, folder)

    def _made(self, side: Target, step: int) -> dict[str, Any]:
        """Return the contents of generation.json. Weights can be sharded over ranks, so they are not hashed."""
        model = {"source": str(self.run_dir), "umm": self.recipe.umm, "trained": step > 0, "step": step,
                 "ema": False, "dtype": self.recipe.train.precision, "weights_sha256": None}  # fmt: skip
        return generation_of(self.settings, sampling_of(self.settings, side), {"step": step}) | {"model": model}

    def _score(self, side: Target, device: torch.device) -> Scored:
        try:
            with written_as(key):
                found = judge_and_score(self.settings, side, None, None, device)
        except Exception as error:  # a judge's library can raise anything
            raise EvaluationError(str(error) or type(error).__name__) from error
        assert found is not None
        base = self._side(0).folder
        if side.folder != base and is_file(base / report.RESULTS):
            found = report.compare(found, report.read(base / report.RESULTS), base)
        save(self.settings, side.folder, found)
        images = self.settings.suite.find(side.folder / "images", self.settings.items())
        return Scored(found, [read_image(path) for path in images.values()])


def values(found: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics to log: SUITE/score, its interval, its change, and the score of each tag."""
    name, overall = found["suite"], found["overall"]
    low, high = overall["interval"]
    logged = {f"{name}/score": overall["value"], f"{name}/score_low": low, f"{name}/score_high": high}
    if found["against"]:
        logged[f"{name}/change"] = found["against"]["overall"]["difference"]
    logged |= {f"{name}/score@{tag}": row["value"] for tag, row in found["tags"].items()}
    return {key: value for key, value in logged.items() if value is not None}
