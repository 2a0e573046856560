"""The arms of the demo's experiment, and what is measured of each."""

from dataclasses import dataclass

from reca.demo.measure import Measured
from reca.demo.pretrain import DemoSetup
from reca.demo.world import World

BEFORE = "before"  # the pre-trained model, where arms start
BEFORE_RANDOM = "before-random"  # the same, pre-trained with an encoder of random weights


@dataclass(frozen=True)
class Arm:
    """One way to post-train. All arms make the same number of steps.

    overrides  of the recipe, with {seed}
    start      name of the pre-trained model that it starts from
    """

    name: str
    description: str
    overrides: tuple[str, ...] = ()
    start: str = BEFORE


@dataclass(frozen=True)
class Start:
    """A pre-trained model. overrides: of the recipe, in pre-training and in the arms that start from it."""

    name: str
    description: str
    overrides: tuple[str, ...] = ()


@dataclass
class Outcome:
    """What was measured of one model of one seed."""

    measured: Measured
    curve: list[tuple[int, float]]  # (step, loss)
    seconds: float


SFT_CAPTIONS = {
    "none": "captions that name no colour",
    "half": "captions that name each colour with probability one half",
    "full": "captions that name everything",
}
Results = dict[int, dict[str, Outcome]]  # seed -> BEFORE or the name of an arm -> outcome


def starts(setup: DemoSetup) -> list[Start]:
    """List the models that arms start from, in the order of the report's rows."""
    made = [Start(BEFORE, "the pre-trained start of the others", setup.overrides)]
    if setup.random_encoder:
        overrides = (*setup.overrides, *setup.random_encoder)
        made.append(Start(BEFORE_RANDOM, "pre-trained alike, but with an encoder of random weights", overrides))
    return made


def rows(world: World, setup: DemoSetup) -> list[Start | Arm]:
    """List what is measured, in the order of the report: every start, and the arms that start from it."""
    made: list[Start | Arm] = []
    for start in starts(setup):
        made += [start, *(arm for arm in arms(world, setup) if arm.start == start.name)]
    return made


def arms(world: World, setup: DemoSetup) -> list[Arm]:
    """List the arms of a model, in the order of the report's rows."""

    def sft(caption_detail: str) -> tuple[str, ...]:
        captions = f"data.captions={world.spec('unlabeled', '{seed}', caption_detail)}"
        return "objective.reca.weight=0", "objective.t2i.weight=1", captions

    made = [
        Arm("RECA", "unlabeled images only"),
        Arm("SFT", "the same images with the captioner's sparse captions", sft("sparse")),
    ]
    if setup.generation_arm:
        made.append(Arm(*setup.generation_arm))
    made.append(Arm("RECA-other", "control: the h_v of another image", ("objective.condition=other",)))
    made += [Arm(f"SFT-{detail}", SFT_CAPTIONS[detail], sft(detail)) for detail in world.caption_details]
    if setup.random_encoder:
        made.append(Arm("RECA-random", "control: h_v of the encoder of random weights", (), BEFORE_RANDOM))
    return made
