"""transformers: `hf:ORG/NAME[@rev]`, `hf:PATH` (also spelt `hf:hf-hub:...`, `hf:local-dir:...`)."""

from __future__ import annotations

from pathlib import Path

from ..base import Door, FolderMark, Library, Origin, Scheme, Source
from .models import build, class_count, load, load_options, output, own_head
from .preprocess import TRANSFORMS
from .text import open_text
from .towers import features, set_checkpointing, token_grid

__all__ = ["LIBRARY"]


def _origin(name: str, source: Source) -> Origin:
    if Path(name).is_dir():
        return Origin(name, folder=Path(name))
    repo, _, revision = name.partition("@")
    return Origin(repo, repo, revision or source.revision)


LIBRARY = Library(
    name="transformers",
    schemes=(
        Scheme(
            name="hf",
            forms=("hf:ORG/NAME[@rev]", "hf:PATH"),
            models="transformers models",
            load=load,
            origin=_origin,
            options={"head": "auto"},
            takes_revision=True,
        ),
    ),
    build=build,
    transforms=TRANSFORMS,
    token_grid=token_grid,
    own_head=own_head,
    class_count=class_count,
    output=output,
    features=features,
    open_text=open_text,
    load_options=load_options,
    set_checkpointing=set_checkpointing,
    folder=FolderMark(
        "config.json with `model_type`",
        lambda folder, config: "model_type" in config and "architecture" not in config,
    ),
    door=Door(
        call="transformers.AutoModel.from_pretrained({place!r})",
        lines="""\
import bcosify.publish  # makes the model known to transformers
from transformers import AutoImageProcessor, {auto}

processor = AutoImageProcessor.from_pretrained("{repo}")
model = {auto}.from_pretrained("{repo}")
""",
        everyone=True,
    ),
)
