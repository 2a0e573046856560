"""The judge of the toy datasets: each has its own, deterministic one."""

from pathlib import Path
from typing import Any

from reca.data.pixels import read_image
from reca.eval.judges.base import Judge, JudgeError
from reca.toy_datasets.dataset import JudgedPrompt


class ToyJudge(Judge):
    exact = True
    name = "toy"

    def shows(self, image: Path, prompt: JudgedPrompt) -> dict[str, Any]:
        pixels, dataset = read_image(image), prompt.dataset
        try:
            return {"correct": dataset.shows(pixels, prompt.prompt), "seen": f"shows {dataset.describe(pixels)}"}
        except RuntimeError as error:
            size = f"{pixels.shape[2]} x {pixels.shape[1]}"
            raise JudgeError(f"{image} has {size} pixels; images of the {dataset.title} have another size") from error
