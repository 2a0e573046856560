"""The judge of the toy world: its deterministic detector."""

from pathlib import Path
from typing import Any

from reca.data.pixels import read_image
from reca.eval.judges.base import Judge


class WorldJudge(Judge):
    kind = "world"
    exact = True
    name = "world"

    def shows(self, picture: Path, prompt: Any) -> dict[str, Any]:
        from reca.toy_world.detector import detect, shows

        image = read_image(picture)
        found = detect(image)
        seen = "no object" if found is None else ", ".join(f"{f.thing.colour} {f.thing.kind}" for f in found)
        return {
            "correct": shows(image, prompt.scene, prompt.colours, prompt.layout),
            "seen": f"shows {seen or 'nothing'}",
        }
