"""Shards to what is measured on: normalised pictures, with masks and labels where samples hold them."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..core.errors import DataError
from ..core.pictures import denormalise
from .folders import Skipped
from .index import ShardIndex, index_shards
from .names import expand
from .order import order
from .pictures import decode, pixel_limit, reason
from .progress import say
from .tar import MASKS

__all__ = ["Images", "Pictures", "Preparation", "class_indices", "find_pictures", "read_pictures"]

NUMBER = re.compile(r"[-+]?\d*\.?\d+(?:e[-+]?\d+)?", re.IGNORECASE)


LONGEST_LABEL = 200
MOST_NUMBERS = 32  # levels of grey between 0 and 255 that a mask of numbered objects may have
WANTED = (
    "A mask is 0 outside and 255 (or 1) inside; of numbered objects, pass a mask of the one that is meant, with 0 "
    "elsewhere."
)
# Bytes of pictures, as models take them, that are kept as they are checked; of more, each is decoded when it is used.
IN_MEMORY = 2**28


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
        images: (N, 3, H, W) normalised; many pictures for fidelity alone are read batch by batch.
        keys: names of the pictures.
        masks: (N, H, W) in [0, 1], or None.
        labels: (N,) classes; `label_names` may name them.
        labels_are_classes: whether a label is an index of the classifier's outputs.
        digest: of pictures and preprocessing, for caches.
        skipped: pictures that could not be read, which are in none of the above.
    """

    images: Any  # Tensor or Images
    keys: tuple[str, ...]
    masks: Tensor | None = None
    labels: Tensor | None = None
    label_names: tuple[str, ...] | None = None
    labels_are_classes: bool = False
    digest: str | None = None
    skipped: tuple[Skipped, ...] = ()

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
    max_pixels: int

    def __len__(self) -> int:
        return len(self.positions)

    def rows(self, index: Sequence[int]) -> Decoded:
        """Some of the pictures, in that order."""
        return dataclasses.replace(self, positions=[self.positions[i] for i in index])

    def split(self, split_size: int, /) -> Iterator[Tensor]:
        for start in range(0, len(self), split_size):
            batch = self.positions[start : start + split_size]
            yield torch.stack([self.transform(_picture(self.index, i, self.max_pixels)) for i in batch])


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
    max_pixels: int | None = None,
) -> Pictures:
    """The pictures of an index that can be read; others are skipped, with a DataWarning, and listed.

    Args:
        count: so many pictures, drawn by `seed`, read into memory; None: all, read batch by batch where they are many.
        masks: read the mask of every sample, or draw it from its box: 0 outside, 255 or 1 inside, or colours, as
            palettes have. Pictures whose mask is empty are skipped.
        label: key of the label in a sample's json; or `cls`, its member.
        max_pixels: see `pixel_limit`.

    Raises:
        DataError: none of the pictures can be read; a mask is missing, of another size or of
            other values; a label is missing.
    """
    limit, transform = pixel_limit(max_pixels), preprocess.transform()
    drawn = range(len(index)) if count is None or count >= len(index) else map(int, order(len(index), seed, 0))

    one = transform(Image.new("RGB", (64, 64)))
    kept = count is not None or len(index) * one.numel() * one.element_size() <= IN_MEMORY
    images: dict[int, Tensor] = {}  # of a few, which are kept as they are checked, and so decoded once
    seen: dict[int, Tensor] = {}

    def check(i: int) -> None:
        picture = _picture(index, i, limit)
        if masks:
            mask = _mask(index, i, picture.size, preprocess, transform, limit)
            if not (mask > 0.5).any():
                name = f"{index.key(i)} in {index.file(i).path}"
                raise _Broken(name, "nothing of what the model sees is in its mask", "cannot be used")
            seen[i] = mask
        if kept:
            images[i] = transform(picture)

    positions, skipped = _readable(drawn, len(index) if count is None else count, check)
    digest = None if count is not None else f"{index.digest} {preprocess}"
    if digest and skipped:
        digest += f" {hashlib.sha256(repr(positions).encode()).hexdigest()}"
    labels, names = _labels(index, positions, label) if label else (None, None)
    return Pictures(
        torch.stack([images[i] for i in positions]) if kept else Decoded(index, positions, transform, limit),
        tuple(index.key(i) for i in positions),
        torch.stack([seen[i] for i in positions]) if masks else None,
        labels,
        names,
        digest=digest,
        skipped=skipped,
    )


def _readable(drawn: Iterable[int], count: int, check: Callable[[int], None]) -> tuple[list[int], tuple[Skipped, ...]]:
    """The first `count` of `drawn` that can be read, in the order of the index, and those before them that cannot.

    `check` raises _Broken for one that cannot. It decodes each, as a broken file shows only then: numbers must not
    depend on how far one came.
    """

    def fault(i: int) -> _Broken | None:
        try:
            check(i)
        except _Broken as error:
            return error
        return None

    positions: list[int] = []
    broken: list[_Broken] = []
    remaining = iter(drawn)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while len(positions) < count and (batch := list(itertools.islice(remaining, min(256, count - len(positions))))):
            for i, found in zip(batch, pool.map(fault, batch), strict=True):
                positions.append(i) if found is None else broken.append(found)
    if broken and not positions:
        raise DataError(f"None of the {len(broken)} pictures can be read. The first: {broken[0]}")
    if broken:
        say(f"{len(broken)} of {len(broken) + len(positions)} pictures were skipped. The first: {broken[0]}")
    return sorted(positions), tuple(Skipped(one.name, one.reason) for one in broken)


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


