"""open_clip: `open_clip:ARCH/TAG`, `open_clip:hf-hub:ORG/NAME[@rev]`, `open_clip:local-dir:PATH`."""

from __future__ import annotations

from ..base import Door, FolderMark, Library, Origin, Scheme, Source
from .files import CONFIG
from .models import build, load, load_options
from .preprocess import TRANSFORMS
from .text import open_text, student_files
from .towers import features, token_grid

__all__ = ["LIBRARY"]


def _origin(name: str, source: Source) -> Origin:
    from open_clip import get_pretrained_cfg

    repo = (get_pretrained_cfg(*name.split("/", 1)) or {}).get("hf_hub", "").strip("/")
    return Origin(repo, repo, source.revision) if repo.count("/") == 1 else Origin(f"open_clip:{name}")


LIBRARY = Library(
    name="open_clip",
    schemes=(
        Scheme(
            name="open_clip",
            forms=("open_clip:ARCH/TAG",),
            models="open_clip models",
            load=load,
            origin=_origin,
            options={"image_size": None},
        ),
    ),
    build=build,
    transforms=TRANSFORMS,
    token_grid=token_grid,
    features=features,
    open_text=open_text,
    load_options=load_options,
    student_files=student_files,
    folder=FolderMark(CONFIG, lambda folder, config: (folder / CONFIG).is_file()),
    door=Door(
        call="open_clip.create_model_and_transforms({name!r})",
        lines="""\
import bcosify.publish  # makes the model known to open_clip
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("hf-hub:{repo}")
""",
        pairs=True,
    ),
)
