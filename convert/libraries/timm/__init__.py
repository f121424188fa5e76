"""timm: `timm:NAME[.TAG]`, `timm:hf-hub:ORG/NAME[@rev]`, `timm:local-dir:PATH`."""

from __future__ import annotations

from ..base import Door, FolderMark, Library, Origin, Scheme, Source
from .classes import output
from .models import build, features, load, own_head, token_grid
from .preprocess import TRANSFORMS

__all__ = ["LIBRARY"]


def _origin(name: str, source: Source) -> Origin:
    from timm.models import get_pretrained_cfg

    config = get_pretrained_cfg(name)
    repo, licence = getattr(config, "hf_hub_id", None), getattr(config, "license", None)
    return Origin(f"timm:{name}", repo, source.revision, licence=licence, found="timm's record of it")


LIBRARY = Library(
    name="timm",
    schemes=(
        Scheme(
            name="timm",
            forms=("timm:NAME[.TAG]",),
            models="timm models",
            load=load,
            origin=_origin,
        ),
    ),
    build=build,
    transforms=TRANSFORMS,
    token_grid=token_grid,
    output=output,
    own_head=own_head,
    features=features,
    folder=FolderMark("config.json with `architecture`", lambda folder, config: "architecture" in config),
    door=Door(
        call="timm.create_model({name!r}, pretrained=True)",
        lines="""\
import bcosify.publish  # makes the model known to timm
import timm

model = timm.create_model("hf-hub:{repo}", pretrained=True)
""",
    ),
)
