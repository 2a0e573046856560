"""The variants that the demo compares, and their results."""

from dataclasses import dataclass

from reca.demo.measure import Measured
from reca.demo.pretrain import DemoSetup
from reca.toy_datasets.dataset import ToyDataset

BEFORE = "before"  # the pre-trained model that variants start from
BEFORE_RANDOM = "before-random"  # the same, pre-trained with a randomly initialised encoder


@dataclass(frozen=True)
class Variant:
    """A variant: one way to post-train. All variants train for the same number of steps.

    overrides   recipe overrides; {seed} is replaced by the seed
    pretrained  name of the pre-trained model that it starts from
    """

    name: str
    description: str
    overrides: tuple[str, ...] = ()
    pretrained: str = BEFORE


@dataclass(frozen=True)
class Pretrained:
    """A pre-trained model. overrides: recipe overrides for pre-training and all variants that start from it."""

    name: str
    description: str
    overrides: tuple[str, ...] = ()


@dataclass
class Outcome:
    """The results of one model for one seed."""

    measured: Measured
    curve: list[tuple[int, float]]  # (step, loss)
    seconds: float


SFT_CAPTIONS = {
    "none": "captions that name no colour",
    "half": "captions that name each colour with probability one half",
    "full": "captions that name all colours",
}
Results = dict[int, dict[str, Outcome]]  # seed -> name of a pre-trained model or variant -> outcome


def pretrained_models(setup: DemoSetup) -> list[Pretrained]:
    """List the models that variants start from, in the order of the report's rows."""
    made = [Pretrained(BEFORE, "the pre-trained model that the others start from", setup.overrides)]
    if setup.random_encoder:
        overrides = (*setup.overrides, *setup.random_encoder)
        about = "pre-trained in the same way with a randomly initialised encoder"
        made.append(Pretrained(BEFORE_RANDOM, about, overrides))
    return made


def rows(dataset: ToyDataset, setup: DemoSetup) -> list[Pretrained | Variant]:
    """List the rows of the report in order: every pre-trained model, followed by the variants that start from it."""
    made: list[Pretrained | Variant] = []
    for pretrained in pretrained_models(setup):
        made.append(pretrained)
        made += [variant for variant in variants(dataset, setup) if variant.pretrained == pretrained.name]
    return made


def variants(dataset: ToyDataset, setup: DemoSetup) -> list[Variant]:
    """List the variants of a model, in the order of the report's rows."""

    def sft(caption_detail: str) -> tuple[str, ...]:
        captions = f"data.captions={dataset.spec('unlabeled', '{seed}', caption_detail)}"
        return "objective.reca.weight=0", "objective.t2i.weight=1", captions

    made = [
        Variant("RECA", "unlabeled images only"),
        Variant("SFT", "the same images with captions that omit the colours of held-out pairs", sft("sparse")),
    ]
    if setup.generation_variant:
        made.append(Variant(*setup.generation_variant))
    made.append(Variant("RECA-other", "control: the h_v of another image", ("objective.condition=other",)))
    made += [Variant(f"SFT-{detail}", SFT_CAPTIONS[detail], sft(detail)) for detail in dataset.caption_details]
    if setup.random_encoder:
        made.append(Variant("RECA-random", "control: h_v from the randomly initialised encoder", (), BEFORE_RANDOM))
    return made
