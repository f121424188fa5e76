"""Converted models for others: `import bcosify.publish` lets timm, transformers and open_clip open them.

    import bcosify.publish
    timm.create_model("hf-hub:ORG/REPO", pretrained=True)
    transformers.AutoModelForImageClassification.from_pretrained("ORG/REPO")
    open_clip.create_model_and_transforms("hf-hub:ORG/REPO")

No code of a repository is run: the code is this package's, and what it reads is checked as `load` checks it. Called,
the package publishes: `bcosify.publish(FOLDER, "ORG/NAME")`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..convert import load
from ..core.lazy import call_as_verb, lazy_exports
from .doors import open_doors

if TYPE_CHECKING:
    from .formats import Exported, export
    from .verb import Publication, publish

__all__ = ["Exported", "Publication", "export", "load", "open_doors", "publish"]

__getattr__ = lazy_exports(
    __name__, {"Exported": ".formats", "Publication": ".verb", "export": ".formats", "publish": ".verb"}
)
call_as_verb(__name__)
open_doors()
