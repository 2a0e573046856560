"""Monitors that detect from training metrics that a run is collapsing. alarms.py checks its evaluations.

No threshold here has been calibrated at scale.
"""

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any

from reca.config.recipe import Recipe
from reca.models.base import Adapter

BASELINE_STEPS = 100  # the mean loss of these first steps is the baseline
COPY_RATIO = 0.3  # fraction of the baseline below which the model probably copies h_v into the image
DRIFT_RATIO = 1.05  # growth of a fixed batch's loss that counts as forgetting
GAP_RATIO = 3.0  # growth of the condition gap that, together with drift, indicates copying


def config_warnings(recipe: Recipe, adapter: Adapter, roles: Iterable[str]) -> list[str]:
    """List settings of this run that are known to make it collapse or to have no effect."""
    found, roles = list(adapter.config_warnings()), set(roles)
    if "shared_lm" in roles and recipe.objective.reca.weight and not recipe.objective.i2t.weight:
        found.append(
            "understanding and generation share trained weights but objective.i2t.weight is 0: understanding may be "
            "forgotten. Set data.conversations and objective.i2t.weight=1, as the paper does for Show-o and Harmon"
        )
    if idle := sorted(roles & (adapter.encoder_roles or frozenset())):
        found.append(
            f"train.roles includes {' and '.join(idle)}, but the encoders run without a gradient: their weights will "
            "not change"
        )
    there = set(adapter.roles().values())
    decoupled = "gen_lm" in there or ("gen_head" in roles and "shared_lm" not in there)
    if decoupled and roles & {"und_lm", "und_encoder"}:
        found.append(
            "understanding parameters are trained although they are separate from generation; the paper freezes them "
            "(train.roles=null)"
        )
    trained = [(name, parameter) for name, parameter in adapter.named_parameters() if parameter.requires_grad]
    if recipe.optim.weight_decay and not any(adapter.decays(name, parameter) for name, parameter in trained):
        found.append(
            f"optim.weight_decay={recipe.optim.weight_decay:g} has no effect: like its release, {adapter.name} applies "
            "no weight decay to the trained parameters"
        )
    return found


class Monitor:
    """Monitors the metrics of a run. `check` returns each warning once until its condition clears."""

    def __init__(self) -> None:
        self.start: dict[str, list[float]] = {}
        self.smooth: dict[str, float] = {}
        self.first: dict[str, float] = {}
        self.active: set[str] = set()

    def state(self) -> dict[str, Any]:
        """Return the JSON-able state for checkpoints, so that a resumed run keeps the baselines of its first steps."""
        return copy.deepcopy(vars(self) | {"active": sorted(self.active)})

    def load_state(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state, active=set(state["active"]))

    def check(self, step: int, metrics: dict[str, float], tasks: Iterable[str]) -> list[str]:
        conditions = {}
        for task in tasks:
            text = f"no sample of task {task} in this step has a label; its loss was skipped. Check the {task} data"
            conditions[f"no {task} labels"] = metrics.get(f"{task}/weight") == 0, text
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}  # others are no baseline
        if (loss := finite.get("reca/loss")) is not None and metrics.get("reca/weight"):
            early = self.start.setdefault("reca", [])
            if len(early) < BASELINE_STEPS:
                early.append(loss)
            self.smooth["reca"] = 0.95 * self.smooth.get("reca", loss) + 0.05 * loss
            level = sum(early) / len(early)
            text = (
                f"the reconstruction loss fell to {self.smooth['reca']:.3g}, below {COPY_RATIO:.0%} of the mean of the "
                f"first {BASELINE_STEPS} steps ({level:.3g}). If text-to-image images get worse, the model copies h_v: "
                "lower the understanding resolution or blur that view"
            )
            conditions["copying"] = len(early) == BASELINE_STEPS and self.smooth["reca"] < COPY_RATIO * level, text
        drifted = "t2i/drift" in self.active  # as last measured: the gap may have another period
        for name in ("t2i/drift", "i2t/drift"):
            if (value := finite.get(name)) is not None:
                base = self.first.setdefault(name, value)
                worse = value > DRIFT_RATIO * base
                drifted = worse if name == "t2i/drift" else drifted
                what = "text-to-image" if name.startswith("t2i") else "understanding"
                conditions[name] = worse, f"{what} loss on the fixed batch rose from {base:.4g} to {value:.4g}"
        if (gap := finite.get("reca/gap")) is not None:
            base = self.first.setdefault("gap", abs(gap))
            text = (
                f"the loss with another image's h_v exceeds the matched loss by {gap:.3g} (initially {base:.3g}) while "
                "the text-to-image loss rises: the model relies on h_v alone"
            )
            conditions["gap"] = drifted and gap > GAP_RATIO * base, text
        new = [text for name, (up, text) in conditions.items() if up and name not in self.active]
        self.active = (self.active - conditions.keys()) | {name for name, (up, _) in conditions.items() if up}
        return new
