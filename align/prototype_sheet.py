"""prototypes.html: every prototype that comes from data, with the training picture that lies nearest to it."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..convert.files import new_file
from .shards import ShardIndex, decode

__all__ = ["write_prototypes"]

THUMBNAIL = 96  # pixels


def write_prototypes(work: Path, labels: Sequence[str] | None, index: object, found: dict[str, Any]) -> Path | None:
    """Writes `work`/prototypes.html of what a fit of prototypes `found`; nothing of streamed shards, which are gone."""
    if not isinstance(index, ShardIndex):
        return None
    cards = "\n".join(_card(prototype, labels, index) for prototype in found["prototypes"])
    facts = "".join(
        f"<li>{html.escape(name.replace('_', ' '))}: {html.escape(str(value))}</li>"
        for name, value in found.items()
        if name != "prototypes"
    )
    with new_file(work / "prototypes.html") as scratch:
        scratch.write_text(PAGE.format(facts=facts, cards=cards))
    return work / "prototypes.html"


def _card(prototype: dict[str, Any], labels: Sequence[str] | None, index: ShardIndex) -> str:
    label = prototype["class"] if labels is None else labels[prototype["class"]]
    thin = "; few pictures" if prototype["thin"] else ""
    caption = f"{label}: {prototype['pictures']} pictures, {prototype['share']:.0%} from data{thin}"
    source = html.escape(_thumbnail(index, prototype["nearest"]))
    said = html.escape(caption)
    return f'<figure><img src="{source}" alt="{said}"><figcaption>{said}</figcaption></figure>'


def _thumbnail(index: ShardIndex, id: int) -> str:
    """A data URL of one picture of the shards."""
    picture = decode(index.read(id))
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Prototypes</title>
<style>body{{font:15px sans-serif;margin:2em}}figure{{display:inline-block;width:130px;vertical-align:top;margin:6px}}
img{{width:96px}}figcaption{{font-size:12px}}</style>
<h1>Prototypes and their nearest training pictures</h1><ul>{facts}</ul>
{cards}
</html>
"""
