"""What every source library is reduced to: a Source that can be rebuilt, a Preprocess record, and the Teacher."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

from PIL import Image
from torch import Tensor, nn

from ...core.errors import SourceError
from ...core.pictures import THIN, denormalise, normalise, without_ends
from .text import Text

__all__ = ["Preprocess", "Source", "Teacher"]


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model comes from, enough to rebuild its empty skeleton without the network.

    Attributes:
        reference: what the user typed, such as `timm:resnet50.a1_in1k`.
        library: the library that builds the skeleton; key of `sources.LIBRARIES`.
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


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """How the source library turns a picture into the model's input; stored with the model.

    Attributes:
        size: (height, width) in pixels.
        mean, std: per channel, on the [0, 1] scale.
        interpolation: `bicubic`, `bilinear`, ...
        crop_pct: share of the resized picture that the crop keeps, in (0, 1].
        crop_mode: timm's `center`, `squash` or `border`.
        library: whose arithmetic resizes and crops, a key of `TRANSFORMS`: they differ by a pixel here and there.
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
    def from_json(cls, record: dict[str, Any]) -> Preprocess:
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record.items()}
        return cls(**values)

    def at(self, size: int | tuple[int, int] | None) -> Preprocess:
        """The same record at another size; None keeps it."""
        if size is None:
            return self
        return dataclasses.replace(self, size=(size, size) if isinstance(size, int) else size)

    def transform(self) -> Callable[[Image.Image], Tensor]:
        """The evaluation transform: PIL picture -> normalised (3, H, W), as the source library makes it."""
        if self.library not in TRANSFORMS:
            raise SourceError(f"this version cannot prepare pictures as {self.library!r} does; update bcosify.")
        transform = TRANSFORMS[self.library](self)
        if self.crop_mode != "center":  # the others show the whole picture
            return lambda picture: transform(picture.convert("RGB"))
        longest = THIN * max(self.size) / min(self.size)
        return lambda picture: transform(without_ends(picture.convert("RGB"), longest))

    def normalise(self, colours: Tensor) -> Tensor:
        """Colours (..., 3, H, W) in [0, 1] as the model takes them."""
        return normalise(colours, self.mean, self.std)

    def denormalise(self, pictures: Tensor) -> Tensor:
        """Normalised pictures (..., 3, H, W) as colours in [0, 1], but for rounding."""
        return denormalise(pictures, self.mean, self.std)


# Imports are inside, because `import bcosify.convert` should stay light.


def _timm_transform(record: Preprocess) -> Callable[[Image.Image], Tensor]:
    from timm.data.transforms_factory import create_transform

    transform: Any = create_transform(
        (3, *record.size),
        interpolation=record.interpolation,
        mean=record.mean,
        std=record.std,
        crop_pct=record.crop_pct,
        crop_mode=record.crop_mode,
    )
    return cast(Callable[[Image.Image], Tensor], transform)


def _open_clip_transform(record: Preprocess) -> Callable[[Image.Image], Tensor]:
    from open_clip import image_transform

    transform: Any = image_transform(
        record.size,
        is_train=False,
        mean=record.mean,
        std=record.std,
        interpolation=record.interpolation,
        resize_mode={"center": "shortest", "border": "longest", "squash": "squash"}[record.crop_mode],
        fill_color=record.fill,
    )
    return cast(Callable[[Image.Image], Tensor], transform)


def _transformers_transform(record: Preprocess, as_floats: bool = False) -> Callable[[Image.Image], Tensor]:
    """What transformers' torchvision processors do: resize the bytes, crop at the lower of two middles, normalise.

    DINOv3's resizes floats, which are not rounded to grey levels then.
    """
    from torchvision.transforms import v2

    resized = [math.floor(side / record.crop_pct + 1e-6) for side in record.size]
    size = resized if record.crop_mode == "squash" else [max(resized)]

    def crop(picture: Tensor) -> Tensor:
        height, width = record.size
        top, left = (picture.shape[-2] - height) // 2, (picture.shape[-1] - width) // 2
        return v2.functional.crop(picture, top, left, height, width)

    return v2.Compose(
        [
            v2.PILToTensor(),
            v2.Lambda(lambda picture: picture.float() if as_floats else picture),
            v2.Resize(size, v2.InterpolationMode(record.interpolation), antialias=True),
            crop,
            v2.Lambda(lambda picture: picture.float() / 255),
            v2.Normalize(record.mean, record.std),
        ]
    )


TRANSFORMS: dict[str, Callable[[Preprocess], Callable[[Image.Image], Tensor]]] = {
    "timm": _timm_transform,
    "open_clip": _open_clip_transform,
    "transformers": _transformers_transform,
    "transformers-float": partial(_transformers_transform, as_floats=True),
}


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A pretrained model in eval mode, with what is needed to rebuild it and to feed it.

    Attributes:
        model: takes a normalised picture (B, 3, H, W), returns logits, an embedding or a pooled feature (B, D).
        labels: one name a class, or None where the classes are unknown or the model has no classifier.
        text: the text tower whose embeddings `model`'s are compared with, where there is one.
    """

    model: nn.Module
    source: Source
    preprocess: Preprocess
    labels: tuple[str, ...] | None = None
    text: Text | None = None
