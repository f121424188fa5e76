"""Templates to pages, and pictures into them."""

from __future__ import annotations

import base64
import io
from typing import Any

import jinja2
from PIL import Image

__all__ = ["data_url", "render_page"]


def data_url(picture: Image.Image, kind: str = "PNG") -> str:
    """A picture as a URL that holds it; kind: Pillow's name of the format."""
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def render_page(template: str, **facts: Any) -> str:
    """A template of this folder, filled in; a name that it asks for and does not get is an error."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bcosify.evaluate.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**facts)
