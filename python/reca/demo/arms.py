"""The arms of the demo's experiment, and what is measured of each."""

from dataclasses import dataclass

from reca.demo.measure import Measured
from reca.demo.pretrain import DemoSetup

BEFORE = "before"  # the pre-trained model, where every arm starts


@dataclass(frozen=True)
class Arm:
    """One way to post-train. All arms make the same number of steps from the same pre-trained model."""

    name: str
    description: str
    overrides: tuple[str, ...]


@dataclass
class Outcome:
    """What was measured of one model of one seed."""

    measured: Measured
    curve: list[tuple[int, float]]  # (step, loss)
    seconds: float


Results = dict[int, dict[str, Outcome]]  # seed -> BEFORE or the name of an arm -> outcome


def arms(setup: DemoSetup) -> list[Arm]:
    """List the arms of a model, in the order of the report's rows."""
    generation = [Arm(*setup.generation_arm)] if setup.generation_arm else []
    return [
        Arm("RECA", "unlabeled images only", ()),
        Arm("SFT", "the same images with the captioner's sparse captions", _sft("sparse")),
        *generation,
        Arm("RECA-other", "control: the h_v of another image", ("objective.condition=other",)),
        Arm("SFT-half", "captions that name each colour with probability one half", _sft("half")),
        Arm("SFT-full", "captions that name everything", _sft("full")),
    ]


def _sft(caption_detail: str) -> tuple[str, ...]:
    return (
        "objective.reca.weight=0",
        "objective.t2i.weight=1",
        f"data.captions=reca.toy_world:unlabeled?seed={{seed}}&caption_detail={caption_detail}",
    )
