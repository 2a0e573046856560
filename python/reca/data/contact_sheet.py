"""HTML page of samples as a model receives them: both views and the text."""

from pathlib import Path
from typing import Any

from reca.data.batch import Batch
from reca.data.loader import Loader
from reca.data.pixels import encode_png
from reca.data.tasks import Scored
from reca.io import html


def contact_sheet(loader: Loader, count: int, title: str) -> str:
    """Return a self-contained HTML page of the first `count` positions of a stream.

    Raises DataError like the loader.
    """
    samples = [_sample(position, *loader.named_sample(position)) for position in range(count)]
    views = (("generation", loader.views.gen), ("understanding", loader.views.und))
    return html.render(
        Path(__file__).with_name("contact_sheet.html"),
        title=title,
        samples=samples,
        total=len(loader.source),
        views=[name for name, view in views if view is not None],
        bad=loader.bad_samples.bad,
    )


def _sample(position: int, key: str, batch: Batch) -> dict[str, Any]:
    views = (("generation", batch.gen), ("understanding", batch.und), ("target", batch.target))
    images = {name: view[0] for name, view in views if view is not None}
    return {
        "position": position,
        "key": key,
        "lines": _lines(batch.text[0]),
        "images": {name: html.data_url(encode_png(pixels), "png") for name, pixels in images.items()},
        "sizes": ", ".join(f"{pixels.shape[2]} x {pixels.shape[1]}" for pixels in images.values()),
    }


def _lines(text: Any) -> list[tuple[str, str]]:
    """Return a sample's text as lines, each with a label, which may be empty."""
    if isinstance(text, Scored):
        boxes = [f"{box.score:+g} at {', '.join(f'{x:.2f}' for x in box[:4])}" for box in text.boxes]
        return [("", line) for line in (text.caption, *boxes, f"{text.background:+g} elsewhere")]
    if isinstance(text, str):
        return [("", text)]
    return [pair for turn in text for pair in (("Q", turn.question), ("A", turn.answer))]
