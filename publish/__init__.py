"""Converted models for others: `import bcosify.publish` lets timm, transformers and open_clip open them.

    import bcosify.publish
    timm.create_model("hf-hub:ORG/REPO", pretrained=True)
    transformers.AutoModelForImageClassification.from_pretrained("ORG/REPO")
    open_clip.create_model_and_transforms("hf-hub:ORG/REPO")

No code of a repository is run: the code is this package's, and what it reads is checked as `load` checks it.
"""

from __future__ import annotations

from ..convert import load
from .doors import open_doors

__all__ = ["load", "open_doors"]

open_doors()
