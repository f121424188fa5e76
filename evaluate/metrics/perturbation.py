"""Is the explanation true? Parts of the picture are taken away, and the decision is watched.

Regions are squares of `unit` pixels (1: pixels), ranked by their mean signed contribution. What is taken away takes the
colours of a fill. Everything acts on the picture itself, before the model encodes it: zeroing the six channels [r, 1-r]
of a converted model would make a colour that no picture has, and another intervention than on its teacher.

With c(f) the confidence when a share f of the regions is gone:

- deletion AUC, most important first: ∫ c df, lower is better (Petsiuk et al. 2018, arXiv 1806.07421);
- insertion AUC: starting from the fill, most important first. Having put in the share g is having taken away the least
  important 1 - g, so it is the area under the least-important-first curve; higher is better;
- pixels removed: c(1/4) on the same two curves, least and most important first (Boehle et al. 2021).

One code path makes both curves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.errors import NotApplicable
from ..baselines import find_method
from ..decisions import Decisions
from ..estimates import bootstrap
from ..fills import FILLS
from ..record import Curve, Measurement
from ..registry import Headline, Job, Metric, declare, measures
from ..subject import Subject, outputs_of
from ..task import OURS

if TYPE_CHECKING:
    from ..store import Notes
    from ..task import Explained

__all__ = [
    "FILLS",
    "area",
    "average_drop",
    "infidelity",
    "masked_confidence",
    "removal_curve",
    "removal_outputs",
    "sensitivity_n",
    "subset_drops",
]

Order = Literal["most", "least"]
# Shares removed at which curves are measured; the ends do not depend on the map.
FRACTIONS = (0.05, 0.1, 0.15, 0.25, 0.4, 0.6, 0.8)


# ------------------------------------------------------------------------------------------------------------- pictures


def regions(size: Sequence[int], unit: int) -> tuple[Tensor, int]:
    """(H, W) the number of each pixel's region, and how many; `size` is (H, W), regions at the border may be cut."""
    height, width = size
    columns = -(-width // unit)
    number = (torch.arange(height) // unit)[:, None] * columns + (torch.arange(width) // unit)[None]
    return number, int(number[-1, -1]) + 1


def pooled(maps: Tensor, unit: int) -> Tensor:
    """(B, R) mean contribution of every region of maps (B, H, W)."""
    if unit == 1:
        return maps.flatten(1)
    return F.avg_pool2d(maps[:, None], unit, ceil_mode=True, count_include_pad=False).flatten(1)


def ranks(values: Tensor, order: Order, seed: int = 0) -> Tensor:
    """(B, R) the place of each value (B, R) in the order of removal; ties in a seeded random order, not by position."""
    shuffle = torch.randperm(values.shape[1], generator=torch.Generator().manual_seed(seed)).to(values.device)
    sorted_ids = shuffle[values[:, shuffle].argsort(dim=1, descending=order == "most", stable=True)]
    places = torch.arange(values.shape[1], device=values.device).expand_as(sorted_ids)
    return torch.empty_like(sorted_ids).scatter_(1, sorted_ids, places)


def _perturbed(subject: Subject, images: Tensor, removed: Tensor, unit: int, fill: str) -> Iterator[Tensor]:
    """Batches (<= batch size, 3, H, W) of images (B, 3, H, W) without `removed` (B, S, R), picture by picture."""
    number, _ = regions(images.shape[-2:], unit)
    owners = torch.arange(len(images)).repeat_interleave(removed.shape[1])
    flat = removed.flatten(0, 1)
    for rows in torch.arange(len(owners)).split(subject.batch_size):
        shown = images[owners[rows]]
        yield shown.where(~flat[rows][:, number][:, None], FILLS[fill](subject, shown))


# --------------------------------------------------------------------------------------------------------------- curves


def removal_curve(
    subject: Subject,
    images: Tensor,
    maps: Tensor,
    decisions: Decisions,
    order: Order,
    *,
    fractions: tuple[float, ...] = FRACTIONS,
    unit: int = 16,
    fill: str = "grey",
    seed: int = 0,
) -> Tensor:
    """(N, F) confidence after a share of the regions was taken away in the order of maps (N, H, W).

    Args:
        images: (N, 3, H, W) normalised.
        fractions: shares in [0, 1]; each is rounded to whole regions.
    """
    return _ranked_curve(subject, images, ranks(pooled(maps, unit), order, seed), decisions, fractions, unit, fill)


def _ranked_curve(
    subject: Subject,
    images: Tensor,
    rank: Tensor,
    decisions: Decisions,
    fractions: tuple[float, ...],
    unit: int,
    fill: str,
) -> Tensor:
    """`removal_curve` of regions in the order of their `rank` (N, R)."""
    outputs = removal_outputs(subject, images, rank, fractions, unit, fill)
    every = decisions.rows(torch.arange(len(images)).repeat_interleave(len(fractions)))
    return every.confidence(outputs).view(len(images), len(fractions))


def removal_outputs(
    subject: Subject, images: Tensor, rank: Tensor, fractions: tuple[float, ...], unit: int, fill: str
) -> Tensor:
    """(N·F, D) outputs, picture by picture, after a share of the regions was taken away by their `rank` (N, R)."""
    counts = torch.tensor([round(share * rank.shape[1]) for share in fractions])
    removed = rank[:, None] < counts[None, :, None]
    return outputs_of(subject, _perturbed(subject, images, removed, unit, fill))


def area(curves: Tensor, fractions: tuple[float, ...]) -> Tensor:
    """(N,) area under curves (N, F) over `fractions` from 0 to 1, by the trapezoid rule."""
    return torch.trapezoid(curves, torch.tensor(fractions, dtype=curves.dtype), dim=1)


# --------------------------------------------------------------------------------------------------------- masked once


def masked_confidence(subject: Subject, images: Tensor, maps: Tensor, decisions: Decisions) -> Tensor:
    """(N,) confidence on pictures whose colours were multiplied by their map, scaled to [0, 1] (min-max)."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    weight = (maps - low) / (high - low).clamp_min(1e-12)
    shown = (
        subject.normalised(subject.colours(part) * mask[:, None])
        for part, mask in zip(images.split(subject.batch_size), weight.split(subject.batch_size), strict=True)
    )
    return decisions.confidence(outputs_of(subject, shown))


def average_drop(whole: Tensor, masked: Tensor) -> dict[str, Tensor]:
    """Of confidences p on the whole and o on the masked picture (N,), each in [0, 1], values (N,).

    average_drop: max(0, p - o) / p. average_gain: max(0, o - p) / (1 - p). increase: o > p.
    (Chattopadhay et al. 2018, arXiv 1710.11063, and Zhang et al. 2024, arXiv 2404.05384, there in percent.)
    """
    tiny = 1e-12
    return {
        "average_drop": (whole - masked).clamp_min(0) / whole.clamp_min(tiny),
        "average_gain": (masked - whole).clamp_min(0) / (1 - whole).clamp_min(tiny),
        "increase": (masked > whole).float(),
    }


# -------------------------------------------------------------------------------------------------------------- subsets


def subset_drops(
    subject: Subject,
    images: Tensor,
    decisions: Decisions,
    *,
    shares: tuple[float, ...] = (0.1, 0.3, 0.5),
    count: int = 8,
    unit: int = 16,
    fill: str = "grey",
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Random subsets of regions and the scores that go with them, for every method of this model.

    Returns:
        subsets (N, n, K, R) bool, drops (N, n, K): `count` K subsets of each of n sizes, and score(picture) - score(
        picture without the subset).
    """
    _, total = regions(images.shape[-2:], unit)
    generator = torch.Generator().manual_seed(seed)
    places = torch.rand(len(images), len(shares), count, total, generator=generator).argsort(-1).argsort(-1)
    sizes = torch.tensor([min(max(1, round(share * total)), total) for share in shares])
    subsets = places < sizes[None, :, None, None]
    outputs = outputs_of(subject, _perturbed(subject, images, subsets.flatten(1, 2), unit, fill))
    without = decisions.rows(torch.arange(len(images)).repeat_interleave(len(shares) * count)).scores(outputs)
    whole = decisions.scores(outputs_of(subject, images.split(subject.batch_size)))
    return subsets, whole[:, None, None] - without.view(len(images), len(shares), count)


def _attributed(maps: Tensor, subsets: Tensor, unit: int) -> Tensor:
    """(N, n, K) the contribution that maps (N, H, W) give to each subset."""
    number, total = regions(maps.shape[-2:], unit)
    sums = maps.new_zeros(len(maps), total).index_add_(1, number.flatten(), maps.flatten(1))
    return torch.einsum("nskr,nr->nsk", subsets.to(sums), sums)


def sensitivity_n(maps: Tensor, subsets: Tensor, drops: Tensor, unit: int = 16) -> Tensor:
    """(N,) in [-1, 1]: correlation over subsets of what the map gives them and what their removal costs, mean over n.

    Ancona et al. 2018, arXiv 1711.06104, equation 8. A map that does not vary between subsets correlates 0.
    """
    given = _attributed(maps, subsets, unit)
    given, drops = given - given.mean(-1, keepdim=True), drops - drops.mean(-1, keepdim=True)
    # Relative to the numbers' own size: a flat map differs between subsets by rounding only.
    size = maps.abs().sum((1, 2))[:, None, None]
    flat = (given.abs() <= 1e-6 * size).all(-1)
    return F.cosine_similarity(given, drops, dim=-1).masked_fill(flat, 0).mean(1)


def infidelity(maps: Tensor, subsets: Tensor, drops: Tensor, unit: int = 16) -> dict[str, Tensor]:
    """Squared error (N,) between what the map gives a subset and what its removal costs (Yeh et al. 2019, 1901.09392).

    Returns:
        infidelity: mean squared error in units of the score, for maps in those units.
        scaled_infidelity: after the best factor for each picture, over the mean squared cost: in [0, 1], for all maps.
    """
    given, cost = _attributed(maps, subsets, unit).flatten(1), drops.flatten(1)
    return {
        "infidelity": (given - cost).square().mean(1),
        "scaled_infidelity": 1 - F.cosine_similarity(given, cost, dim=1).square(),
    }


# ----------------------------------------------------------------------------------------------------- what is measured


@measures(
    Metric(
        "deletion_auc", "faithfulness", better=-1, title="deletion AUC",
        headlines=(Headline("deletion_auc", 7, "student", OURS, None),),
    ),
    Metric(
        "insertion_auc", "faithfulness", title="insertion AUC",
        headlines=(Headline("insertion_auc", 8, "student", OURS, None),),
    ),
    Metric("removed_most_25", "faithfulness", better=-1, title="25 % removed, most important first"),
    Metric("removed_least_25", "faithfulness", title="25 % removed, least important first"),
    needs="maps",
    place=30,
)  # fmt: skip
def _removals(notes: Notes, task: Explained, model: str, method: str) -> Iterator[Job]:
    for unit, fill in task.settings.removals:
        size = unit or task.unit
        variant = f"{'pixels' if size == 1 else f'patches of {size}'}, {fill}"
        yield (
            f"removal curves: {model}, {method}, {variant}",
            partial(_removal, notes, task, model, method, variant, size, fill),
        )


def _removal(notes: Notes, task: Explained, model: str, method: str, variant: str, size: int, fill: str) -> None:
    fractions = (0.0, *FRACTIONS, 1.0)
    quarter = fractions.index(0.25)
    around = task.once(("ends", model, fill), lambda: _ends(task, model, fill))
    names: tuple[tuple[Order, str, str], ...] = (
        ("most", "deletion_auc", "removed_most_25"),
        ("least", "insertion_auc", "removed_least_25"),
    )
    for order, of_area, of_quarter in names:
        inner = _curve(task, model, task.maps[model, method], order, size, fill)
        curves = torch.cat([around[:, :1], inner, around[:, 1:]], 1)
        row = Measurement("faithfulness", of_area, model, method, variant)
        notes.measure(row, lambda curves=curves: area(curves, fractions))
        notes.measure(dataclasses.replace(row, metric=of_quarter), lambda curves=curves: curves[:, quarter])
        with contextlib.suppress(NotApplicable):  # the rows above say it
            points = [bootstrap(column, task.settings.seed) for column in curves.T]
            value, low, high = (tuple(getattr(point, name) for point in points) for name in ("value", "low", "high"))
            notes.curves.append(Curve(model, method, variant, order, fractions, value, low, high))


def _curve(task: Explained, model: str, maps: Tensor, order: Order, unit: int, fill: str) -> Tensor:
    """`removal_curve`, run once for all methods of the model that take the same regions in the same order."""
    rank = ranks(pooled(maps, unit), order, task.settings.seed)
    places = hashlib.sha256(rank.cpu().numpy().tobytes()).digest()
    given = (task.subjects[model], task.pictures.images, rank, task.decisions, FRACTIONS, unit, fill)
    return task.once(("curve", model, unit, fill, places), lambda: _ranked_curve(*given))


def _ends(task: Explained, model: str, fill: str) -> Tensor:
    """(N, 2) confidence on the whole pictures and on the fill alone."""
    subject, images = task.subjects[model], task.pictures.images
    filled = (FILLS[fill](subject, part) for part in images.split(subject.batch_size))
    return torch.stack([task.confidence(model), task.decisions.confidence(outputs_of(subject, filled))], 1)


@measures(
    Metric("average_drop", "faithfulness", better=-1),
    Metric("average_gain", "faithfulness"),
    Metric("increase", "faithfulness"),
    needs="maps",
    place=31,
)
def _drops(notes: Notes, task: Explained, model: str, method: str) -> Iterator[Job]:
    yield f"average drop: {model}, {method}", partial(_drop, notes, task, model, method)


def _drop(notes: Notes, task: Explained, model: str, method: str) -> None:
    subject, maps = task.subjects[model], task.maps[model, method]
    masked = masked_confidence(subject, task.pictures.images, maps, task.decisions)
    for metric, values in average_drop(task.confidence(model), masked).items():
        row = Measurement("faithfulness", metric, model, method)
        if not subject.classifier and metric in ("average_gain", "increase"):
            reason = "a model without classes is wholly confident of its own features from the start"
            notes.absent(row, reason)
        else:
            notes.measure(row, lambda values=values: values)


@measures(
    Metric("sensitivity_n", "faithfulness", title="sensitivity-n"),
    Metric("infidelity", "faithfulness", better=-1),
    Metric("scaled_infidelity", "faithfulness", better=-1),
    needs="maps",
    place=32,
)
def _sensitivities(notes: Notes, task: Explained, model: str, method: str) -> Iterator[Job]:
    yield f"sensitivity, infidelity: {model}, {method}", partial(_subsets, notes, task, model, method)


def _subsets(notes: Notes, task: Explained, model: str, method: str) -> None:
    """What random subsets cost is found out by the first method of a model, whose seconds it counts in."""
    drawn, drops = task.once(("subsets", model), lambda: _drawn(task, model))
    maps, unit = task.maps[model, method][: len(drawn)], task.unit
    row = Measurement("faithfulness", "sensitivity_n", model, method)
    notes.measure(row, lambda: sensitivity_n(maps, drawn, drops, unit))
    for metric, values in infidelity(maps, drawn, drops, unit).items():
        row = dataclasses.replace(row, metric=metric)
        if metric == "infidelity" and not find_method(method).in_score_units:
            notes.absent(row, "its maps are not in units of the score")
        else:
            notes.measure(row, lambda values=values: values)


def _drawn(task: Explained, model: str) -> tuple[Tensor, Tensor]:
    settings = task.settings
    few = task.pictures.images[: settings.subset_pictures]
    return subset_drops(
        task.subjects[model],
        few,
        task.decisions.rows(torch.arange(len(few))),
        shares=settings.shares,
        count=settings.subsets,
        unit=task.unit,
        seed=settings.seed,
    )


# Of a protocol (see `protocols`): the label on pictures without their most, or their least, influential patches.
declare(
    Metric("mif_accuracy", "faithfulness", better=-1, title="MIF accuracy"),
    Metric("lif_accuracy", "faithfulness", title="LIF accuracy"),
    Metric("mif_confidence", "faithfulness", better=-1, title="MIF confidence"),
    Metric("lif_confidence", "faithfulness", title="LIF confidence"),
)
