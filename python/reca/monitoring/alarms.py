"""Alarms for model collapse, raised from the evaluations during training.

Each alarm compares an evaluation with earlier ones of the same run. The thresholds, keys of `eval`, have not been
calibrated at scale.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from reca.eval.config import EvalConfig

SMALLEST_GAP = 0.005  # as a fraction of the loss; a gap that was never larger raises no alarm when it falls
SIDE = 16  # pixels; images are pooled to SIDE x SIDE before they are compared with each other

LOSS, GAP = "holdout/loss", "holdout/gap"
CONTRAST, VARIETY = "samples/contrast", "samples/variety"


@torch.no_grad()
def spread(images: Sequence[Tensor]) -> dict[str, float]:
    """Measure the variation of pixel values, in levels of 0 to 255. images: uint8 [3, H, W] each.

    samples/contrast  standard deviation within an image, mean over channels and images; 0 if all are uniform
    samples/variety   standard deviation across images, mean over pooled pixels and channels; 0 if all are identical;
                      absent for a single image
    """
    if not images:
        return {}
    contrast = torch.stack([image.float().flatten(1).std(1, correction=0).mean().cpu() for image in images])
    small = torch.stack([F.adaptive_avg_pool2d(image.float(), SIDE).cpu() for image in images])
    found = {CONTRAST: float(contrast.mean())}
    if len(images) > 1:
        found[VARIETY] = float(small.std(0, correction=0).mean())
    return found


class Alarms:
    """Checks the evaluations of a run one by one. Values are named as in log.jsonl.

    active: messages of the alarms that the last evaluation raised, by name.
    """

    def __init__(self, config: EvalConfig):
        self.config = config
        self.first: dict[str, float] = {}
        self.loss_step = 0  # of the first loss
        self.largest_gap = 0.0
        self.active: dict[str, str] = {}

    def check(self, step: int, values: Mapping[str, float]) -> list[str]:
        """Check the next evaluation, and return the messages of alarms that were not active before it."""
        before = self.active
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        if LOSS not in self.first:
            self.loss_step = step
        self.active = {name: text for name, text in self._seen(values).items() if text}
        for name, value in finite.items():
            self.first.setdefault(name, value)
        self.largest_gap = max(self.largest_gap, finite.get(GAP, 0.0))
        return [text for name, text in self.active.items() if name not in before]

    def _seen(self, values: Mapping[str, float]) -> dict[str, str]:
        """Return the message of every alarm by name; an empty message means no alarm."""
        return {
            "loss": self._loss(values),
            "gap": self._gap(values),
            **{name: self._spread(name, values) for name in (CONTRAST, VARIETY)},
        }

    def _loss(self, values: Mapping[str, float]) -> str:
        base, now = self.first.get(LOSS), values.get(LOSS)
        if not base or now is None or now <= self.config.alarm_loss * base:
            return ""
        return (
            f"the held-out reconstruction loss is {now:.4g}, {now / base:.2f} times that of step {self.loss_step} "
            f"({base:.4g}; eval.alarm_loss={self.config.alarm_loss:g}). The model forgets faster than it learns: lower "
            "optim.lr, lengthen optim.warmup_steps, or train on more images if the training loss still falls"
        )

    def _gap(self, values: Mapping[str, float]) -> str:
        now, loss, most = values.get(GAP), values.get(LOSS), self.largest_gap
        if now is None or not loss or most < SMALLEST_GAP * loss or not now < self.config.alarm_gap * most:
            return ""
        return (
            f"replacing h_v by that of another image raises the held-out loss by only {now:.4g}, and by up to "
            f"{most:.4g} before (eval.alarm_gap={self.config.alarm_gap:g}). The model no longer uses h_v and generates "
            "an average image: lower optim.lr, train fewer roles (train.roles), or train i2t or t2i together with reca"
        )

    def _spread(self, name: str, values: Mapping[str, float]) -> str:
        base, now = self.first.get(name), values.get(name)
        if not base or now is None or now >= self.config.alarm_spread * base:
            return ""
        what = "within generated images" if name == CONTRAST else "across generated images"
        means = "they become uniform" if name == CONTRAST else "they become identical"
        return (
            f"the standard deviation of pixels {what} fell from {base:.3g} to {now:.3g} levels "
            f"(eval.alarm_spread={self.config.alarm_spread:g}): {means}, whatever the prompt. Text-to-image generation "
            "collapses: lower optim.lr, shrink or blur the image that h_v is computed from, or train t2i together "
            "with reca"
        )
