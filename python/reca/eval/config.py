"""Recipe keys of evaluation in training."""

from dataclasses import dataclass
from typing import Optional

from reca.options import GLOB, JUDGE, LOCAL, RecipeError, config_field


@dataclass
class EvalConfig:
    every: int = config_field(
        0,
        "steps between evaluations of the model in training, beside one before the first step and one after the last: "
        "held-out images (eval.holdout), prompts (eval.suite), and what warns of a collapse; 0 evaluates never",
        least=0,
    )
    holdout: int = config_field(
        0,
        "images whose reconstruction loss, with fixed noise, masks and templates, is the validation curve; they are "
        "split off data.images, and no task trains on them. 0 = none, else 2 or more",
        least=0,
        most=2**16,
    )
    holdout_from: Optional[str] = config_field(
        None, "take the held-out images from here, in any form of data.images, and none from data.images", path=GLOB
    )
    seed: int = config_field(
        0,
        "seed of evaluation in training: which images are held out, their noise, and what is drawn; not of training, "
        "so runs of different train.seed can be compared",
        least=0,
    )
    suite: Optional[str] = config_field(
        None, "suite of `reca eval` whose prompts are drawn, judged and scored: world, geneval, ...; null = none"
    )
    suite_data: Optional[str] = config_field(None, "the suite's files, where they are not shipped", path=LOCAL)
    judge: Optional[str] = config_field(
        None, "who judges the suite's images, as --judge of `reca eval`, such as mask2former:FILE", path=JUDGE
    )
    judge_options: list[str] = config_field(list, "options of the judge, key=value")
    prompts: int = config_field(50, "prompts of the suite, spread evenly over it", least=1)
    images_per_prompt: int = config_field(1, "images of each of them", least=1, most=2**10)
    sampling: list[str] = config_field(list, "sampling options of the model for the suite, key=value")
    alarm_loss: float = config_field(
        1.1, "alarm where the held-out loss exceeds this many times that of the model before the first step", above=1
    )
    alarm_gap: float = config_field(
        0.25,
        "alarm where the gap of the held-out loss, with other images' h_v minus with their own, falls below this "
        "share of the largest that the run has had",
        least=0,
        below=1,
    )
    alarm_spread: float = config_field(
        0.4,
        "alarm where the standard deviation of pixels, within drawn images or between them, falls below this share "
        "of the model's before the first step",
        least=0,
        below=1,
    )
    stop_on_alarm: bool = config_field(False, "save and end the run on an alarm, with exit code 8")

    def check(self, prefix: str) -> None:
        if self.holdout == 1:
            raise RecipeError(
                f"{prefix}holdout=1: an image is compared with the h_v of another; hold out 2 or more, or 0 for none"
            )
        for key in ("suite", "stop_on_alarm"):
            if getattr(self, key) and not self.every:
                raise RecipeError(
                    f"{prefix}{key}={getattr(self, key)} needs {prefix}every, the steps between evaluations; it is 0"
                )
