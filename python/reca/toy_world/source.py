"""A split of the toy world as a data source: PNG bytes, with the text that each task reads."""

import io
from collections.abc import Callable

from PIL import Image

from reca.data.batch import Turn
from reca.data.errors import DataError
from reca.data.sample import Sample, digest
from reca.demo.captions import QUESTIONS, caption, phrase
from reca.toy_world.scenes import all_pairs, held_out_pairs
from reca.toy_world.splits import Split

CAPTION_DETAILS = ("sparse", "half", "full")


class ToySource:
    """Samples of a split for one task: images alone (reca), with a caption (t2i), or with a question and answer (i2t).

    split           makes the split of a seed
    caption_detail  which colours captions name: those of pairs that are not held out (sparse), each with probability
                    one half (half), or all (full)
    size            number of images, the first of the split; None: all

    Raises DataError for a seed, caption_detail or size that does not exist.
    """

    def __init__(
        self, split: Callable[[int], Split], task: str, seed: int, caption_detail: str, size: int | None = None
    ):
        if type(seed) is not int or seed < 0:
            raise DataError(f"seed={seed} of the toy world must be a whole number, at least 0")
        if caption_detail not in CAPTION_DETAILS:
            raise DataError(
                f"caption_detail={caption_detail} of the toy world must be one of {', '.join(CAPTION_DETAILS)}"
            )
        self.split, self.task, self.caption_detail = split(seed), task, caption_detail
        if size is not None and not (type(size) is int and 0 < size <= len(self.split)):
            raise DataError(f"size={size} of the toy world must be a whole number from 1 to {len(self.split)}")
        self.count = len(self.split) if size is None else size
        held = held_out_pairs(seed)
        self.named = {pair for pair in all_pairs() if pair not in held} if caption_detail == "sparse" else None
        self.share = 0.5 if caption_detail == "half" else 1.0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        buffer = io.BytesIO()
        Image.fromarray(self.split.image(index).permute(1, 2, 0).numpy()).save(buffer, "PNG")
        scene, rng = self.split.scene(index), self.split.rng(index, "text")
        text: str | list[Turn] | None = None
        if self.task == "t2i":
            text = phrase(caption(scene, self.named, rng, self.share), rng)
        if self.task == "i2t":
            text = [Turn(rng.choice(QUESTIONS), caption(scene))]
        return Sample(self.key(index), buffer.getvalue(), text)

    def key(self, index: int) -> str:
        return f"{self.split.name}/{index}"

    def size(self, index: int) -> int:
        return 0  # rendered when it is asked for

    def identity(self) -> str:
        return digest([self.split.name, self.split.seed, len(self), self.task, self.caption_detail])
