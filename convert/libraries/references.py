"""References to pretrained models: `SCHEME:NAME` -> Teacher, with the options that each scheme declares.

Inside every scheme `hf-hub:ORG/NAME[@rev]` and `local-dir:PATH` say where the model lies, as far as its library knows
them. `dir:PATH` is a local folder of any library: the files in it decide which.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...core.errors import SourceError, near_miss, translated
from ...core.files import file_digest, read_json
from .base import DIR, LIBRARIES, SCHEMES, Origin, Scheme, Source, Teacher, find_library
from .weights import check_plain

__all__ = ["build", "load_teacher", "origin_of", "reference_forms", "reload_teacher", "token_grid", "with_own_head"]

RANDOM = "random"
LOCAL, HUB = "local-dir:", "hf-hub:"


def load_teacher(
    reference: str,
    *,
    pretrained: bool = True,
    weights: str | Path | None = None,
    image_size: int | None = None,
    **options: Any,
) -> Teacher:
    """The pretrained model that `reference` names, in eval mode.

    Args:
        reference: `timm:NAME[.TAG]`, `open_clip:ARCH/TAG`, `hf:ORG/NAME[@rev]`, `dir:PATH`, `bundled:NAME`.
        pretrained: False keeps random weights (no network).
        weights: a safetensors state dict of the same architecture, used in place of the published weights.
        image_size: side in pixels to feed the model at, where it is not its own.
        options: what only some schemes have (`Scheme.options`): `head`, which output of a transformers model, one of
            `transformers.towers.HEADS`; `auto` takes what its checkpoint was made for.

    Raises:
        SourceError: unknown scheme, name, option or weights; says which are close and what to pass instead.
    """
    scheme, name = _scheme_of(reference)
    if weights is not None and not isinstance(weights, str | Path):
        raise SourceError(
            f"weights is a {type(weights).__name__}, and not a file. Pass a state dict as one: "
            "safetensors.torch.save_file(model.state_dict(), 'mine.safetensors'), then weights='mine.safetensors'. "
            "Published weights are part of the name, as in timm:resnet50.a1_in1k."
        )
    file = None if weights is None else Path(weights)
    if file is not None and not file.is_file():
        raise SourceError(f"--weights {file}: there is no such file.")
    asked = _options_for(scheme, name, {"image_size": image_size, **options})
    teacher = scheme.load(name, pretrained=pretrained, weights=file, **asked)
    check_plain(teacher.model, reference)
    provenance = file_digest(file) if file else None if pretrained else RANDOM
    source = dataclasses.replace(teacher.source, reference=_from_anywhere(reference), weights=provenance)
    with translated(ValueError, SourceError, lambda error: f"{reference}: {error}"):
        preprocess = teacher.preprocess.at(image_size).checked()
    return dataclasses.replace(teacher, source=source, preprocess=preprocess)


def _from_anywhere(reference: str) -> str:
    """A reference that means the same in every working folder: a path in it is made absolute."""
    scheme, _, name = reference.partition(":")
    place = name.removeprefix(LOCAL)
    bare = f"{scheme}:PATH" in reference_forms() and Path(place).expanduser().is_dir()
    if scheme != DIR and not name.startswith(LOCAL) and not bare:
        return reference
    return f"{reference.removesuffix(place)}{Path(place).expanduser().absolute()}"


def reload_teacher(source: Source, weights: str | Path | None = None) -> Teacher:
    """The teacher of `source` again, with the same options and the same weights.

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
    scheme, _ = _scheme_of(reference)
    if source.revision and "@" not in reference and (scheme.takes_revision or f":{HUB}" in reference):
        reference = f"{reference}@{source.revision}"
    return load_teacher(reference, weights=weights, **find_library(source.library).load_options(source))


def build(source: Source) -> nn.Module:
    """The empty skeleton of `source`, in eval mode; raises SourceError where no library of that name is known."""
    return find_library(source.library, "cannot build models of").build(source)


def with_own_head(teacher: Teacher) -> Teacher:
    """`teacher` with a source that builds a classifier of as many classes as its model has, where it was given another.

    Names of classes that do not fit it are left out, with a warning.
    """
    found = find_library(teacher.source.library).own_head(teacher.source, teacher.model)
    if found is None:
        return teacher
    (source, count), labels = found, teacher.labels
    if labels is not None and len(labels) != count:
        warnings.warn(
            f"{source.reference}: {len(labels)} names of classes do not fit a classifier of {count}; it has none then. "
            "Give it its own: dataclasses.replace(teacher, labels=(...)).",
            stacklevel=3,
        )
        labels = None
    return dataclasses.replace(teacher, source=source, labels=labels)


