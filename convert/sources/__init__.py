"""References to pretrained models, one adapter a library: `SCHEME:NAME` -> Teacher.

timm:NAME[.TAG] | timm:hf-hub:ORG/NAME[@rev] | timm:local-dir:PATH | dir:PATH | bundled:NAME
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from ...errors import SourceError, near_miss
from . import bundled
from . import timm as timm_source
from .teacher import Preprocess, Source, Teacher

__all__ = ["Preprocess", "Source", "Teacher", "build", "load_teacher"]


def _load_folder(name: str, **options: Any) -> Teacher:
    """`dir:PATH`: decided by the files in it."""
    folder = Path(name)
    if not folder.is_dir():
        raise SourceError(f"dir:{name}: there is no such folder.")
    if (folder / "bcosify.json").is_file():
        raise SourceError(f"dir:{name} is a converted model already. Use align, explain or inspect on it.")
    config = folder / "config.json"
    try:
        keys = json.loads(config.read_text()) if config.is_file() else {}
    except json.JSONDecodeError as error:
        raise SourceError(f"{config} is not JSON: {error}") from error
    if "architecture" in keys:
        return timm_source.load(f"local-dir:{name}", **options)
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise SourceError(
        f"dir:{name}: not a model folder that is known here (a timm folder has config.json with "
        f"`architecture`). Found: {found}."
    )


SCHEMES: dict[str, Callable[..., Teacher]] = {
    "timm": timm_source.load,
    "bundled": bundled.load,
    "dir": _load_folder,
}
LIBRARIES: dict[str, Callable[[Source], nn.Module]] = {"timm": timm_source.build}


def load_teacher(
    reference: str, *, pretrained: bool = True, weights: str | Path | None = None, image_size: int | None = None
) -> Teacher:
    """The pretrained model that `reference` names, in eval mode.

    Args:
        reference: `timm:NAME[.TAG]`, `dir:PATH`, `bundled:NAME`.
        pretrained: False keeps random weights (no network).
        weights: a safetensors state dict of the same architecture, used in place of the published weights.
        image_size: side in pixels to feed the model at, where it is not its own.

    Raises:
        SourceError: unknown scheme, name or weights; says which are close and what to pass instead.
    """
    scheme, separator, name = reference.partition(":")
    if not separator or not name or scheme not in SCHEMES:
        known = ", ".join(f"{known}:NAME" for known in SCHEMES)
        hint = near_miss(scheme, SCHEMES) if separator else f" Did you mean 'timm:{reference}'?"
        if Path(reference).is_dir():
            hint = f" Did you mean 'dir:{reference}'?"
        raise SourceError(f"{reference!r} is not a model reference.{hint} A reference is one of: {known}.")
    file = None if weights is None else Path(weights)
    if file is not None and not file.is_file():
        raise SourceError(f"--weights {file}: there is no such file.")
    teacher = SCHEMES[scheme](name, pretrained=pretrained, weights=file)
    return Teacher(teacher.model, teacher.source, teacher.preprocess.at(image_size), teacher.labels)


def build(source: Source) -> nn.Module:
    """The empty skeleton of `source`, in eval mode."""
    if source.library not in LIBRARIES:
        raise SourceError(f"{source.reference}: this version cannot build models of {source.library!r}.")
    return LIBRARIES[source.library](source)
