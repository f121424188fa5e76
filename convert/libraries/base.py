"""What a model library is to us: the records that its models are reduced to, its descriptor, and the one registry.

A library is a folder beside this file, whose `__init__.py` has a `LIBRARY` (see `Library`), and a line in
`libraries/__init__.py`. All that differs between libraries is asked of its descriptor, by `Source.library`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

from ...core.errors import SourceError, first_line, near_miss
from ...core.pictures import THIN, denormalise, normalise, without_ends
from ...core.settings import faults
from ...data.pictures import as_rgb
from .opened import Opened
from .text import Text, TextTower

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
    "Origin",
    "Preprocess",
    "Scheme",
    "Source",
    "Teacher",
    "call_first",
    "find_library",
    "register",
    "register_schemes",
    "transforms",
]

# ------------------------------------------------------------------------------------------------------- the records

# What a model's outputs may be (see `output.OutputKind`).
CLASSES, LABELS, REGRESSION, FEATURES = "classes", "multi-label", "regression", "features"


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model comes from, enough to rebuild its empty skeleton without the network.

    Attributes:
        reference: what the user typed, such as `timm:resnet50.a1_in1k`.
        library: the library that builds the skeleton; key of `LIBRARIES`.
        architecture: the library's name of the architecture.
        model_args: keyword arguments of its constructor; JSON values only.
        revision: resolved commit of the weights, where the source has one.
        weights: None for the published ones, `random`, or the sha256 of the user's own file.
    """

    reference: str
    library: str
    architecture: str
    model_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    revision: str | None = None
    weights: str | None = None


