"""What a study says of a student, as columns: agreement with its teacher, what its maps are about, its ledger.

The decision that is explained is the teacher's: its class, or for a model without classes the direction of its own
centred feature. The other decision is any other class, or another picture's direction, drawn once for all students.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch
from bcosify.convert import Preprocess, load_teacher
from bcosify.convert.output import output_kind
from bcosify.core.errors import NotApplicable
from bcosify.core.pictures import fitted
from bcosify.data.index import index_shards
from bcosify.data.labelled import Pictures, find_pictures, read_pictures
from bcosify.data.loader import held_out_batches
from bcosify.data.names import expand
from bcosify.data.views import to_model_input
from bcosify.evaluate.contrast import MEASURES, contrast, other_decisions
from bcosify.evaluate.decisions import Decisions, decide, side_by_side
from bcosify.evaluate.estimates import bootstrap
from bcosify.evaluate.metrics.fidelity import confident_agreement, fidelity
from bcosify.evaluate.metrics.localisation import choose_grids, grid_scores, native_maps, pooled, runs_on, windowed_maps
from bcosify.evaluate.subject import Subject, outputs_of
from bcosify.explain import Explanation, explain
from bcosify.explain.targets import SideBySide
from torch import Tensor, nn

CONFIDENT = 0.5  # the teacher's least probability of its class
SIDE, GRIDS = 2, 16  # of GridPG
BATCH = 16  # pictures explained at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
    """What all students of one teacher are measured against, at one size.

    Attributes:
        held_out: (N, 3, S, S) normalised pictures, on which agreement is measured. outputs: (N, D) of the teacher.
        objects: pictures of one object each with its mask, which are explained.
        decided, other: what is explained of them. sure: (M,) where the teacher is confident of the decision.
    """

    teacher: Subject
    held_out: Tensor
    outputs: Tensor
    objects: Pictures
    decided: Decisions
    other: Decisions
    sure: Tensor

    def subject(self, model: nn.Module) -> Subject:
        """A student under the teacher's conditions."""
        return dataclasses.replace(self.teacher, name="student", model=model)


def whole_objects(shards: str, size: int, preprocess: Preprocess, limit: int | None = None) -> Pictures:
    """All pictures of `shards` (or `limit` of them), each resized whole with the mask of the one object on it."""
    index, whole = find_pictures(shards), dataclasses.replace(preprocess.at(size), crop_pct=1.0)
    return read_pictures(index, whole, count=limit or len(index), masks=True)


def refer(name: str, size: int, data: Path, device: str = "cpu", limit: int | None = None) -> Reference:
    """The teacher `bundled:NAME` on the shards val-*.tar and objects-*.tar of `data`; `limit`: of so many pictures."""
    teacher = load_teacher(f"bundled:{name}", image_size=size)
    preprocess, classifier = teacher.preprocess, output_kind(teacher).chooses
    model = teacher.model.to(device).eval().requires_grad_(False)
    subject = Subject("teacher", model, None, preprocess.mean, preprocess.std, classifier)
    index = index_shards(expand(str(data / "val-*.tar")))
    batches = held_out_batches(index, size=size, workers=0, limit=limit)
    held_out = to_model_input(torch.cat([batch.pictures for batch in batches]), preprocess.mean, preprocess.std)
    objects = whole_objects(str(data / "objects-*.tar"), size, preprocess, limit)
    outputs, answers = (outputs_of(subject, images.split(subject.batch_size)) for images in (held_out, objects.images))
    decided = decide(answers, classifier)
    other = other_decisions(decided, answers.shape[1])
    return Reference(subject, held_out, outputs, objects, decided, other, decided.confidence(answers) >= CONFIDENT)


def columns(model: nn.Module, reference: Reference) -> dict[str, Any]:
    """All columns of a student; those that do not apply are in `left_out`, with the reason."""
    subject = reference.subject(model)
    return _merged(agreement(subject, reference), map_columns(subject, reference))


