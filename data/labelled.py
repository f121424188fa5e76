"""Shards to what is measured on: normalised pictures, with masks and labels where samples hold them."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..core.errors import DataError
from ..core.pictures import denormalise
from .index import ShardIndex, index_shards
from .names import expand
from .order import order
from .pictures import decode, reason
from .tar import MASKS

__all__ = ["Images", "Pictures", "Preparation", "class_indices", "find_pictures", "read_pictures"]

NUMBER = re.compile(r"[-+]?\d*\.?\d+(?:e[-+]?\d+)?", re.IGNORECASE)


class Preparation(Protocol):
    """How a picture becomes a model's input, such as `convert.Preprocess`."""

    @property
    def mean(self) -> tuple[float, float, float]: ...

    @property
    def std(self) -> tuple[float, float, float]: ...

    def transform(self) -> Callable[[Image.Image], Tensor]: ...


class Images(Protocol):
    """N normalised pictures: a tensor (N, 3, H, W), or what reads them when they are asked for."""

    def __len__(self) -> int: ...

    def split(self, split_size: int, /) -> Iterable[Tensor]:
        """Batches (B, 3, H, W) in order, the last one however small."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class Pictures:
    """What to measure on.

    Attributes:
        images: (N, 3, H, W) normalised; pictures for fidelity alone may be read batch by batch.
        keys: names of the pictures.
        masks: (N, H, W) in [0, 1], or None.
        labels: (N,) classes; `label_names` may name them.
        labels_are_classes: whether a label is an index of the classifier's outputs.
        digest: of pictures and preprocessing, for caches.
    """

    images: Any  # Tensor or Images
    keys: tuple[str, ...]
    masks: Tensor | None = None
    labels: Tensor | None = None
    label_names: tuple[str, ...] | None = None
    labels_are_classes: bool = False
    digest: str | None = None

    def __post_init__(self) -> None:
        if not len(self.images):
            raise DataError("There are no pictures to evaluate on. Pass --data with some.")
        if self.masks is not None and self.masks.shape != (len(self.images), *self.images.shape[-2:]):
            raise DataError(
                f"Masks {tuple(self.masks.shape)} do not fit pictures {tuple(self.images.shape)}: a mask is as high "
                "and as wide as its picture."
            )

    def __len__(self) -> int:
        return len(self.images)


@dataclasses.dataclass(frozen=True, eq=False)
class Decoded:
    """Pictures of an index, read when they are asked for: as many as there are need not fit into memory."""

    index: ShardIndex
    positions: Sequence[int]
    transform: Callable[[Image.Image], Tensor]

    def __len__(self) -> int:
        return len(self.positions)

    def split(self, split_size: int, /) -> Iterator[Tensor]:
        for start in range(0, len(self), split_size):
            batch = self.positions[start : start + split_size]
            yield torch.stack([self.transform(_picture(self.index, i)) for i in batch])


def find_pictures(data: str | Path | Sequence[str | Path]) -> ShardIndex:
    """The index of shards; raises DataError where there are none."""
    return index_shards(expand(data))


def read_pictures(
    index: ShardIndex,
    preprocess: Preparation,
    *,
    count: int | None = None,
    masks: bool = False,
    label: str | None = None,
    seed: int = 0,
) -> Pictures:
    """The pictures of an index.

    Args:
        count: so many pictures, drawn by `seed`, read into memory; None: all, read batch by batch.
        masks: read the mask of every sample, or draw it from its box.
        label: key of the label in a sample's json; or `cls`, its member.

    Raises:
        DataError: a picture cannot be read; a mask is missing or of another size; a label is missing.
    """
    positions = list(range(len(index)))
    if count is not None and count < len(index):
        positions = sorted(int(i) for i in order(len(index), seed, 0)[:count])
    transform = preprocess.transform()
    lazy = Decoded(index, positions, transform)
    digest = None if count is not None else f"{index.digest} {preprocess}"
    labels, names = _labels(index, positions, label) if label else (None, None)
    return Pictures(
        lazy if count is None else torch.cat(list(lazy.split(64))),
        tuple(index.key(i) for i in positions),
        torch.stack([_mask(index, i, preprocess, transform) for i in positions]) if masks else None,
        labels,
        names,
        digest=digest,
    )


def class_indices(pictures: Pictures, classes: int) -> Pictures:
    """The same pictures; label numbers count as a classifier's own `classes`, of which other models have 0."""
    if pictures.labels is None or pictures.label_names is not None or not classes:
        return pictures
    if (largest := int(pictures.labels.max())) >= classes:
        raise DataError(
            f"A label is {largest}, but the model has {classes} classes, numbered from 0. "
            "Leave --labels out, or pass labels of these classes."
        )
    return dataclasses.replace(pictures, labels_are_classes=True)