# Sides in pixels, and shares of the resized picture, beyond which a record is not believed.
LARGEST, LEAST_CROP, MOST_CROP = 2**14, 0.05, 20.0
# What libraries raise on an interpolation or a crop mode that they do not know.
UNKNOWN = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """How the source library turns a picture into the model's input; stored with the model.

    Attributes:
        size: (height, width) in pixels.
        mean, std: per channel, on the [0, 1] scale.
        interpolation: `bicubic`, `bilinear`, ...
        crop_pct: share of the resized picture that the crop keeps, in (0, 1].
        crop_mode: timm's `center`, `squash` or `border`.
        library: whose arithmetic resizes and crops, a key of a library's `transforms`: they differ by a pixel here
            and there.
        fill: grey level of the border that open_clip adds; timm's has the colour `mean`.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"
    library: str = "timm"
    fill: int = 0

    @classmethod
    def from_json(cls, record: Any) -> Preprocess:
        """What a record of strangers says; raises ValueError for what is of another kind, or out of its range."""
        if wrong := list(faults(cls, record, "preprocess")):
            raise ValueError("; ".join(wrong[:5]))
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record.items()}
        return cls(**values).checked()

    def checked(self) -> Preprocess:
        """This record; raises ValueError where a value is out of its range, so that a picture would take no end.

        The one place where that is asked, of records and of what libraries say.
        """
        wrong = []
        if len(self.size) != 2 or not all(isinstance(side, int) and 1 <= side <= LARGEST for side in self.size):
            wrong.append(f"size {self.size}: two sides from 1 to {LARGEST} pixels")
        elif not LEAST_CROP <= self.crop_pct <= MOST_CROP or max(self.size) / self.crop_pct > LARGEST:
            wrong.append(f"crop_pct {self.crop_pct}: from {LEAST_CROP:g} to {MOST_CROP:g}, and of no larger picture")
        if len(self.mean) != 3 or not all(abs(value) <= LARGEST for value in self.mean):
            wrong.append(f"mean {self.mean}: three numbers")
        if len(self.std) != 3 or not all(1 / LARGEST <= value <= LARGEST for value in self.std):
            wrong.append(f"std {self.std}: three numbers above 0")
        if not wrong:
            try:
                self.transform()
            except UNKNOWN as error:
                raise ValueError(f"no pictures can be prepared with {self}: {first_line(error)}") from error
            return self
        raise ValueError(f"no pictures can be prepared with {'; '.join(wrong)}")

    def at(self, size: int | tuple[int, int] | None) -> Preprocess:
        """The same record at another size; None keeps it."""
        if size is None:
            return self
        return dataclasses.replace(self, size=(size, size) if isinstance(size, int) else size)

    def transform(self) -> Callable[[Image.Image], Tensor]:
        """The evaluation transform: PIL picture -> normalised (3, H, W), as the source library makes it of RGB.

        Every picture becomes upright RGB first, by the rules of `data.pictures`.
        """
        known = transforms()
        if self.library not in known:
            raise SourceError(f"this version cannot prepare pictures as {self.library!r} does; update bcosify.")
        transform = known[self.library](self)
        if self.crop_mode == "squash":
            return lambda picture: transform(as_rgb(picture))
        if self.crop_mode != "center":  # the whole picture, unless less than a pixel of its shorter side would be left
            return lambda picture: transform(without_ends(as_rgb(picture), min(self.size) - 4))
        longest = THIN * max(self.size) / min(self.size)
        return lambda picture: transform(without_ends(as_rgb(picture), longest))

    def normalise(self, colours: Tensor) -> Tensor:
        """Colours (..., 3, H, W) in [0, 1] as the model takes them."""
        return normalise(colours, self.mean, self.std)

    def denormalise(self, pictures: Tensor) -> Tensor:
        """Normalised pictures (..., 3, H, W) as colours in [0, 1], but for rounding."""
        return denormalise(pictures, self.mean, self.std)

    def seen(self, picture: Tensor) -> Image.Image:
        """One normalised picture (3, H, W) as the model sees it: cropped and resized, in its own colours."""
        return to_pil_image(self.denormalise(picture.detach().cpu().float()).clamp(0, 1))


@dataclasses.dataclass(frozen=True, repr=False)
class Teacher(Opened):
    """A pretrained model in eval mode, with what is needed to rebuild it and to feed it.

    Attributes:
        model: takes a normalised picture (B, 3, H, W), returns logits, an embedding or a pooled feature (B, D).
        labels: one name a class, or None where the classes have no names or the model has no classifier.
        text: the text tower whose embeddings `model`'s are compared with, where there is one.
        output: what its outputs are, where `Library.output` does not find it out from the source.
        named_by: where `labels` come from, in words.
    """

    model: nn.Module
    source: Source
    preprocess: Preprocess
    labels: tuple[str, ...] | None = None
    text: Text | None = None
    output: str | None = None
    named_by: str = ""


class Features(NamedTuple):
    """What a library calls the features of pictures.

    Attributes:
        last: the last features before pooling, as the library lays them out; None where it does not show them.
        pooled: (B, D) what is pooled of them.
        embeds: (B, D) the embedding of a dual encoder.
    """

    last: Tensor | None
    pooled: Tensor | None
    embeds: Tensor | None = None


class Origin(NamedTuple):
    """Where published weights come from: what a model card says of their licence, or where it is said.

    Attributes:
        name: how a card names them.
        repo, revision: the hub repository whose card says more.
        folder: the local folder whose card says more.
        licence: the hub's identifier, where the library itself records it.
        found: where that was read, in words.
    """

    name: str
    repo: str | None = None
    revision: str | None = None
    folder: Path | None = None
    licence: str | None = None
    found: str = ""


# ---------------------------------------------------------------------------------------------------- the descriptor


def _reference(name: str, source: Source) -> Origin:
    return Origin(source.reference)


@dataclasses.dataclass(frozen=True)
class Scheme:
    """What a reference `SCHEME:NAME` begins with, and what opens it.

    Attributes:
        forms: how references are spelt, for help texts, such as `timm:NAME[.TAG]`.
        models: what they name, in words, such as `timm models`.
        load: (NAME, pretrained=, weights=, and `options`) -> Teacher; raises SourceError.
        origin: (NAME, source) -> where the published weights come from.
        options: name -> the value that asks for nothing, of what `load` takes beside `pretrained` and `weights`.
            `image_size` belongs here where the model has to be built at its size; all references take it.
        takes_revision: `NAME@REVISION` is understood without `hf-hub:` in front.
    """

    name: str
    forms: tuple[str, ...]
    models: str
    load: Callable[..., Teacher]
    origin: Callable[[str, Source], Origin] = _reference
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    takes_revision: bool = False


class FolderMark(NamedTuple):
    """How a library's own model folders are told from others.

    Attributes:
        words: the file that the library writes, in words.
        fits: (folder, what its config.json holds or {}) -> whether it is one.
    """

    words: str
    fits: Callable[[Path, Mapping[str, Any]], bool]


class Door(NamedTuple):
    """How a library itself opens a student, once `bcosify.publish` has made the student known to it.

    Attributes:
        call: the expression; `{name}` is a place as `hf-hub:ORG/REPO` or `local-dir:FOLDER`, `{place}` the bare one.
        lines: the same for a model card; `{repo}` is ORG/REPO, `{auto}` the auto class of transformers.
        everyone: it opens students of all libraries, and not only of its own.
        pairs: it opens only students that have a text tower.
    """

    call: str
    lines: str
    everyone: bool = False
    pairs: bool = False


def call_first(model: nn.Module, method: str, *arguments: Any) -> bool:
    """Calls `method` of the first module of `model` that has it; False where none has."""
    for module in model.modules():
        if hasattr(module, method):
            getattr(module, method)(*arguments)
            return True
    return False


def _set_grad_checkpointing(model: nn.Module, on: bool) -> bool:
    """As timm spells it, and those who follow it."""
    return call_first(model, "set_grad_checkpointing", on)


def _no_options(source: Source) -> dict[str, Any]:
    return {}


def _no_files(folder: Path, preprocess: Preprocess) -> dict[str, Any]:
    return {}


def _no_grid(model: nn.Module, pictures: Tensor) -> Tensor:
    raise SourceError(f"{type(model).__name__} is of a library that does not show the features of its patches.")


def _num_classes(source: Source, model: nn.Module) -> int:
    return getattr(model, "num_classes", 0) or 0


def _kind(source: Source, count: int) -> str:
    return CLASSES if count > 1 else REGRESSION if count else FEATURES


def _as_recorded(source: Source, model: nn.Module) -> None:
    return None


def _features(network: nn.Module, pictures: Tensor, has_classes: bool) -> Features:
    output = network(pictures)
    return Features(None, None if has_classes else output)


@dataclasses.dataclass(frozen=True)
class Library:
    """All that differs between one library of models and another. What has a default may be left out.

    Attributes:
        name: key of `LIBRARIES`, recorded as `Source.library`.
        schemes: what references to its models begin with; `dir:PATH` is opened as the first one's `local-dir:PATH`.
        build: source -> the empty model, in eval mode: random weights, no network.
        transforms: `Preprocess.library` -> what prepares a picture by such a record, as the library does.
        token_grid: (model, pictures (B, 3, H, W)) -> (B, C, rows, columns), the last features of every patch, in front
            of pooling; raises SourceError where they cannot be had.
        class_count: (source, model) -> how many outputs its head has; 0 for features and embeddings.
        output: (source, that count) -> what they are; see `output.output_kind`, which is where to ask.
        own_head: (source, model) -> (the source that builds a head of as many outputs as that of `model` has, how
            many), where it was given another one than `source` builds; else None.
        features: (network, pictures, whether its outputs are logits) -> `Features`.
        open_text: (folder, facts) -> the text tower that was saved there, with random weights; None without such.
        load_options: source -> the options of its scheme that make its teacher again.
        student_files: (student's folder with its text tower in it, preprocess) -> file name -> JSON values, of what the
            library reads beside config.json. The names are those that `hub.FETCHED` lists.
        set_checkpointing: (model, on) turns the library's own gradient checkpointing on or off; False where the model
            does not know it.
        folder: how its model folders are recognised, for `dir:PATH`.
        door: how it opens a student itself.
    """

    name: str
    schemes: tuple[Scheme, ...]
    build: Callable[[Source], nn.Module]
    transforms: Mapping[str, Callable[[Preprocess], Callable[[Image.Image], Tensor]]] = dataclasses.field(
        default_factory=dict
    )
    token_grid: Callable[[nn.Module, Tensor], Tensor] = _no_grid
    class_count: Callable[[Source, nn.Module], int] = _num_classes
    output: Callable[[Source, int], str] = _kind
    own_head: Callable[[Source, nn.Module], tuple[Source, int] | None] = _as_recorded
    features: Callable[[Any, Tensor, bool], Features] = _features
    open_text: Callable[[Path, Mapping[str, Any]], TextTower] | None = None
    load_options: Callable[[Source], dict[str, Any]] = _no_options
    student_files: Callable[[Path, Preprocess], dict[str, Any]] = _no_files
    set_checkpointing: Callable[[nn.Module, bool], bool] = _set_grad_checkpointing
    folder: FolderMark | None = None
    door: Door | None = None


# ------------------------------------------------------------------------------------------------------ the registry

LIBRARIES: dict[str, Library] = {}
# Scheme -> what opens it; `bundled` is one whose models are another library's.
SCHEMES: dict[str, Scheme] = {}
# Opens a folder of any library (see `references`).
DIR = "dir"


def register(library: Library) -> None:
    """Adds a library, with its schemes; raises ValueError where a name is taken."""
    taken = {name for other in LIBRARIES.values() for name in (other.name, *other.transforms)}
    if twice := taken & {library.name, *library.transforms}:
        raise ValueError(f"library {library.name!r}: {', '.join(sorted(twice))} is registered already.")
    register_schemes(*library.schemes)
    LIBRARIES[library.name] = library


def transforms() -> dict[str, Callable[[Preprocess], Callable[[Image.Image], Tensor]]]:
    """Name of an arithmetic that resizes and crops -> what makes a record's transform of RGB pictures."""
    return {name: make for library in LIBRARIES.values() for name, make in library.transforms.items()}


def register_schemes(*schemes: Scheme) -> None:
    """Adds schemes, whose models are those of a registered library; raises ValueError where a name is taken."""
    for scheme in schemes:
        if scheme.name in (*SCHEMES, DIR):
            raise ValueError(f"the scheme {scheme.name!r} is registered already.")
    SCHEMES.update({scheme.name: scheme for scheme in schemes})


def find_library(name: str, what: str = "knows no library") -> Library:
    """The library of that name; raises SourceError that begins with `this version` and `what`."""
    if name not in LIBRARIES:
        known = ", ".join(LIBRARIES)
        raise SourceError(
            f"this version {what} {name!r}.{near_miss(name, LIBRARIES)} It knows {known}. Update bcosify."
        )
    return LIBRARIES[name]
