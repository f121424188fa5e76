"""What every source library is reduced to: a Source that can be rebuilt, a Preprocess record, and the Teacher."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from PIL import Image
from torch import Tensor, nn

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
    """

    reference: str
    library: str
    architecture: str
    model_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    revision: str | None = None


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """How the source library turns a picture into the model's input; stored with the model.

    Attributes:
        size: (height, width) in pixels.
        mean, std: per channel, on the [0, 1] scale.
        interpolation: `bicubic`, `bilinear`, ...
        crop_pct: share of the resized picture that the crop keeps, in (0, 1].
        crop_mode: timm's `center`, `squash` or `border`.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"

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
        """The evaluation transform: PIL picture -> normalised (3, H, W), as timm makes it."""
        # Here, because `import bcosify.convert` should stay light.
        from timm.data.transforms_factory import create_transform

        transform = create_transform(
            (3, *self.size),
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
        )
        return lambda picture: transform(picture.convert("RGB"))  # type: ignore[operator, return-value]


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A pretrained model in eval mode, with what is needed to rebuild it and to feed it.

    Attributes:
        model: takes a normalised picture (B, 3, H, W).
        labels: one name a class, or None where the classes are unknown or the model has no classifier.
    """

    model: nn.Module
    source: Source
    preprocess: Preprocess
    labels: tuple[str, ...] | None = None
