"""Whatever people have in hand of pictures, as a model takes it: normalised tensors (B, 3, H, W).

| given | what is taken |
| --- | --- |
| a file, a folder | what is in it, by the rules of `data.pictures`, through the model's own preprocessing |
| a PIL picture | the same |
| an array | colours with the channels last, (H, W, 3), (H, W, 4), (H, W) or (B, H, W, 3): bytes, or floats in [0, 1] |
| a tensor of bytes | colours with the channels first, (3, H, W) or (B, 3, H, W), as torchvision reads them |
| a tensor of floats | normalised already, (3, H, W) or (B, 3, H, W): taken as it is |
| a list of these | all of them, in order |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...core.errors import DataError, TargetError
from ...data.folders import pictures_in
from ...data.pictures import read_picture
from ...data.progress import say

__all__ = ["Prepared", "files_of", "only_files", "prepared"]

Photo = Path | Image.Image | None

TAKEN = (
    "Pictures are files, folders, PIL pictures, arrays (H, W, 3) of colours, normalised tensors (B, 3, H, W), or a "
    "list of these"
)


class Prepared(NamedTuple):
    """Pictures as a model takes them.

    Attributes:
        inputs: (B, 3, H, W), normalised.
        photos: what each was made of: a file, a PIL picture, or None for a tensor that was normalised already.
    """

    inputs: Tensor
    photos: tuple[Photo, ...]


def prepared(given: Any, transform: Callable[[Image.Image], Tensor], max_pixels: int | None = None) -> Prepared:
    """Pictures of any kind that this module takes, by a model's own `transform` (see `Preprocess.transform`).

    Raises:
        TargetError: a kind that is not taken, or no picture at all.
        DataError: a file that is missing or cannot be read.
    """
    inputs: list[Tensor] = []
    photos: list[Photo] = []
    for one in _each(given):
        if isinstance(one, Tensor):
            inputs.append(one)
            photos.append(None)
        else:
            inputs.append(transform(read_picture(one, max_pixels) if isinstance(one, Path) else one))
            photos.append(one)
    if not inputs:
        raise TargetError(f"there is no picture in what was given. {TAKEN}.")
    if len({one.shape for one in inputs}) > 1:
        shapes = ", ".join(str(tuple(shape)) for shape in dict.fromkeys(one.shape for one in inputs))
        raise TargetError(f"normalised pictures differ in shape: {shapes}. Pass them one by one, or as files.")
    return Prepared(torch.stack(inputs), tuple(photos))


def only_files(given: Any) -> bool:
    """Whether `given` is a file or a folder, or a list of nothing else."""
    if isinstance(given, str | Path):
        return True
    return isinstance(given, Sequence) and len(given) > 0 and all(isinstance(one, str | Path) for one in given)


def files_of(given: str | Path | Sequence[str | Path]) -> list[Path]:
    """Files as they are, and what belongs to folders; raises DataError where there is no such file or folder."""
    files: list[Path] = []
    for one in [given] if isinstance(given, str | Path) else given:
        path = Path(one)
        if "\0" not in str(one) and path.is_dir():
            found = pictures_in(path)
            if found.left_out:
                say(f"Left out of {path}: {found.left_out}.")
            files += [path / name for name in found.pictures]
        elif "\0" not in str(one) and path.exists():
            files.append(path)
        else:
            raise DataError(f"{str(one)!r}: there is no such file or folder.")
    return files


def _each(given: Any) -> Iterator[Tensor | Path | Image.Image]:
    """Pictures one by one: normalised tensors (3, H, W), files, or PIL pictures."""
    if isinstance(given, str | Path):
        yield from files_of(given)
    elif isinstance(given, Image.Image):
        yield given
    elif isinstance(given, Tensor):
        yield from _of_tensor(given)
    elif isinstance(given, np.ndarray):
        yield from _of_array(given)
    elif isinstance(given, Sequence) and not isinstance(given, bytes | bytearray):
        for one in given:
            yield from _each(one)
    else:
        raise TargetError(f"pictures cannot be a {type(given).__name__}. {TAKEN}.")


def _of_tensor(given: Tensor) -> Iterator[Tensor | Image.Image]:
    if given.dim() not in (3, 4):
        raise TargetError(f"a tensor {tuple(given.shape)} is no picture. Pass (3, H, W), or (B, 3, H, W) for several.")
    several = given if given.dim() == 4 else given[None]
    if several.is_floating_point():
        yield from several
    elif several.dtype == torch.uint8 and several.shape[1] in (1, 3, 4):
        yield from _of_array(several.permute(0, 2, 3, 1).cpu().numpy())
    else:
        raise TargetError(
            f"a tensor {tuple(given.shape)} of {given.dtype} is no picture. Pass normalised floats (B, 3, H, W), or "
            "colours as bytes (torch.uint8), channels first."
        )


def _of_array(given: np.ndarray) -> Iterator[Image.Image]:
    colours = given if given.ndim == 4 else given[None]
    if colours.ndim == 3:
        colours = colours[..., None]  # one picture (H, W) in grey
    if colours.ndim != 4 or colours.shape[-1] not in (1, 3, 4) or not colours.size:
        raise TargetError(
            f"an array {given.shape} is no picture: arrays are colours with the channels last, (H, W, 3). Pass "
            "torch.from_numpy(array) where it is normalised, (B, 3, H, W), or array.transpose(1, 2, 0) of (3, H, W)."
        )
    if colours.dtype.kind == "f" and 0 <= colours.min() and colours.max() <= 1:
        colours = (colours * 255).round().astype(np.uint8)
    if colours.dtype != np.uint8:
        raise TargetError(
            f"an array of {given.dtype} from {given.min()} to {given.max()} is no picture. Pass bytes (uint8) from 0 "
            "to 255, floats from 0 to 1, or torch.from_numpy(array) where it is normalised, (B, 3, H, W)."
        )
    for one in colours:
        yield Image.fromarray(one[..., 0] if one.shape[-1] == 1 else np.ascontiguousarray(one))
