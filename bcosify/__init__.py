"""Inherently interpretable vision models from pretrained ones: the verbs of the command, as functions.

    import bcosify

    bcosify.convert("timm:resnet50.a1_in1k", out="runs/resnet50")
    bcosify.align("runs/resnet50", data="shards/*.tar")
    bcosify.explain("runs/resnet50/aligned", ["cat.jpg"], target="tabby", out="maps")

A model by its name, or in hand, is explained with whatever one has of pictures:

    bcosify.explain("timm:resnet50", "cat.jpg", "tabby").show()
    student = bcosify.convert("timm:resnet50")
    student(picture), student.explain(picture, "tabby").region((40, 30, 120, 90))

Options have the names that they have in the command (`bcosify VERB --help`); results are objects, and nothing is
printed. `convert`, `align`, `explain`, `evaluate`, `publish` and `demo` are packages too, with the parts of each stage.
`load` opens a converted model, and lets timm, transformers and open_clip open them too (see `bcosify.publish`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .align import align as align
    from .convert import convert as convert
    from .convert import inspect as inspect
    from .convert import save as save
    from .data import shards as shards
    from .demo import demo as demo
    from .evaluate import compare as compare
    from .evaluate import evaluate as evaluate
    from .explain import explain as explain
    from .publish import export as export
    from .publish import load as load
    from .publish import publish as publish

    __version__: str

# Verbs that are packages: calling one calls its function of the same name.
PACKAGES = ("align", "convert", "demo", "evaluate", "explain", "publish")
# The other names, and where they are.
PLACES = {
    "compare": (".evaluate", "compare"),
    "export": (".publish", "export"),
    "inspect": (".convert", "inspect"),
    "load": (".publish", "load"),
    "save": (".convert", "save"),
    "shards": (".data", "shards"),
}
__all__ = [
    "__version__",
    "align",
    "compare",
    "convert",
    "demo",
    "evaluate",
    "explain",
    "export",
    "inspect",
    "load",
    "publish",
    "save",
    "shards",
]


def __getattr__(name: str) -> Any:
    """A verb on its first use: importing bcosify, or one stage of it, must not import all libraries."""
    if name == "__version__":
        from importlib.metadata import version

        return version("bcosify")
    if name in PACKAGES:
        return importlib.import_module(f".{name}", __name__)
    if name in PLACES:
        place, there = PLACES[name]
        return getattr(importlib.import_module(place, __name__), there)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