class _Broken(DataError):
    """A picture, by its key and shard, that cannot be read, and why."""

    def __init__(self, name: str, reason: str, fault: str = "is no picture that can be read") -> None:
        super().__init__(f"{name} {fault}: {reason}.")
        self.name, self.reason = name, reason


def _picture(index: ShardIndex, i: int, limit: int, kind: str | None = None) -> Image.Image:
    """The picture of sample i, or its member `kind`."""
    data = index.read(i, kind)
    try:
        return decode(data, "", limit)
    except Exception as error:
        ending = "" if kind is None else f".{kind}"
        raise _Broken(f"{index.key(i)}{ending} in {index.file(i).path}", reason(error)) from error


def _mask(
    index: ShardIndex,
    i: int,
    size: tuple[int, int],
    preprocess: Preparation,
    transform: Callable[[Image.Image], Tensor],
    limit: int,
) -> Tensor:
    """(H, W) in [0, 1], through the resizing and cropping of its picture, which has `size` (width, height)."""
    kind = next((name for name in MASKS if name in index.extensions(i)), None)
    if kind is not None:
        name = f"{index.key(i)}.{kind} in {index.file(i).path}"
        mask = _levels(_picture(index, i, limit, kind), name)
        _check_palette(index.read(i, kind), name)
    elif (box := _facts(index, i).get("box")) is not None:
        mask = Image.new("L", size)
        ImageDraw.Draw(mask).rectangle(_edges(box, size, f"{index.key(i)}.json in {index.file(i).path}"), fill=255)
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


def _levels(mask: Image.Image, name: str) -> Image.Image:
    """A mask with 0 outside and 255 inside, of an RGB picture that has 1 inside, or colours, as a palette has.

    Raises DataError for values whose meaning is anybody's guess: they would be cut at one half, and count as outside.
    """
    colours = np.asarray(mask)
    levels, largest = colours.max(-1), int(colours.max())
    if largest <= 1 or (colours != levels[..., None]).any():
        return Image.fromarray(np.where(levels > 0, 255, 0).astype(np.uint8))
    between = levels[(levels > 0) & (levels < 255)]
    numbers = np.unique(between)
    few = len(numbers) <= MOST_NUMBERS  # a soft edge has more levels
    if largest < 128 or (few and largest < 255):
        raise DataError(f"--masks: the largest value of {name} is {largest}. {WANTED}")
    if few and len(numbers) and (numbers[-1] < 128 or len(between) > (levels == 255).sum()):
        raise _void(name, numbers)
    return Image.fromarray(levels)


def _check_palette(data: bytes, name: str) -> None:
    """Raises DataError for a mask of a palette that has 255 beside other numbers."""
    with Image.open(io.BytesIO(data)) as mask:  # it was decoded before
        numbers = np.unique(np.asarray(mask)) if mask.mode == "P" else np.zeros(0)
    if 255 in numbers and len(others := numbers[(numbers > 0) & (numbers < 255)]):
        raise _void(name, others)


def _void(name: str, numbers: np.ndarray) -> DataError:
    found = ", ".join(map(str, numbers[:3])) + (", ..." if len(numbers) > 3 else "")
    return DataError(
        f"--masks: {name} has 255 beside {found}. In masks of numbered objects, such as Pascal VOC's, 255 is a border "
        f"that belongs to nothing: it is neither inside nor outside. {WANTED}"
    )


def _edges(box: Any, size: tuple[int, int], name: str) -> list[float]:
    """A box [left, top, right, bottom] in pixels; raises DataError where it is none of a picture of this size."""
    numbers = isinstance(box, list) and all(type(edge) in (int, float) and abs(edge) < 2**31 for edge in box)
    edges = [float(edge) for edge in box] if numbers and len(box) == 4 else []
    if edges:
        (left, top, right, bottom), (width, height) = edges, size
        if all(map(math.isfinite, edges)) and left <= right and top <= bottom:
            if left < width and top < height and right >= 0 and bottom >= 0:
                return edges
    raise DataError(
        f"--masks: the box of {name} is {repr(box)[:80]}; it must be [left, top, right, bottom] in pixels of its "
        f"picture of {size[0]} x {size[1]}."
    )


def _facts(index: ShardIndex, i: int) -> dict[str, Any]:
    """The json of a sample; empty where it has none."""
    if "json" not in index.extensions(i):
        return {}
    try:
        found = json.loads(index.read(i, "json"))
    except (ValueError, RecursionError) as error:  # also numbers of too many digits, and lists in lists without end
        raise DataError(f"{index.key(i)}.json in {index.file(i).path} is not JSON: {error}.") from error
    return found if isinstance(found, dict) else {}


def _labels(index: ShardIndex, positions: Sequence[int], key: str) -> tuple[Tensor, tuple[str, ...] | None]:
    """(N,) labels, and their names where they are words."""

    def label(i: int) -> str:
        name = f"{index.key(i)} in {Path(index.file(i).path).name}"
        if key == "cls" and "cls" in index.extensions(i):
            found = index.read(i, "cls").decode("utf-8", "replace").strip()
        elif (found := _facts(index, i).get(key)) is None:
            raise DataError(f"--labels {key}: {name} has no such label.")
        if not isinstance(found, str | int) or len(text := str(found)) > LONGEST_LABEL:
            raise DataError(
                f"--labels {key}: the label of {name} is {repr(found)[:80]}; it must be a number or a word of at most "
                f"{LONGEST_LABEL} characters."
            )
        return text

    values = [label(i) for i in positions]
    # More digits than a tensor holds are no class number either.
    whole = [value.isascii() and value.isdecimal() and len(value) < 19 for value in values]
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
