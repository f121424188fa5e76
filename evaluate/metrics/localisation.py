"""Is the explanation in the right place? All maps are signed contributions.

But for the signed share, only their positive part counts.

- Energy in mask: the share of positive contribution inside a ground-truth mask (Wang et al. 2020, arXiv 1910.01279,
  energy-based pointing game). A uniform map scores the mask's share of the area.
- Signed share: the sum of the contributions inside the mask over the sum of their sizes in the whole picture. (Ours.)
  The positive share cannot see a map that is negative all over; this one does.
- Pointing game: whether the largest contribution lies in the mask (Zhang et al. 2016, arXiv 1608.00507).
- GridPG: pictures side by side; the share of the positive contribution to one picture's decision that lies in its own
  cell (Boehle et al. 2021, arXiv 2104.00032). A uniform map scores 1 / cells. Two published protocols, whose numbers
  are not comparable:
  native: n x n full-size pictures, fed whole, so that cells compete for the decision;
  windowed: a window of one cell slides by half a cell over the 2 x 2 grid, and maps are averaged where windows overlap;
  the model never sees more than one cell's size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.errors import NotApplicable
from ...core.pictures import fitted
from ..baselines import Method, find_method, maps_of
from ..decisions import ClassDecisions, Decisions
from ..record import Measurement
from ..registry import Headline, Job, Metric, measures
from ..subject import Subject
from ..task import OURS

if TYPE_CHECKING:
    from ..store import Notes
    from ..task import Explained

__all__ = [
    "Grids",
    "choose_grids",
    "energy_in_mask",
    "grid_pictures",
    "grid_scores",
    "native_maps",
    "pointing_game",
    "pooled",
    "positive_shares",
    "signed_in_mask",
    "signed_shares",
    "windowed_maps",
]

# (images (B, 3, H, W), decisions of B·K, of K about each picture) -> maps (B·K, H, W), as `maps_of` gives them.
Explain = Callable[[Tensor, Decisions], Tensor]
# Less than this of positive contribution is none at all (ALOE's limit).
NOTHING = 1e-7


def positive_shares(maps: Tensor, regions: Tensor) -> Tensor:
    """(B,) the share of the positive part of maps (B, H, W) inside regions (B, H, W) in [0, 1]; 0 where there is none.

    NaN maps have NaN shares.
    """
    positive = maps.float().clamp_min(0)
    total = positive.sum((1, 2))
    return (positive * regions).sum((1, 2)).where(total > NOTHING, total * 0) / total.clamp_min(NOTHING)


def signed_shares(maps: Tensor, regions: Tensor) -> Tensor:
    """(B,) in [-1, 1]: sum of maps (B, H, W) inside regions (B, H, W) in [0, 1], over the sum of |maps|; 0 for no map.

    NaN maps have NaN shares.
    """
    maps = maps.float()
    total = maps.abs().sum((1, 2))
    return (maps * regions).sum((1, 2)).where(total > NOTHING, total * 0) / total.clamp_min(NOTHING)


def pooled(maps: Tensor, kernel: int = 15) -> Tensor:
    """Signed maps (B, H, W) averaged over squares of an odd `kernel`, in the same size; beyond the border there is 0.

    The authors of B-cos networks score GridPG on maps pooled 15 x 15 before the positive part is taken (Boehle et al.
    2024, arXiv 2306.10898): single pixels of both signs cancel out.
    """
    return F.avg_pool2d(maps[:, None], kernel, 1, kernel // 2)[:, 0]


def energy_in_mask(maps: Tensor, masks: Tensor) -> Tensor:
    """(B,) in [0, 1]: positive contribution inside masks (B, H, W), which are cut at one half."""
    return positive_shares(maps, (masks > 0.5).float())


def signed_in_mask(maps: Tensor, masks: Tensor) -> Tensor:
    """(B,) in [-1, 1]: `signed_shares` inside masks (B, H, W), which are cut at one half."""
    return signed_shares(maps, (masks > 0.5).float())


def pointing_game(maps: Tensor, masks: Tensor, tolerance: int = 0) -> Tensor:
    """(B,) in [0, 1]: whether the largest contribution is in the mask or at most `tolerance` pixels beside it.

    Where several places share the largest value, the share of them that is in the mask. (The original takes 15 pixels.)
    """
    masks = (masks > 0.5).float()
    if tolerance:
        masks = F.max_pool2d(masks[:, None], 2 * tolerance + 1, 1, tolerance)[:, 0]
    largest = (maps == maps.amax((1, 2), keepdim=True)).float()
    return (largest * masks).sum((1, 2)) / largest.sum((1, 2))


# --------------------------------------------------------------------------------------------------------------- GridPG


@dataclasses.dataclass(frozen=True)
class Grids:
    """G grids of `side` x `side` pictures: `pictures` (G, side²) are positions, row by row."""

    pictures: Tensor
    side: int

    def __len__(self) -> int:
        return len(self.pictures)


def choose_grids(decisions: Decisions, eligible: Tensor, side: int, count: int, seed: int = 0) -> Grids:
    """At most `count` grids of `eligible` (N,) pictures whose decisions differ; one choice for every method.

    Pictures are drawn in a seeded order, each once, until too few are left, and then again in another order.
    Raises NotApplicable where not even one grid can be filled.
    """
    generator = torch.Generator().manual_seed(seed)
    pool = eligible.nonzero().flatten()
    chosen: list[list[int]] = []
    while len(chosen) < count:
        before = len(chosen)
        left = pool[torch.randperm(len(pool), generator=generator)].tolist()
        while len(chosen) < count:
            grid: list[int] = []
            for i in left:
                if len(grid) < side * side and not any(decisions.alike(i, j) for j in grid):
                    grid.append(i)
            if len(grid) < side * side:
                break
            left = [i for i in left if i not in grid]
            chosen.append(grid)
        if len(chosen) == before:
            break
    if not chosen:
        raise NotApplicable(
            f"{len(pool)} pictures are decided confidently, and no {side * side} of them have different decisions"
        )
    return Grids(torch.tensor(chosen), side)


def grid_pictures(images: Tensor, grids: Grids) -> Tensor:
    """The grids as pictures (G, 3, side·H, side·W) of images (N, 3, H, W)."""
    cells = images[grids.pictures].unflatten(1, (grids.side, grids.side))
    return cells.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def native_maps(images: Tensor, decisions: Decisions, grids: Grids, explain: Explain) -> Tensor:
    """Maps (G·side², side·H, side·W): of every grid, the decision of every cell in order."""
    return explain(grid_pictures(images, grids), decisions.rows(grids.pictures.flatten()))


def windowed_maps(images: Tensor, decisions: Decisions, grids: Grids, explain: Explain) -> Tensor:
    """As `native_maps`, from windows of one cell's size that slide by half of it and are averaged by their overlap."""
    height, width = images.shape[-2:]
    rows, columns = ([step * size // 2 for step in range(2 * grids.side - 1)] for size in (height, width))
    whole = grid_pictures(images, grids)
    cells = grids.side**2
    wanted = decisions.rows(grids.pictures.flatten())
    total = images.new_zeros(len(grids) * cells, *whole.shape[-2:])
    count = total.new_zeros(whole.shape[-2:])
    for top in rows:
        for left in columns:
            place = (..., slice(top, top + height), slice(left, left + width))
            total[place] += explain(whole[place], wanted)
            count[place] += 1
    return total / count


def grid_scores(maps: Tensor, grids: Grids) -> Tensor:
    """GridPG (G·side²,) of maps (G·side², side·H, side·W) in the order of `native_maps`."""
    side = grids.side
    cell = torch.arange(side * side).view(side, side)
    size = [length // side for length in maps.shape[-2:]]
    number = cell.repeat_interleave(size[0], 0).repeat_interleave(size[1], 1)
    own = torch.arange(side * side).repeat(len(grids))
    return positive_shares(maps, (number[None] == own[:, None, None]).to(maps))


# ----------------------------------------------------------------------------------------------------- what is measured


@measures(
    Metric(
        "energy_in_mask", "localisation",
        headlines=(
            Headline("energy_in_mask", 4, "student", OURS),
            Headline("energy_in_mask_teacher", 5, "teacher", OURS),
        ),
    ),
    Metric("signed_share", "localisation"),
    Metric("pointing_game", "localisation"),
    Metric("mask_area", "localisation", better=0),
    needs="pictures",
    place=10,
)  # fmt: skip
def _masks(notes: Notes, task: Explained) -> Iterator[Job]:
    yield "masks", partial(_in_masks, notes, task)


def _in_masks(notes: Notes, task: Explained) -> None:
    masks = task.pictures.masks
    for (model, method), maps in task.maps.items():
        row = Measurement("localisation", "energy_in_mask", model, method)
        notes.measure(row, lambda maps=maps: energy_in_mask(maps, task.masks))
        if masks is None:
            continue
        signed = dataclasses.replace(row, metric="signed_share")
        notes.measure(signed, lambda maps=maps: signed_in_mask(maps, masks))
        notes.measure(dataclasses.replace(row, metric="pointing_game"), lambda maps=maps: pointing_game(maps, masks))
    if masks is not None:
        row = Measurement("localisation", "mask_area", "both")
        notes.measure(row, lambda: (masks > 0.5).float().mean((1, 2)))


@measures(
    Metric(
        "gridpg", "localisation", title="GridPG",
        headlines=(Headline("grid_pointing", 6, "student", OURS, "native 2x2"),),
    ),
    needs="pictures",
    place=50,
)  # fmt: skip
def _gridpg(notes: Notes, task: Explained) -> Iterator[Job]:
    """The same grids, chosen by the teacher alone, for every method."""
    for protocol, side in task.settings.protocols:
        variant = f"{protocol} {side}x{side}"
        for model, method in task.maps:
            row = Measurement("localisation", "gridpg", model, method, variant)
            value = partial(_grid_scores, task, protocol, side, model, find_method(method))
            yield f"GridPG {variant}: {model}, {method}", partial(notes.measure, row, value)


def _grid_scores(task: Explained, protocol: str, side: int, model: str, way: Method) -> Tensor:
    settings, pictures, decisions = task.settings, task.pictures, task.decisions
    if way.control and not way.cheap:
        raise NotApplicable("it is a control of many passes")
    passes = way.passes * (side**2 if protocol == "native" else (2 * side - 1) ** 2)
    passes = -(-passes // side**2) if way.shared else passes
    if passes > settings.most_passes:
        raise NotApplicable(f"{passes} passes a cell are more than {settings.most_passes} (--most-passes)")
    grids = task.once(("grids", protocol, side), lambda: _chosen(task, protocol, side))

    def maps(images: Tensor, wanted: Decisions) -> Tensor:
        return maps_of(way, task.subjects[model], images, wanted, settings.seed)

    make = native_maps if protocol == "native" else windowed_maps
    found = grid_scores(make(pictures.images, decisions, grids, maps), grids)
    # Cells of a grid are not independent: the interval is over grids.
    return found.view(len(grids), -1).mean(1)


def _chosen(task: Explained, protocol: str, side: int) -> Grids:
    settings, decisions = task.settings, task.decisions
    eligible = task.confidence("teacher") >= settings.confident
    if isinstance(decisions, ClassDecisions):
        # With labels, the teacher must be right; without, its own class is the decision.
        eligible &= task.outputs["teacher"].argmax(1) == decisions.classes
    # As many cells in every protocol.
    count = max(1, settings.grids * 4 // side**2)
    chosen = choose_grids(decisions, eligible, side, count, settings.seed)
    for subject in task.subjects.values():
        runs_on(subject, task.pictures.images, side if protocol == "native" else 1)
    return chosen


@torch.no_grad()
def runs_on(subject: Subject, images: Tensor, side: int) -> None:
    """Raises NotApplicable where the model does not take pictures `side` times as high and wide."""
    try:
        subject.model(fitted(images[:1].repeat(1, 1, side, side), subject.model))
    except Exception as error:
        size = " x ".join(str(length * side) for length in images.shape[-2:])
        raise NotApplicable(f"the model does not take pictures of {size}: {str(error).splitlines()[0]}") from error
