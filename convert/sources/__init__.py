"""References to pretrained models, one adapter a library: `SCHEME:NAME` -> Teacher.

timm:NAME[.TAG] | open_clip:ARCH/TAG | hf:ORG/NAME[@rev] | hf:PATH | dir:PATH | bundled:NAME

Inside `timm:` and `open_clip:` both libraries' own `hf-hub:ORG/NAME[@rev]` and `local-dir:PATH` are understood.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...core.errors import SourceError, near_miss
from ...core.files import file_digest
from . import bundled, hf
from . import open_clip as open_clip_source
from . import timm as timm_source
from .teacher import Preprocess, Source, Teacher
from .text import SavedText, Text, TextTower, embed_texts, probabilities
from .weights import check_plain

__all__ = [
    "LIBRARIES",
    "SCHEMES",
    "TEXTS",
    "Preprocess",
    "SavedText",
    "Source",
    "Teacher",
    "Text",
    "TextTower",
    "build",
    "check_plain",
    "embed_texts",
    "load_teacher",
    "probabilities",
    "reload_teacher",
    "token_grid",
]


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
    found = {
        "timm": "architecture" in keys,
        "hf": "model_type" in keys and "architecture" not in keys,
        "open_clip": (folder / "open_clip_config.json").is_file(),
    }
    kinds = [kind for kind, fits in found.items() if fits]
    if len(kinds) > 1:
        spelt = " or ".join(f"{kind}:local-dir:{name}" for kind in kinds)
        raise SourceError(f"dir:{name} is a folder of {' and '.join(kinds)} at once. Say which: {spelt}.")
    if not kinds:
        listed = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise SourceError(
            f"dir:{name}: not a model folder that is known here (timm writes config.json with `architecture`, "
            f"transformers config.json with `model_type`, open_clip open_clip_config.json). Found: {listed}."
        )
    return _call(kinds[0], f"local-dir:{name}", **options)


SCHEMES: dict[str, Callable[..., Teacher]] = {
    "timm": timm_source.load,
    "open_clip": open_clip_source.load,
    "hf": hf.load,
    "bundled": bundled.load,
    "dir": _load_folder,
}
LIBRARIES: dict[str, Callable[[Source], nn.Module]] = {
    "timm": timm_source.build,
    "open_clip": open_clip_source.build,
    "transformers": hf.build,
}
TEXTS: dict[str, Callable[[Path, Mapping[str, Any]], TextTower]] = {
    "open_clip": open_clip_source.open_text,
    "transformers": hf.open_text,
}
# Library -> the features of all patches, which its models pool.
TOKENS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "timm": timm_source.token_grid,
    "open_clip": open_clip_source.token_grid,
    "transformers": hf.token_grid,
}


def load_teacher(
    reference: str,
    *,
    pretrained: bool = True,
    weights: str | Path | None = None,
    image_size: int | None = None,
    head: str = "auto",
) -> Teacher:
    """The pretrained model that `reference` names, in eval mode.

    Args:
        reference: `timm:NAME[.TAG]`, `open_clip:ARCH/TAG`, `hf:ORG/NAME[@rev]`, `dir:PATH`, `bundled:NAME`.
        pretrained: False keeps random weights (no network).
        weights: a safetensors state dict of the same architecture, used in place of the published weights.
        image_size: side in pixels to feed the model at, where it is not its own.
        head: which output of a transformers model, one of `hf.HEADS`; `auto` takes what its checkpoint was made for.

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
    teacher = _call(scheme, name, pretrained=pretrained, weights=file, image_size=image_size, head=head)
    check_plain(teacher.model, reference)
    provenance = file_digest(file) if file else None if pretrained else RANDOM
    source = dataclasses.replace(teacher.source, reference=reference, weights=provenance)
    return dataclasses.replace(teacher, source=source, preprocess=teacher.preprocess.at(image_size))


RANDOM = "random"
# Options that not every library has, and what leaves them out.
OPTIONAL: dict[str, Any] = {"image_size": None, "head": "auto"}


def _call(scheme: str, name: str, **options: Any) -> Teacher:
    """The scheme's loader, called with those options that it knows."""
    known = inspect.signature(SCHEMES[scheme]).parameters
    if scheme != "dir" and options["head"] != "auto" and "head" not in known:
        raise SourceError(f"--head {options['head']} is for transformers models (hf:NAME), not for {scheme}:{name}.")
    given = {key: value for key, value in options.items() if scheme == "dir" or key in known or key not in OPTIONAL}
    return SCHEMES[scheme](name, **given)


def reload_teacher(source: Source, weights: str | Path | None = None) -> Teacher:
    """The teacher of `source` again, with the same head and the same weights.

    Args:
        weights: the file that was passed to `load_teacher`, where one was.

    Raises:
        SourceError: as `load_teacher`; the weights were random, or came from a file that is not given or not the same.
    """
    again = "Convert once more, and align before anything else: a student that is still its teacher needs no source."
    if source.weights == RANDOM:
        raise SourceError(f"{source.reference}: its teacher had random weights, which cannot be had again. {again}")
    if source.weights and weights is None:
        raise SourceError(f"{source.reference}: its teacher's weights came from a file. Pass it: --weights FILE.")
    if weights is not None and (found := file_digest(Path(weights))) != source.weights:
        wanted = f"a file with sha256 {source.weights[:12]}" if source.weights else "the published weights"
        raise SourceError(f"--weights {weights}: sha256 {found[:12]}, but the teacher of this student had {wanted}.")
    reference = source.reference
    scheme = reference.partition(":")[0]
    if source.revision and "@" not in reference and (scheme == "hf" or ":hf-hub:" in reference):
        reference = f"{reference}@{source.revision}"
    head = source.model_args.get("head", "auto") if scheme == "hf" else "auto"
    return load_teacher(reference, weights=weights, head=head)


def build(source: Source) -> nn.Module:
    """The empty skeleton of `source`, in eval mode."""
    if source.library not in LIBRARIES:
        raise SourceError(f"{source.reference}: this version cannot build models of {source.library!r}.")
    return LIBRARIES[source.library](source)


def token_grid(source: Source, model: nn.Module, pictures: Tensor) -> Tensor:
    """(B, C, rows, columns): the last features of every patch of `model`, built from `source`, before pooling."""
    return TOKENS[source.library](model, pictures)