def map_columns(subject: Subject, reference: Reference) -> dict[str, Any]:
    """The columns that its explanations alone give."""
    return _merged(contrasts(subject, reference), gridpg(subject, reference))


def _merged(*parts: dict[str, Any]) -> dict[str, Any]:
    left_out = {name: reason for part in parts for name, reason in part.get("left_out", {}).items()}
    return {**{name: value for part in parts for name, value in part.items()}, "left_out": left_out}


def agreement(subject: Subject, reference: Reference) -> dict[str, Any]:
    """`fidelity`, and for classifiers top1_confident, on the confident_pictures of which the teacher is sure."""
    theirs, ours = reference.outputs, outputs_of(subject, reference.held_out.split(subject.batch_size))
    found: dict[str, Any] = dict(fidelity(ours, theirs, subject.classifier))
    if subject.classifier:
        sure = confident_agreement(ours, theirs, CONFIDENT)
        found["confident_pictures"] = len(sure)
        if not len(sure):
            return {**found, "left_out": {"top1_confident": "the teacher is sure of no held-out picture"}}
        found["top1_confident"] = float(sure.mean())
    return found


def contrasts(subject: Subject, reference: Reference) -> dict[str, float]:
    """Means over the objects of all that `contrast` says, 95 % intervals (_low, _high) of the differences, `ledger`."""
    objects, both = reference.objects, SideBySide((reference.decided.target(), reference.other.target()))
    assert objects.masks is not None
    images = fitted(objects.images, subject.model)
    explanation = explain(subject.model, images, both, batch_size=BATCH, check=False)
    values = contrast(*explanation.contributions.float().cpu().unbind(1), objects.masks)
    found = {name: float(value.mean()) for name, value in values.items()}
    for name in (f"{measure}_contrast" for measure in MEASURES):
        _, found[f"{name}_low"], found[f"{name}_high"], _ = bootstrap(values[name])
    return {**found, **ledger(explanation), "mask_area": float(objects.masks.mean())}


def ledger(explanation: Explanation) -> dict[str, float]:
    """Of the first score: each part's share in the sum of their sizes, mean over pictures, and the worst residual."""
    parts = {
        "direct": explanation.direct_part,
        "carried": explanation.carried_part,
        "constant": explanation.constant_part,
    }
    sizes = {name: part[:, 0].abs() for name, part in parts.items()}
    total = torch.stack([*sizes.values()]).sum(0).clamp_min(1e-12)
    residual = explanation.residual[:, 0].abs() / explanation.scores[:, 0].abs().clamp_min(1)
    shares = {f"{name}_share": float((size / total).mean()) for name, size in sizes.items()}
    return {**shares, "residual": float(residual.max())}


def _maps_of_cells(model: nn.Module, images: Tensor, decisions: Decisions) -> Tensor:
    """Maps (B·K, H, W) of B grids, whose K cells share a pass."""
    targets = side_by_side(decisions, len(images))
    explanation = explain(model, fitted(images, model), targets, batch_size=BATCH, check=False)
    return explanation.contributions.float().cpu().flatten(0, 1)


def gridpg(subject: Subject, reference: Reference) -> dict[str, Any]:
    """gridpg_windowed, gridpg_native, and gridpg_native_pooled (maps averaged over 15 x 15 pixels first)."""
    images, maps_of = reference.objects.images, functools.partial(_maps_of_cells, subject.model)
    found: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for protocol, make, side in (("windowed", windowed_maps, 1), ("native", native_maps, SIDE)):
        try:
            grids = choose_grids(reference.decided, reference.sure, SIDE, GRIDS)
            runs_on(subject, images, side)
            maps = make(images, reference.decided, grids, maps_of)
        except NotApplicable as error:
            left_out[f"gridpg_{protocol}"] = str(error)
            continue
        found[f"gridpg_{protocol}"] = float(grid_scores(maps, grids).mean())
        if protocol == "native":
            found["gridpg_native_pooled"] = float(grid_scores(pooled(maps), grids).mean())
    return {**found, "left_out": left_out}
