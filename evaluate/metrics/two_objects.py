"""Two objects in one picture: does a map of one class show its own object, and not the other? (Ours, after GridPG.)

The halves of a picture are windows of two pictures that are decided differently, each where most of its object is.
Nothing is scaled or cut out, and the picture is as large as any, so that models of one size take it. An object's share
is that of the positive contribution inside its mask. For its own class it should be large, and small for the other's:
a map that finds objects whatever class is asked has the same share for both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...core.errors import NotApplicable
from ..baselines import find_method, maps_of
from ..decisions import Decisions
from ..record import Measurement
from ..registry import Job, Metric, measures
from .localisation import positive_shares

if TYPE_CHECKING:
    from ..store import Notes
    from ..task import Explained

__all__ = ["TwoObjects", "object_shares", "pairs_of", "two_objects"]


@dataclasses.dataclass(frozen=True, eq=False)
class TwoObjects:
    """P pictures (P, 3, H, W) of two objects each, the masks (P, 2, H, W) of both, and whose they are (P, 2)."""

    images: Tensor
    masks: Tensor
    pictures: Tensor


def pairs_of(decisions: Decisions) -> Tensor:
    """(P, 2): each picture with the next one that is decided differently, and each at most once.

    Raises NotApplicable where no two are decided differently.
    """
    left, found = list(range(len(decisions))), []
    while left:
        first = left.pop(0)
        other = next((i for i in left if not decisions.alike(first, i)), None)
        if other is not None:
            left.remove(other)
            found.append((first, other))
    if not found:
        raise NotApplicable(f"no two of {len(decisions)} pictures are decided differently")
    return torch.tensor(found)


def two_objects(images: Tensor, masks: Tensor, pairs: Tensor) -> TwoObjects:
    """Pictures of pairs (P, 2) of images (N, 3, H, W) with masks (N, H, W): left halves show the first of each pair."""
    width = images.shape[-1]
    inside = (masks > 0.5).float()
    shown, own = [], []
    for pair in pairs.tolist():
        halves, regions = [], []
        for i, size in zip(pair, (width // 2, width - width // 2), strict=True):
            start = fullest(inside[i], size)
            halves.append(images[i, :, :, start : start + size])
            regions.append(inside[i, :, start : start + size])
        shown.append(torch.cat(halves, -1))
        empty = [torch.zeros_like(region) for region in regions]
        own.append(torch.stack([torch.cat([regions[0], empty[1]], -1), torch.cat([empty[0], regions[1]], -1)]))
    return TwoObjects(torch.stack(shown), torch.stack(own), pairs)


def fullest(mask: Tensor, size: int) -> int:
    """The left edge of the window of `size` columns that holds most of a mask (H, W); of equal ones the middle one."""
    held = mask.sum(0).unfold(0, size, 1).sum(1)
    best = (held == held.max()).nonzero().flatten()
    return int(best[len(best) // 2])


def object_shares(first: Tensor, second: Tensor, masks: Tensor) -> dict[str, Tensor]:
    """Of maps (P, H, W) of the first and of the second class, with masks (P, 2, H, W): means of both objects (P,).

    Returns:
        own: the share of an object in the map of its class, in [0, 1]. other: in the map of the other's class.
        contrast: the first minus the second.
    """
    maps = (first, second)
    own = sum(positive_shares(maps[i], masks[:, i]) for i in (0, 1)) / 2
    other = sum(positive_shares(maps[1 - i], masks[:, i]) for i in (0, 1)) / 2
    return {"own": own, "other": other, "contrast": own - other}  # type: ignore[dict-item, operator]


# ----------------------------------------------------------------------------------------------------- what is measured


@measures(
    Metric("two_objects_own", "localisation", title="two objects, own class"),
    Metric("two_objects_other", "localisation", better=-1, title="two objects, other's class"),
    Metric("two_objects_contrast", "localisation", title="two objects, contrast"),
    needs="maps",
    place=14,
)
def _measured(notes: Notes, task: Explained, model: str, method: str) -> Iterator[Job]:
    yield f"two objects: {model}, {method}", partial(_two_objects, notes, task, model, method)


def _two_objects(notes: Notes, task: Explained, model: str, method: str) -> None:
    row = Measurement("localisation", "two_objects_own", model, method)
    try:
        shares = _shares(task, model, method)
    except NotApplicable as error:
        notes.absent(row, str(error))
        return
    for name, values in shares.items():
        notes.measure(dataclasses.replace(row, metric=f"two_objects_{name}"), lambda values=values: values)


def _shares(task: Explained, model: str, method: str) -> dict[str, Tensor]:
    masks, way, few = task.masks, find_method(method), task.settings.subset_pictures
    if not way.cheap:
        raise NotApplicable(f"{way.passes} passes a picture are too many to explain it again")
    images = task.pictures.images[:few]
    decisions = task.decisions.rows(torch.arange(len(images)))
    made = task.once("two objects", lambda: two_objects(images, masks[:few], pairs_of(decisions)))
    asked = decisions.rows(made.pictures.flatten())  # of both objects of each picture, side by side
    maps = maps_of(way, task.subjects[model], made.images, asked, task.settings.seed)
    return object_shares(maps[::2], maps[1::2], made.masks)
