"""The doors: what makes three libraries know the architecture `bcosify`, each in its own way.

timm and transformers have registries for that. open_clip has none for towers, so its `create_model` is wrapped: a
student's folder is opened here, and every other name goes on to open_clip as before.
"""

from __future__ import annotations

from . import open_clip_door, timm_door, transformers_door

__all__ = ["open_doors"]


def open_doors() -> None:
    """Opens all doors; once is enough, twice is harmless."""
    timm_door.register()
    transformers_door.register()
    open_clip_door.register()
