"""HTML page of samples as a model receives them: both views and the text."""

import base64
import html
from typing import Any

from torch import Tensor

from reca.data.loader import Loader
from reca.data.pixels import encode_png
from reca.data.tasks import Scored

STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 24px; color: #222; background: #fff }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 16px }
figure { margin: 0; padding: 10px; border: 1px solid #ddd; border-radius: 6px; overflow-wrap: anywhere }
figure img { width: 160px; height: 160px; object-fit: contain; background: #eee; margin-right: 4px }
figcaption small { color: #777 }
"""


def contact_sheet(loader: Loader, count: int, title: str) -> str:
    """Return a self-contained HTML page of the first `count` positions of a stream.

    Raises DataError like the loader.
    """
    figures = [_figure(position, *loader.named_sample(position)) for position in range(count)]
    views = loader.views
    shown = [name for name, view in (("generation", views.gen), ("understanding", views.und)) if view is not None]
    bad = "".join(f"<li>{_text(key)}: {_text(reason)}</li>" for key, reason in loader.bad_samples.bad.items())
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{_text(title)}</title><style>{STYLE}</style>'
        f"<h1>{_text(title)}</h1><p>{count} of {len(loader.source)} samples, in training order, each with its "
        f"{' and its '.join(shown)} view.</p><main>{''.join(figures)}</main>"
        + (f"<h2>Bad samples</h2><ul>{bad}</ul>" if bad else "")
        + "</html>\n"
    )


def _figure(position: int, key: str, batch: Any) -> str:
    views = [("generation", batch.gen), ("understanding", batch.und), ("target", batch.target)]
    images = "".join(_image(name, view[0]) for name, view in views if view is not None)
    sizes = ", ".join(f"{view[0].shape[2]} x {view[0].shape[1]}" for _, view in views if view is not None)
    text = batch.text[0]
    if isinstance(text, Scored):
        boxes = (f"{box.score:+g} at {', '.join(f'{x:.2f}' for x in box[:4])}" for box in text.boxes)
        shown = "<br>".join((_text(text.caption), *boxes, f"{text.background:+g} elsewhere"))
    elif not isinstance(text, str):
        shown = "<br>".join(f"<b>Q</b> {_text(turn.question)}<br><b>A</b> {_text(turn.answer)}" for turn in text)
    else:
        shown = _text(text)
    return (
        f"<figure>{images}<figcaption>{shown}<br><small>{position}: {_text(key)}, {sizes}</small></figcaption></figure>"
    )


def _image(name: str, pixels: Tensor) -> str:
    return f'<img alt="{name} view" src="data:image/png;base64,{base64.b64encode(encode_png(pixels)).decode()}">'


def _text(text: str) -> str:
    return html.escape(text.encode("utf-8", "backslashreplace").decode())
