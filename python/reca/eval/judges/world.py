"""The judge of the embedded worlds: the deterministic one that each has."""

from pathlib import Path
from typing import Any

from reca.data.pixels import read_image
from reca.demo.world import Asked
from reca.eval.judges.base import Judge, JudgeError


class WorldJudge(Judge):
    kind = "world"
    exact = True
    name = "world"

    def shows(self, picture: Path, prompt: Asked) -> dict[str, Any]:
        image, world = read_image(picture), prompt.world
        try:
            return {"correct": world.shows(image, prompt.prompt), "seen": f"shows {world.describe(image)}"}
        except RuntimeError as error:
            size = f"{image.shape[2]} x {image.shape[1]}"
            raise JudgeError(
                f"{picture} has {size} pixels, and the {world.title} has images of another size"
            ) from error
