"""The demo's before_after.png: images of held-out prompts, one row per model."""

from collections.abc import Mapping

from PIL import Image, ImageDraw, ImageFont

from reca.demo.variants import BEFORE, Outcome
from reca.io.image_grid import enlarged, to_pil
from reca.toy_datasets.captions import caption
from reca.toy_datasets.dataset import ToyDataset
from reca.toy_datasets.scene import Scene

NAME = "before_after.png"
ROWS = (BEFORE, "SFT", "RECA")
LEAST, GAP = 100, 8  # minimum size of an image, enlarged by an integer factor; distance between images
LEFT, TOP = 92, 40  # margins for the names of rows and columns


def before_after(outcomes: Mapping[str, Outcome], dataset: ToyDataset, seed: int) -> Image.Image:
    """Arrange images of single-object held-out prompts in a grid: columns are prompts, rows are models.

    Prompts are chosen by index (`ToyDataset.shown`), independent of the results. A model that failed has no row.
    """
    rows = [name for name in ROWS if name in outcomes]
    samples = next(iter(outcomes.values())).measured.samples
    held_out = {caption(Scene((pair,))) for pair in dataset.held_out(seed)}
    places: dict[str, int] = {}  # prompt -> index of its last sample
    for place, (prompt, _, _) in enumerate(samples):
        if prompt in held_out:
            places[prompt] = place
    columns = list(places.items())[dataset.shown]
    width = samples[0][1].shape[2]
    side = width * -(-LEAST // width)
    sheet = Image.new("RGB", (LEFT + len(columns) * (side + GAP), TOP + len(rows) * (side + GAP)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for column, (prompt, place) in enumerate(columns):
        x = LEFT + column * (side + GAP)
        for number, line in enumerate(reversed(_lines(prompt))):
            draw.text((x + side / 2, TOP - 6 - 15 * number), line, fill="black", font=font, anchor="mb")
        for row, name in enumerate(rows):
            image = to_pil(outcomes[name].measured.samples[place][1])
            sheet.paste(enlarged(image, side // width), (x, TOP + row * (side + GAP)))
    for row, name in enumerate(rows):
        draw.text((LEFT - 10, TOP + row * (side + GAP) + side / 2), name, fill="black", font=font, anchor="rm")
    return sheet


def _lines(prompt: str) -> list[str]:
    """Break a long prompt in two."""
    words = prompt.split()
    half = (len(words) + 1) // 2
    return [prompt] if len(prompt) < 16 else [" ".join(words[:half]), " ".join(words[half:])]
