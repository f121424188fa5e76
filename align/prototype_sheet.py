"""prototypes.html: every prototype that comes from data, with the training picture that lies nearest to it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core.files import new_file
from ..data.index import ShardIndex
from ..data.pictures import decode

__all__ = ["write_prototypes"]

THUMBNAIL = 96  # pixels


def write_prototypes(work: Path, labels: Sequence[str] | None, index: object, found: dict[str, Any]) -> Path | None:
    """Writes `work`/prototypes.html of what a fit of prototypes `found`; nothing of streamed shards, which are gone."""
    if not isinstance(index, ShardIndex):
        return None
    from ..evaluate.report import data_url, render_page  # loads jinja2

    def card(prototype: dict[str, Any]) -> dict[str, Any]:
        picture = decode(index.read(prototype["nearest"]))
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        label = prototype["class"] if labels is None else labels[prototype["class"]]
        return {**prototype, "label": label, "url": data_url(picture.convert("RGB"), "JPEG")}

    facts = {name.replace("_", " "): value for name, value in found.items() if name != "prototypes"}
    page = render_page("prototypes.html", facts=facts, cards=[card(prototype) for prototype in found["prototypes"]])
    with new_file(work / "prototypes.html") as scratch:
        scratch.write_text(page)
    return work / "prototypes.html"
