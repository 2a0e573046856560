"""Alarms of a collapse: what evaluations during training show of a model that gets worse instead of better.

Each compares with the run's own evaluations before. The thresholds, keys of `eval`, have not been calibrated at scale.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from reca.eval.config import EvalConfig

SMALLEST_GAP = 0.005  # of the loss: a gap that never was larger says nothing when it falls
SIDE = 16  # pixels of the height and width at which images are compared with each other

LOSS, GAP = "holdout/loss", "holdout/gap"
CONTRAST, VARIETY = "samples/contrast", "samples/variety"


@torch.no_grad()
def spread(images: Sequence[Tensor]) -> dict[str, float]:
    """Measure how much pixels vary, in levels of 0 to 255. images: uint8 [3, H, W] each.

    samples/contrast  standard deviation within an image, mean over images; 0 where all are flat
    samples/variety   standard deviation between images, of the same pixel and colour; 0 where all are the same one
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
    """Looks at the evaluations of a run, one after another, by the names of log.jsonl.

    active: what is wrong after the last one, a message by the name of its alarm.
    """

    def __init__(self, config: EvalConfig):
        self.config = config
        self.first: dict[str, float] = {}
        self.first_step = 0
        self.largest_gap = 0.0
        self.active: dict[str, str] = {}

    def check(self, step: int, values: Mapping[str, float]) -> list[str]:
        """Look at one more evaluation. Returns the alarms that begin with it."""
        before = self.active
        if not self.first:
            self.first_step = step
        self.active = {name: text for name, text in self._seen(values).items() if text}
        for name, value in values.items():
            self.first.setdefault(name, value)
        self.largest_gap = max(self.largest_gap, values.get(GAP, 0.0))
        return [text for name, text in self.active.items() if name not in before]

    def _seen(self, values: Mapping[str, float]) -> dict[str, str]:
        """Describe what has collapsed, by the name of the alarm; an empty text where nothing has."""
        return {
            "loss": self._loss(values),
            "gap": self._gap(values),
            **{name: self._spread(name, values) for name in (CONTRAST, VARIETY)},
        }

    def _loss(self, values: Mapping[str, float]) -> str:
        base, now = self.first.get(LOSS), values.get(LOSS)
        if base is None or now is None or now <= self.config.alarm_loss * base:
            return ""
        return (
            f"the held-out reconstruction loss is {now:.4g}, {now / base:.2f} times that of step {self.first_step} "
            f"({base:.4g}; eval.alarm_loss={self.config.alarm_loss:g}). The model forgets faster than it learns: lower "
            "optim.lr, lengthen optim.warmup_steps, or train on more images if the training loss still falls"
        )

    def _gap(self, values: Mapping[str, float]) -> str:
        now, loss, most = values.get(GAP), values.get(LOSS), self.largest_gap
        if now is None or not loss or most < SMALLEST_GAP * loss or not now < self.config.alarm_gap * most:
            return ""
        return (
            f"another image's h_v raises the held-out loss by {now:.4g} only, where it was {most:.4g} before "
            f"(eval.alarm_gap={self.config.alarm_gap:g}). The model no longer uses h_v and generates an average "
            "image: lower optim.lr, train fewer roles (train.train), or give i2t or t2i a weight beside reca"
        )

    def _spread(self, name: str, values: Mapping[str, float]) -> str:
        base, now = self.first.get(name), values.get(name)
        if not base or now is None or now >= self.config.alarm_spread * base:
            return ""
        what = "within drawn images" if name == CONTRAST else "between drawn images"
        means = "they turn flat" if name == CONTRAST else "they become one and the same"
        return (
            f"the standard deviation of pixels {what} fell from {base:.3g} to {now:.3g} levels "
            f"(eval.alarm_spread={self.config.alarm_spread:g}): {means}, whatever the prompt says. Text-to-image is "
            "lost: lower optim.lr, shrink or blur the image that h_v is made of, or give t2i a weight beside reca"
        )
