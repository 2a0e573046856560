"""The toy dataset `shapes`: synthetic images of coloured shapes.

In recipes `reca.toy_datasets.shapes:unlabeled?seed=0` names a data source, and `reca.toy_datasets.shapes:TEMPLATES` the
template sentences.
"""

from torch import Tensor

from reca.toy_datasets.captions import TEMPLATES, vocabulary
from reca.toy_datasets.dataset import Prompt, ToyDataset
from reca.toy_datasets.shapes import splits
from reca.toy_datasets.shapes.detector import detect, shows
from reca.toy_datasets.shapes.prompts import CATEGORIES, prompts
from reca.toy_datasets.shapes.scenes import COLOURS, RELATIONS, SHAPES, all_pairs, held_out_pairs
from reca.toy_datasets.source import source_of

__all__ = ["DATASET", "TEMPLATES", "WORDS", "captioned", "understood", "unlabeled", "unseen"]

WORDS = vocabulary((*COLOURS, *SHAPES, *RELATIONS))


def _shows(image: Tensor, prompt: Prompt) -> bool:
    return shows(image, prompt.scene, prompt.colours, prompt.layout)


def _describe(image: Tensor) -> str:
    found = detect(image)
    if found is None:
        return "no object"
    return ", ".join(f"{f.thing.colour} {f.thing.kind}" for f in found) or "nothing"


DATASET = ToyDataset(
    name="shapes",
    package="reca.toy_datasets.shapes",
    umms=("bagel", "harmon", "janus", "janusflow", "open_uni", "show_o"),
    things=tuple(all_pairs()),
    held_out=held_out_pairs,
    splits=splits.SPLITS,
    codec_split="understood",
    prompts=prompts,
    categories=CATEGORIES,
    caption_details=("half", "full"),
    shown=slice(1, None, 2),
    shows=_shows,
    describe=_describe,
    introduction=(
        "learned to generate coloured shapes from captions in which 18 of 48 colour-shape pairs never occur. Its "
        "understanding side was trained to name all 48."
    ),
    assumptions=("Understanding is easy here, so the fact that it is preserved is weak evidence.",),
)
captioned, understood, unlabeled, unseen = (source_of(DATASET, name) for name in DATASET.splits)