def token_grid(source: Source, model: nn.Module, pictures: Tensor) -> Tensor:
    """(B, C, rows, columns): the last features of every patch of `model`, built from `source`, before pooling.

    Raises:
        SourceError: its library does not show them, or is not known.
    """
    return find_library(source.library).token_grid(model, pictures)


def origin_of(source: Source) -> Origin:
    """Where the published weights of `source` come from."""
    scheme, _, name = source.reference.partition(":")
    if name.startswith(HUB):
        repo, _, revision = name.removeprefix(HUB).partition("@")
        return Origin(repo, repo, revision or source.revision)
    if scheme == DIR or name.startswith(LOCAL):
        place = name.removeprefix(LOCAL)
        return Origin(place, folder=Path(place))
    return SCHEMES[scheme].origin(name, source) if scheme in SCHEMES else Origin(source.reference)


def reference_forms() -> tuple[str, ...]:
    """How references are spelt, for help texts: `timm:NAME[.TAG]` and so on."""
    return (*(form for scheme in SCHEMES.values() for form in scheme.forms), f"{DIR}:PATH")


def _scheme_of(reference: str) -> tuple[Scheme, str]:
    """(scheme, NAME) of a reference; `dir:PATH` is that of the library whose folder it is."""
    scheme, separator, name = reference.partition(":")
    known = (*SCHEMES, DIR)
    if not separator or not name or scheme not in known:
        listed = ", ".join(f"{one}:NAME" for one in known)
        hint = near_miss(scheme, known) if separator else f" Did you mean 'timm:{reference}'?"
        if Path(reference).is_dir():
            hint = f" Did you mean '{DIR}:{reference}'?"
        raise SourceError(f"{reference!r} is not a model reference.{hint} A reference is one of: {listed}.")
    return _scheme_of_folder(name) if scheme == DIR else (SCHEMES[scheme], name)


def _scheme_of_folder(name: str) -> tuple[Scheme, str]:
    """What opens the folder `name`: decided by the files in it."""
    folder = Path(name)
    if not folder.is_dir():
        seen = "" if folder.is_absolute() else f" in {Path.cwd()}"
        raise SourceError(f"dir:{name}: there is no such folder{seen}.")
    if (folder / "bcosify.json").is_file():
        raise SourceError(f"dir:{name} is a converted model already. Use align, explain or inspect on it.")
    config = folder / "config.json"
    values = read_json(config, SourceError) if config.exists() else {}
    if not isinstance(values, dict):
        raise SourceError(f"{config} holds no settings.")
    marked = [(library, library.folder) for library in LIBRARIES.values() if library.folder is not None]
    found = [library.schemes[0] for library, mark in marked if mark.fits(folder, values)]
    if len(found) > 1:
        spelt = " or ".join(f"{scheme.name}:{LOCAL}{name}" for scheme in found)
        kinds = " and ".join(scheme.name for scheme in found)
        raise SourceError(f"dir:{name} is a folder of {kinds} at once. Say which: {spelt}.")
    if not found:
        listed = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        written = ", ".join(f"{library.name} writes {mark.words}" for library, mark in marked)
        raise SourceError(f"dir:{name}: not a model folder that is known here ({written}). Found: {listed}.")
    return found[0], f"{LOCAL}{name}"


def _options_for(scheme: Scheme, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `options` that the scheme declares; raises SourceError for one that it does not have, and that asks."""
    neutral = {"image_size": None} | {key: value for one in SCHEMES.values() for key, value in one.options.items()}
    for key, value in options.items():
        if key not in neutral:
            known = ", ".join(("pretrained", "weights", *neutral))
            raise SourceError(f"no option {key!r}.{near_miss(key, neutral)} There are: {known}.")
        # A model that is not built at a size is still fed at it.
        if key not in scheme.options and value != neutral[key] and key != "image_size":
            owners = " and ".join(f"{one.models} ({one.name}:NAME)" for one in SCHEMES.values() if key in one.options)
            flag = f"--{key.replace('_', '-')} {value}"
            raise SourceError(f"{flag} is for {owners}, not for {scheme.name}:{name}.")
    return {key: value for key, value in options.items() if key in scheme.options}
