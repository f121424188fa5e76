"""Libraries of pretrained models, and what references to their models mean: `SCHEME:NAME` -> Teacher.

timm:NAME[.TAG] | open_clip:ARCH/TAG | hf:ORG/NAME[@rev] | hf:PATH | dir:PATH | bundled:NAME

A folder is called as its library is imported, which is also its `Source.library`. The two are never mistaken: imports
of ours are relative (`from .timm import ...`), imports of theirs absolute (`import timm`), inside of functions, so that
`import bcosify.convert` brings no library.

To add a library: a folder with a `LIBRARY` (see `base.Library`), and its line here.
"""

from __future__ import annotations

from . import bundled, open_clip, timm, transformers
from .base import (
    CLASSES,
    FEATURES,
    LABELS,
    LIBRARIES,
    REGRESSION,
    SCHEMES,
    Door,
    Features,
    FolderMark,
    Library,
    Origin,
    Preprocess,
    Scheme,
    Source,
    Teacher,
    find_library,
    register,
    register_schemes,
)
from .inputs import Prepared, files_of, only_files, prepared
from .opened import Opened
from .references import build, load_teacher, origin_of, reference_forms, reload_teacher, token_grid, with_own_head
from .saved_text import SavedText
from .text import Text, TextTower, embed_texts, probabilities
from .weights import check_plain

__all__ = [
    "CLASSES",
    "FEATURES",
    "LABELS",
    "LIBRARIES",
    "REGRESSION",
    "SCHEMES",
    "Door",
    "Features",
    "FolderMark",
    "Library",
    "Opened",
    "Origin",
    "Prepared",
    "Preprocess",
    "SavedText",
    "Scheme",
    "Source",
    "Teacher",
    "Text",
    "TextTower",
    "build",
    "check_plain",
    "embed_texts",
    "files_of",
    "find_library",
    "load_teacher",
    "only_files",
    "origin_of",
    "prepared",
    "probabilities",
    "reference_forms",
    "register",
    "register_schemes",
    "reload_teacher",
    "token_grid",
    "with_own_head",
]

register(timm.LIBRARY)
register(open_clip.LIBRARY)
register(transformers.LIBRARY)
register_schemes(bundled.SCHEME)
