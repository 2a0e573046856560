"""Pages that need no other file."""

import base64
import io
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from PIL import Image


def render(template: Path, **values: Any) -> str:
    """Fill in a template of Jinja. Values are escaped, and a name without a value is an error."""
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template.name).render(values)


def data_url(data: bytes, kind: str) -> str:
    """Write the bytes of an image file as a data URL. kind: png, jpeg and so on."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def png(image: Image.Image) -> bytes:
    """Encode an image as PNG."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
