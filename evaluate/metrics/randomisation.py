"""Cascading randomisation: does the explanation depend on what the model learnt? (Adebayo et al. 2018, 1810.03292.)

The weights of the last blocks, then of more and more of them, are shuffled. An explanation of the model must change;
one that only shows the picture's edges does not.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...convert.taps import find_blocks
from ..baselines import find_method, maps_of
from ..record import Measurement
from ..registry import Job, Metric, measures
from ..subject import Subject
from .perturbation import pooled, ranks

if TYPE_CHECKING:
    from ..store import Notes
    from ..task import Explained

__all__ = ["cascade", "rank_correlation", "shuffle_weights"]


@torch.no_grad()
def shuffle_weights(module: nn.Module, seed: int = 0) -> None:
    """Permutes the numbers of every floating-point parameter in place: the same values, nothing learnt."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
        parameter.copy_(parameter.flatten()[order].view_as(parameter))


def cascade(subject: Subject, steps: int = 3, seed: int = 0) -> Iterator[tuple[float, Subject]]:
    """Copies of a model whose last share of blocks is shuffled, from 1 / `steps` to 1; with all, everything is."""
    model = copy.deepcopy(subject.model)
    blocks = find_blocks(model)
    shuffled = 0
    for step in range(1, steps + 1):
        share = step / steps
        if step == steps:
            shuffle_weights(model, seed + len(blocks))
        else:
            for place in range(shuffled, round(share * len(blocks))):
                shuffle_weights(model.get_submodule(blocks[len(blocks) - 1 - place]), seed + place)
        shuffled = round(share * len(blocks))
        yield share, dataclasses.replace(subject, model=model)


def rank_correlation(maps: Tensor, others: Tensor, unit: int = 16) -> Tensor:
    """(B,) Spearman correlation of two maps (B, H, W) over regions of `unit` pixels, in [-1, 1]."""
    ours, theirs = (ranks(pooled(values, unit), "least").double() for values in (maps, others))
    return F.cosine_similarity(ours - ours.mean(1, keepdim=True), theirs - theirs.mean(1, keepdim=True))


@measures(Metric("randomised", "faithfulness", better=-1, title="map kept after randomising"), needs="model", place=40)
def _measured(notes: Notes, task: Explained, model: str) -> Iterator[Job]:
    yield f"randomisation: {model}", partial(_randomised, notes, task, model)


def _randomised(notes: Notes, task: Explained, model: str) -> None:
    """How much of a map stays when what the model learnt is shuffled away, block by block from the top."""
    settings = task.settings
    images = task.pictures.images[: settings.cascade_pictures]
    decisions = task.decisions.rows(torch.arange(len(images)))
    methods = [method for known, method in task.maps if known == model and find_method(method).cheap]
    for share, shuffled in cascade(task.subjects[model], settings.cascade_steps, settings.seed):
        for method in methods:
            before = task.maps[model, method][: len(images)]
            notes.measure(
                Measurement("faithfulness", "randomised", model, method, f"{share:.0%} of the blocks"),
                lambda method=method, shuffled=shuffled, before=before: rank_correlation(
                    before, maps_of(find_method(method), shuffled, images, decisions, settings.seed), task.unit
                ),
            )
