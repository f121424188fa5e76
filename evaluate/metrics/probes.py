"""What features are good for: k-NN, a linear probe, zero-shot. Every choice is made on a hold-out; test is scored once.

Neighbours: cosine, votes weighted by exp(similarity / 0.07) (Wu et al. 2018, arXiv 1805.01978), k chosen. Linear probe:
logistic regression on standardised features, weight decay chosen, by L-BFGS to convergence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.errors import NotApplicable
from ..features import OUTPUT
from ..record import Measurement
from ..registry import Job, Metric, measures

if TYPE_CHECKING:
    from ..store import Notes
    from ..task import Compared

__all__ = ["Scored", "Split", "knn", "linear_probe", "split_labelled", "zero_shot"]

TEMPERATURE = 0.07
NEIGHBOURS = (1, 5, 10, 20)
DECAYS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclasses.dataclass(frozen=True)
class Split:
    """Positions of the pictures to fit on, to choose on, and to score once."""

    train: Tensor
    holdout: Tensor
    test: Tensor


@dataclasses.dataclass(frozen=True)
class Scored:
    """(T,) whether each test picture was right, and what was chosen on the hold-out."""

    correct: Tensor
    chosen: float


def split_labelled(labels: Tensor, seed: int = 0) -> Split:
    """Half of each class to train on, a quarter to choose on, a quarter to test; classes below 4 pictures are left out.

    Raises NotApplicable where fewer than two classes remain.
    """
    generator = torch.Generator().manual_seed(seed)
    parts: list[list[Tensor]] = [[], [], []]
    classes = [label for label in labels.unique() if int((labels == label).sum()) >= 4]
    if len(classes) < 2:
        raise NotApplicable(f"{len(classes)} classes have four pictures or more; a probe needs two")
    for label in classes:
        rows = (labels == label).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        quarter = len(rows) // 4
        for part, found in zip(parts, rows.split([len(rows) - 2 * quarter, quarter, quarter]), strict=True):
            part.append(found)
    return Split(*(torch.cat(part) for part in parts))


def knn(features: Tensor, labels: Tensor, split: Split) -> Scored:
    """k nearest neighbours on features (N, D) with labels (N,); k of 1, 5, 10, 20 chosen on the hold-out."""

    def right(fitted: Tensor, asked: Tensor, k: int) -> Tensor:
        similarity = unit[asked] @ unit[fitted].T
        near = similarity.topk(min(k, len(fitted)), dim=1)
        votes = F.one_hot(labels[fitted][near.indices], int(labels.max()) + 1)
        weights = ((near.values - 1) / TEMPERATURE).exp()
        return (votes * weights[..., None]).sum(1).argmax(1) == labels[asked]

    unit = F.normalize(features.float())
    k = max(NEIGHBOURS, key=lambda k: float(right(split.train, split.holdout, k).float().mean()))
    return Scored(right(torch.cat([split.train, split.holdout]), split.test, k), k)


def linear_probe(features: Tensor, labels: Tensor, split: Split) -> Scored:
    """Logistic regression on features (N, D) with labels (N,); weight decay chosen on the hold-out."""

    def right(fitted: Tensor, asked: Tensor, decay: float) -> Tensor:
        mean, spread = features[fitted].mean(0), features[fitted].std(0).clamp_min(1e-6)
        scaled = (features - mean) / spread
        weight, bias = _logistic(scaled[fitted], labels[fitted], int(labels.max()) + 1, decay)
        return (scaled[asked] @ weight + bias).argmax(1) == labels[asked]

    features = features.float()
    decay = max(DECAYS, key=lambda decay: float(right(split.train, split.holdout, decay).float().mean()))
    return Scored(right(torch.cat([split.train, split.holdout]), split.test, decay), decay)


def zero_shot(features: Tensor, texts: Tensor, labels: Tensor) -> Tensor:
    """(N,) whether the text embedding (K, D) nearest to each image embedding (N, D) by cosine is its label's (N,)."""
    return (F.normalize(features.float()) @ F.normalize(texts.float()).T).argmax(1) == labels


def _logistic(features: Tensor, labels: Tensor, classes: int, decay: float) -> tuple[Tensor, Tensor]:
    """Weights (D, K) and bias (K,) of the least cross-entropy plus decay / 2 · |weights|²."""
    with torch.enable_grad():
        weight = torch.zeros(features.shape[1], classes, requires_grad=True)
        bias = torch.zeros(classes, requires_grad=True)
        optimiser = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimiser.zero_grad()
            value = F.cross_entropy(features @ weight + bias, labels) + decay / 2 * weight.square().sum()
            value.backward()
            return value

        optimiser.step(loss)
    return weight.detach(), bias.detach()


@measures(
    Metric("knn", "probes", title="k-NN accuracy"),
    Metric("linear_probe", "probes", title="linear probe accuracy"),
    Metric("zero_shot", "probes", title="zero-shot accuracy"),
    Metric("accuracy", "probes"),
    needs="features",
    place=1,
)
def _measured(notes: Notes, task: Compared) -> Iterator[Job]:
    for name in task.subjects:
        yield f"probes: {name}", partial(_probes, notes, task, name)


def _probes(notes: Notes, task: Compared, name: str) -> None:
    def row(metric: str) -> Measurement:
        return Measurement("probes", metric, name)

    subject, features = task.subjects[name], task.features[name][OUTPUT]
    labels, texts = task.pictures.labels, task.texts
    if labels is None:
        for metric in ("knn", "linear_probe", "zero_shot"):
            notes.absent(row(metric), "the pictures have no labels; pass --labels KEY")
        return
    for metric, probe in (("knn", knn), ("linear_probe", linear_probe)):
        notes.measure(
            row(metric),
            lambda probe=probe: probe(features, labels, split_labelled(labels, task.seed)).correct.float(),
        )
    if texts is None:
        notes.absent(row("zero_shot"), "the model has no text tower")
    else:
        notes.measure(row("zero_shot"), lambda: zero_shot(features, texts, labels).float())
    if subject.classifier and task.pictures.labels_are_classes:
        notes.measure(row("accuracy"), lambda: (features.argmax(1) == labels).float())
