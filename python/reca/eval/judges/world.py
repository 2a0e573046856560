"""The judge of the toy datasets: each has its own, deterministic one."""

from pathlib import Path
from typing import Any

from reca.data.pixels import read_image
from reca.demo.world import Asked
from reca.eval.judges.base import Judge, JudgeError


class WorldJudge(Judge):
    exact = True
    name = "world"

    def shows(self, image: Path, prompt: Asked) -> dict[str, Any]:
        pixels, world = read_image(image), prompt.world
        try:
            return {"correct": world.shows(pixels, prompt.prompt), "seen": f"shows {world.describe(pixels)}"}
        except RuntimeError as error:
            size = f"{pixels.shape[2]} x {pixels.shape[1]}"
            raise JudgeError(f"{image} has {size} pixels; images of the {world.title} have another size") from error
