"""The suite of eval.suite on a model in training: the same steps, in RUN/eval/training/SUITE/STEP."""

import contextlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reca import distributed
from reca.config import Recipe
from reca.data.pixels import read_image
from reca.eval import report
from reca.eval.errors import EvaluationError
from reca.eval.evaluation import Settings, check, judge_and_score, open_settings, sampling_of, save
from reca.eval.generate import generate_images
from reca.eval.targets import Target, write_generation
from reca.models.base import Adapter
from reca.models.common.inference import eval_mode
from reca.options import RecipeError, format_value
from reca.precision import fp32_products
from reca.sampling_options import read_pairs

FOLDER = Path("eval") / "training"


class Scored(NamedTuple):
    """Results of a suite, on rank 0: as `reca.eval` says, and the images they are of."""

    results: dict[str, Any]
    images: list[Tensor]


class TrainingSuite:
    """Draws the prompts of a suite with the model of a run, has them judged and scores them.

    Raises RecipeError and EvaluationError for what is wrong with the suite, its files or its judge.
    """

    def __init__(self, recipe: Recipe, run_dir: Path):
        config = recipe.eval
        assert config.suite is not None
        self.recipe, self.run_dir, self.name = recipe, run_dir, config.suite.partition("?")[0]
        try:
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
                raise RecipeError(f"{self.name} does not draw prompts; `reca eval {self.name} RUN` evaluates a run")
            check(self.settings, [self._side(0)], None, None)
        except ValueError as error:
            raise RecipeError(f"eval.suite={format_value(config.suite)}: {error}") from error

    def run(
        self, adapter: Adapter, step: int, device: torch.device, autocast: contextlib.AbstractContextManager
    ) -> Scored | None:
        """Evaluate the model as it is after `step`. All ranks call it; rank 0 alone judges, and has the results.

        autocast: of the model, which the judge is not under: it computes as in `reca eval`.
        None on other ranks. Where images, judge or disk fail, it raises on all ranks.
        """
        side = self._side(step)
        with distributed.fail_together():
            if distributed.rank() == 0:
                shutil.rmtree(side.folder, ignore_errors=True)  # of a step that is made again
                (side.folder / "images").mkdir(parents=True)
                write_generation(side.folder, self._made(side, step), self.settings.items())
        with eval_mode(adapter), autocast:
            generate_images(
                adapter, self.settings.suite, self.settings.items(), side.folder / "images", self.settings.count,
                sampling_of(self.settings, side), self.settings.seed, alike=True,
            )  # fmt: skip
        with distributed.fail_together(distributed.waiting_group()), fp32_products():
            return self._score(side, device) if distributed.rank() == 0 else None

    def _side(self, step: int) -> Target:
        return Target(str(self.run_dir), self.recipe, True, self.run_dir / FOLDER / self.name / f"{step:06d}")

    def _made(self, side: Target, step: int) -> dict[str, Any]:
        """Describe what makes the images. The weights, which ranks may share, are not hashed."""
        settings, precision = self.settings, self.recipe.train.precision
        model = {"source": str(self.run_dir), "umm": self.recipe.umm, "trained": step > 0, "step": step}
        return {
            "suite": settings.suite.name,
            "protocol": settings.suite.protocol,
            "sampling": json.loads(json.dumps(sampling_of(settings, side))),
            "seed": settings.seed,
            "fingerprint": {"step": step},
            "model": model | {"dtype": precision, "weights_sha256": None},
        }

    def _score(self, side: Target, device: torch.device) -> Scored:
        try:
            found = judge_and_score(self.settings, side, None, None, device)
        except Exception as error:  # whatever a judge's library raises
            raise EvaluationError(str(error) or type(error).__name__) from error
        assert found is not None
        base = self._side(0).folder
        if side.folder != base and (base / "results.json").is_file():
            found = report.compare(found, report.read(base / "results.json"), base)
        save(self.settings, side.folder, found)
        images = self.settings.suite.find(side.folder / "images", self.settings.items())
        return Scored(found, [read_image(path) for path in images.values()])


def values(found: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of results that are logged: SUITE/score, with its interval, and by tag."""
    name, overall = found["suite"], found["overall"]
    low, high = overall["interval"]
    logged = {f"{name}/score": overall["value"], f"{name}/score_low": low, f"{name}/score_high": high}
    if found["against"]:
        logged[f"{name}/change"] = found["against"]["overall"]["difference"]
    logged |= {f"{name}/score@{tag}": row["value"] for tag, row in found["tags"].items()}
    return {key: value for key, value in logged.items() if value is not None}
