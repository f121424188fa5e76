"""Where a model's input lies in the photo that it was made of, and maps on that photo's own pixels. (Ours.)"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..core.errors import NotApplicable
from .attribution import cover

__all__ = ["Crop", "crop_of", "placed"]


class Crop(NamedTuple):
    """The part of a photo that a model sees, in pixels of the photo; beyond it where a border was added."""

    left: float
    top: float
    right: float
    bottom: float


def crop_of(colours: Callable[[Image.Image], Tensor], size: tuple[int, int]) -> Crop:
    """Where the input lies in a photo of `size` (width, height), to about a third of one of its own pixels.

    It is measured, so that it holds for whatever a library does to a picture: two ramps go through `colours`, a picture
    -> (3, H, W) in [0, 1], and lines are fitted to what comes out of them.

    Raises:
        NotApplicable: what comes out is no part of the photo.
    """
    width, height = size
    across, down = ((np.arange(length) + 0.5) / length for length in size)
    ramps = np.stack(np.broadcast_arrays(across[None], down[:, None], np.ones(1)), -1)
    found = colours(Image.fromarray((ramps * 255).round().astype(np.uint8))).double()
    inside = found[2] > 0.99  # an added border has another colour
    columns, rows = inside.any(0), inside.any(1)
    if columns.sum() < 2 or rows.sum() < 2:
        raise NotApplicable("the model's input cannot be found in a photo: its preprocessing changes colours.")
    left, right = _ends(found[0][rows].mean(0), columns, width)
    top, bottom = _ends(found[1][:, columns].mean(1), rows, height)
    return Crop(left, top, right, bottom)


def placed(contributions: Tensor, crop: Crop, size: tuple[int, int]) -> Tensor:
    """A map (H, W) of the model's input on a photo of `size` (width, height): (height, width), with the same sum.

    Each cell's value is shared out among the photo's pixels that it covers; pixels that the model does not see have 0,
    and what lies on an added border counts to the photo's nearest pixel.
    """
    rows = cover(contributions.shape[0], size[1], crop.top, crop.bottom)
    columns = cover(contributions.shape[1], size[0], crop.left, crop.right)
    return (rows @ contributions.double() @ columns.T).to(contributions)


def _ends(ramp: Tensor, inside: Tensor, length: int) -> tuple[float, float]:
    """Between which places of a line of `length` pixels all of `ramp` lies, by the line through its inner part."""
    where = inside.nonzero()[:, 0].double()
    edge = 0.1 * (where[-1] - where[0])  # filters bend a ramp where the photo ends
    inner = where[(where >= where[0] + edge) & (where <= where[-1] - edge)]
    inner = inner if len(inner) > 1 else where
    lines = torch.stack([inner + 0.5, torch.ones_like(inner)], 1)
    slope, start = torch.linalg.lstsq(lines, ramp[inner.long()][:, None]).solution[:, 0].tolist()
    return start * length, (start + slope * len(ramp)) * length
