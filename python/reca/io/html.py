"""HTML pages that need no other file."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from PIL import Image


def render(template: Path, **values: Any) -> str:
    """Render a Jinja template. Values are escaped, and a name without a value raises an error."""
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template.name).render(values)


def data_url(data: bytes, kind: str) -> str:
    """Encode the bytes of an image file as a data URL. kind: png, jpeg and so on."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def png_url(image: Image.Image) -> str:
    """Encode an image as a data URL of a PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return data_url(buffer.getvalue(), "png")


def loss_curve(points: Sequence[tuple[int, float]], width: int, height: int) -> dict[str, str]:
    """Return the polyline points of (step, loss), with axes from 0, and the first and the last loss as text."""
    last, top = points[-1][0], max(max(loss for _, loss in points), 1e-9)
    line = " ".join(f"{x / last * width:.1f},{height - max(y, 0) / top * height:.1f}" for x, y in points)
    return {"line": line, "first": f"{points[0][1]:.3g}", "last": f"{points[-1][1]:.3g}"}
