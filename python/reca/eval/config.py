"""Recipe keys of evaluation in training."""

from dataclasses import dataclass
from typing import Optional

from reca.options.fields import GLOB, JUDGE, LOCAL, RecipeError, config_field, format_value


@dataclass
class EvalConfig:
    every: int = config_field(
        0,
        "steps between evaluations during training, in addition to one before the first step and one after the last: "
        "held-out images (eval.holdout), prompts (eval.suite), and alarms for a collapse; 0 = never",
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
        None, "held-out images in any form of data.images, instead of splitting them off data.images", path=GLOB
    )
    seed: int = config_field(
        0,
        "seed of evaluation during training: held-out images, their noise, and generated images; independent of "
        "train.seed, so runs with different train.seed can be compared",
        least=0,
    )
    suite: Optional[str] = config_field(
        None, "suite of `reca eval` to generate, judge and score: toy, geneval, ...; null = none"
    )
    suite_data: Optional[str] = config_field(None, "files of a suite that are not shipped", path=LOCAL)
    judge: Optional[str] = config_field(
        None, "judge of the suite's images, as --judge of `reca eval`, such as mask2former:FILE", path=JUDGE
    )
    judge_options: list[str] = config_field(list, "options of the judge, key=value")
    prompts: int = config_field(50, "prompts of the suite, spread evenly over it", least=1)
    images_per_prompt: int = config_field(1, "images per prompt of the suite", least=1, most=2**10)
    sampling: list[str] = config_field(list, "sampling options of the model for the suite, key=value")
    alarm_loss: float = config_field(
        1.1, "alarm if the held-out loss exceeds this many times that of the model before the first step", above=1
    )
    alarm_gap: float = config_field(
        0.25,
        "alarm if the gap of the held-out loss (with other images' h_v minus with their own) falls below this "
        "fraction of its largest value in the run",
        least=0,
        below=1,
    )
    alarm_spread: float = config_field(
        0.4,
        "alarm if the standard deviation of pixels, within generated images or between them, falls below this fraction "
        "of its value before the first step",
        least=0,
        below=1,
    )
    stop_on_alarm: bool = config_field(False, "save and end the run on an alarm, with exit code 8")

    def check(self, prefix: str) -> None:
        if self.holdout == 1:
            raise RecipeError(
                f"{prefix}holdout=1: the gap needs the h_v of another held-out image; set 2 or more, or 0 for none"
            )
        for key in ("suite", "stop_on_alarm"):
            if getattr(self, key) and not self.every:
                raise RecipeError(
                    f"{prefix}{key}={format_value(getattr(self, key))} needs {prefix}every, the steps between "
                    "evaluations; it is 0"
                )
