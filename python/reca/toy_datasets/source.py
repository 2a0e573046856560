"""A split of a toy dataset as a data source: PNG bytes, with the text that each task reads."""

from collections.abc import Callable

from reca.data.errors import DataError
from reca.data.sample import Sample, digest
from reca.data.tasks import Turn
from reca.toy_datasets.captions import QUESTIONS, caption, phrase
from reca.toy_datasets.dataset import ToyDataset
from reca.toy_datasets.split import Split

# caption_detail -> probability that a caption names a colour; sparse depends on the thing instead
NAMED = {"none": 0.0, "half": 0.5, "full": 1.0}
CAPTION_DETAILS = ("sparse", *NAMED)


class ToySource:
    """Samples of a split for one task: images only (reca), with a caption (t2i), or with a question and answer (i2t).

    split           name of the split
    caption_detail  colours that captions name: those of things that are not held out (sparse), none, each with
                    probability one half (half), or all (full)
    size            use only the first `size` images; None: all

    Raises DataError for an invalid seed, caption_detail or size.
    """

    def __init__(
        self, dataset: ToyDataset, split: str, task: str, seed: int, caption_detail: str, size: int | None = None
    ):
        if type(seed) is not int or seed < 0:
            raise DataError(f"seed={seed} of the {dataset.title} must be a whole number, at least 0")
        if caption_detail not in CAPTION_DETAILS:
            raise DataError(
                f"caption_detail={caption_detail} of the {dataset.title} must be one of {', '.join(CAPTION_DETAILS)}"
            )
        self.split: Split = dataset.splits[split](seed)
        self.task, self.caption_detail = task, caption_detail
        if size is not None and not (type(size) is int and 0 < size <= len(self.split)):
            raise DataError(f"size={size} of the {dataset.title} must be a whole number from 1 to {len(self.split)}")
        self.count = len(self.split) if size is None else size
        held = dataset.held_out(seed)
        self.named = {thing for thing in dataset.things if thing not in held} if caption_detail == "sparse" else None
        self.share = NAMED.get(caption_detail, 1.0)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        scene, rng = self.split.scene(index), self.split.rng(index, "text")
        text: str | list[Turn] | None = None
        if self.task == "t2i":
            text = phrase(caption(scene, self.named, rng, self.share), rng)
        if self.task == "i2t":
            text = [Turn(rng.choice(QUESTIONS), caption(scene))]
        return Sample(self.key(index), self.split.png(index), text)

    def key(self, index: int) -> str:
        return f"{self.split.name}/{index}"

    def size(self, index: int) -> int:
        return 0  # rendered on access

    def identity(self) -> str:
        return digest([self.split.name, self.split.seed, len(self), self.task, self.caption_detail])


def source_of(dataset: ToyDataset, split: str) -> Callable[..., ToySource]:
    """Return the function that recipes name, which makes a split a task's source. Arguments: see `ToySource`."""

    def source(task: str, *, seed: int = 0, caption_detail: str = "full", size: int | None = None) -> ToySource:
        return ToySource(dataset, split, task, seed, caption_detail, size)

    return source
