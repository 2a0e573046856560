"""The judge of the embedded worlds: the deterministic one that each has."""

from pathlib import Path
from typing import Any

from reca.data.pixels import read_image
from reca.demo.world import Asked
from reca.eval.judges.base import Judge


class WorldJudge(Judge):
    kind = "world"
    exact = True
    name = "world"

    def shows(self, picture: Path, prompt: Asked) -> dict[str, Any]:
        image = read_image(picture)
        return {"correct": prompt.world.shows(image, prompt.prompt), "seen": f"shows {prompt.world.describe(image)}"}