def _picture(index: ShardIndex, i: int) -> Image.Image:
    try:
        return decode(index.read(i))
    except Exception as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{index.key(i)} in {index.file(i).path} is no picture that can be read: {reason(error)}."
        ) from error


def _mask(index: ShardIndex, i: int, preprocess: Preparation, transform: Callable[[Image.Image], Tensor]) -> Tensor:
    """(H, W) in [0, 1], through the picture's own resizing and cropping."""
    size = _picture(index, i).size
    kind = next((name for name in MASKS if name in index.extensions(i)), None)
    if kind is not None:
        mask = decode(index.read(i, kind)).convert("L")
    elif (box := _facts(index, i).get("box")) is not None:
        mask = Image.new("L", size)
        ImageDraw.Draw(mask).rectangle([float(edge) for edge in box], fill=255)
    else:
        raise DataError(
            f"--masks: {index.key(i)} in {index.file(i).path} has no {MASKS[0]}, and no box [left, top, right, bottom] "
            "in its json. Pass shards whose samples have one, or leave --masks out."
        )
    if mask.size != size:
        raise DataError(
            f"--masks: {index.key(i)} in {index.file(i).path}: the mask has {mask.size[0]}x{mask.size[1]} pixels, its "
            f"picture {size[0]}x{size[1]}. A mask must be as large as its picture."
        )
    seen = transform(Image.merge("RGB", [mask] * 3))
    return denormalise(seen, preprocess.mean, preprocess.std).mean(0).clamp(0, 1)


def _facts(index: ShardIndex, i: int) -> dict[str, Any]:
    """The json of a sample; empty where it has none."""
    if "json" not in index.extensions(i):
        return {}
    try:
        found = json.loads(index.read(i, "json"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{index.key(i)}.json in {index.file(i).path} is not JSON: {error}.") from error
    return found if isinstance(found, dict) else {}


def _labels(index: ShardIndex, positions: Sequence[int], key: str) -> tuple[Tensor, tuple[str, ...] | None]:
    """(N,) labels, and their names where they are words."""

    def label(i: int) -> Any:
        found = index.read(i, "cls").decode().strip() if key == "cls" and "cls" in index.extensions(i) else None
        found = _facts(index, i).get(key) if found is None else found
        if found is None:
            raise DataError(f"--labels {key}: {index.key(i)} in {Path(index.file(i).path).name} has no such label.")
        return found

    values = [str(label(i)) for i in positions]
    whole = [value.isascii() and value.isdecimal() for value in values]
    if all(whole):
        return torch.tensor([int(value) for value in values]), None
    if any(NUMBER.fullmatch(value) for value in values):
        # Were they all taken for names, no number would be the class that it says.
        i, value = next((i, v) for i, v, fits in zip(positions, values, whole, strict=True) if not fits)
        raise DataError(
            f"--labels {key}: {sum(whole):,} of {len(whole):,} labels are class numbers, but {value!r:.40} of "
            f"{index.key(i)} in {Path(index.file(i).path).name} is not. Write a whole number from 0 for every sample, "
            "or a name for every one."
        )
    names = tuple(sorted(set(values)))
    return torch.tensor([names.index(value) for value in values]), names
