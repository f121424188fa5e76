"""Published protocols, with every setting as published: whoever has the data gets numbers to set beside the paper's.

A protocol is a frozen dataclass in `PROTOCOLS`: its settings are fields, so they stand in the record; `source` says
where they were published, and `differs` what is not as published, and why. It measures labels, not the teacher's
decisions; each model is measured on the pictures that itself decides rightly, where the paper does so. So a student and
its teacher may be measured on other grids.

Pictures are read batch by batch: ImageNet's validation set does not fit into memory.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..convert.libraries import LABELS
from ..core.errors import DataError, NotApplicable, TargetError, near_miss
from ..core.pictures import fitted
from ..data.labelled import Pictures
from .baselines import Method, find_method, maps_of
from .decisions import ClassDecisions, Decisions
from .estimates import bootstrap
from .metrics.completeness import completeness_error
from .metrics.localisation import Grids, grid_scores, native_maps, pooled, runs_on, windowed_maps
from .metrics.perturbation import Order, ranks, removal_outputs
from .metrics.perturbation import pooled as patches
from .metrics.segmentation import average_precision
from .metrics.single_deletion import deletion_drops, single_deletion
from .record import Evaluation, Measurement
from .store import Notes
from .subject import Subject, outputs_of
from .task import OURS

__all__ = [
    "PROTOCOLS",
    "Protocol",
    "aloe_grids",
    "bcos_grids",
    "check_labels",
    "evaluate_protocol",
    "find_protocol",
]

# --------------------------------------------------------------------------------------------------------- the protocol


@dataclasses.dataclass(frozen=True, eq=False)
class Labelled:
    """What a protocol is given of one model.

    Attributes:
        pictures: for which there are labels. outputs: the model's, (N, K).
        masked: pictures with masks and labels, if any.
    """

    subject: Subject
    pictures: Pictures
    outputs: Tensor
    masked: Pictures | None
    seed: int

    @property
    def labels(self) -> Tensor:
        assert self.pictures.labels is not None  # `evaluate_protocol` saw to it
        return self.pictures.labels

    def decisions(self) -> ClassDecisions:
        return ClassDecisions(self.labels, self.subject.output != LABELS)

    def parts(self) -> Iterator[tuple[Tensor, Decisions, Tensor]]:
        """(images (B, 3, H, W), decisions of B, rows (B,)), a batch at a time."""
        decisions, start = self.decisions(), 0
        for images in self.pictures.images.split(self.subject.batch_size):
            rows = torch.arange(start, start + len(images))
            yield images, decisions.rows(rows), rows
            start += len(images)

    def explain(self, method: Method, images: Tensor, decisions: Decisions) -> Tensor:
        return maps_of(method, self.subject, images, decisions, self.seed)


@dataclasses.dataclass(frozen=True)
class Protocol(abc.ABC):
    """Attributes:
    source: where its settings were published.
    differs: what is not as published.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    differs: ClassVar[str]
    masked: ClassVar[int] = 0
    """How many pictures with masks it is measured on, where there are as many."""

    @abc.abstractmethod
    def measure(self, notes: Notes, given: Labelled, method: Method) -> None:
        """Adds the rows of one method on one model."""

    def record(self) -> dict[str, Any]:
        """What evaluation.json says of it."""
        return {
            "protocol": self.name,
            "source": self.source,
            "differs": self.differs,
            **dataclasses.asdict(self),
        }

    def row(self, given: Labelled, method: Method, metric: str, section: str, kind: str = "") -> Measurement:
        variant = f"{self.name}, {kind}" if kind else self.name
        return Measurement(section, metric, given.subject.name, method.name, variant)


def taken(images: Any, index: Sequence[int]) -> Tensor:
    """(M, 3, H, W): some pictures of a tensor (N, 3, H, W), or of what reads them when asked."""
    return images[list(index)] if isinstance(images, Tensor) else torch.cat(list(images.rows(index).split(64)))


# -------------------------------------------------------------------------------------------------------------- GridPG


OTHER_GRIDS = (
    "Pictures are preprocessed as the model's own configuration says. Grids are drawn by another random generator, so "
    "they are other grids than the paper's. Intervals are ours, over grids."
)


@dataclasses.dataclass(frozen=True)
class BcosV2(Protocol):
    """GridPG of B-cos networks, version 2."""

    grids: int = 250
    side: int = 2
    least_probability: float = 0.5  # the sigmoid of the label's logit, whatever the model was trained with
    pooling: int = 15  # of the signed map, before the positive part is taken
    fed: str = "native"
    quartiles: tuple[float, ...] = (0.25, 0.5, 0.75)
    grid_seed: int = 42

    name = "bcos-v2"
    source = "Boehle et al. 2024, arXiv 2306.10898, and the settings of its public code: 250 grids of 2 x 2"
    differs = OTHER_GRIDS

    def measure(self, notes: Notes, given: Labelled, method: Method) -> None:
        values: list[Tensor] = []

        def found() -> Tensor:
            if not values:
                grids = bcos_grids(
                    given.outputs, given.labels, self.side, self.grids, self.least_probability, self.grid_seed
                )
                smooth = partial(pooled, kernel=self.pooling)
                values.append(scores_of_grids(given, method, grids, native_maps, smooth))
            return values[0]

        notes.measure(self.row(given, method, "gridpg", "localisation", "mean"), lambda: found().mean(1))
        for share in self.quartiles:
            kind = "median" if share == 0.5 else f"{share:.0%} quantile"
            value = partial(lambda share: bootstrap(found(), given.seed, statistic=quantile(share)), share)
            notes.measure(self.row(given, method, "gridpg", "localisation", kind), value)


@dataclasses.dataclass(frozen=True)
class Aloe(Protocol):
    """GridPG of ALOE, which never feeds the grid whole."""

    grids: int = 16384  # drawn; those of which a cell is not confident are left out
    side: int = 2
    least_probability: float = 0.95  # of every cell by itself: softmax, of several labels at once sigmoid
    pooling: int = 1
    fed: str = "windowed"
    grid_seed: int = 42

    name = "aloe"
    source = "ALOE (CVPR 2026) and the settings of its public code: 512 batches of 32 grids of 2 x 2"
    differs = OTHER_GRIDS

    def measure(self, notes: Notes, given: Labelled, method: Method) -> None:
        def values() -> Tensor:
            confidence = given.decisions().confidence(given.outputs)
            sure = (given.outputs.argmax(1) == given.labels) & (confidence > self.least_probability)
            grids = aloe_grids(given.labels, sure, self.side, self.grids, self.grid_seed)
            return scores_of_grids(given, method, grids, windowed_maps).mean(1)

        notes.measure(self.row(given, method, "gridpg", "localisation"), values)


def bcos_grids(
    outputs: Tensor, labels: Tensor, side: int, count: int, least_probability: float = 0.5, seed: int = 42
) -> Grids:
    """At most `count` grids of pictures with logits (N, K) and labels (N,), as B-cos v2 chooses them.

    Eligible are pictures that are classified rightly with a sigmoid above `least_probability`. Each grid draws side²
    classes that have pictures left, and of each its most confident picture that is left, so that no picture is in two.
    Cells are filled column by column. Raises NotApplicable where not one grid can be filled.
    """
    logits = outputs.gather(1, labels[:, None])[:, 0]
    eligible = ((outputs.argmax(1) == labels) & (logits.sigmoid() > least_probability)).nonzero()[:, 0]
    left: dict[int, list[int]] = {}
    for i in eligible[logits[eligible].argsort(descending=True, stable=True)].tolist():
        left.setdefault(int(labels[i]), []).append(i)
    generator = torch.Generator().manual_seed(seed)
    cells, chosen = side * side, []
    while len(chosen) < count and len(left) >= cells:
        classes = sorted(left)
        drawn = [classes[i] for i in torch.randperm(len(classes), generator=generator)[:cells].tolist()]
        chosen.append([left[one].pop(0) for one in drawn])
        left = {one: pictures for one, pictures in left.items() if pictures}
    if not chosen:
        raise NotApplicable(
            f"{len(eligible)} of {len(labels)} pictures are classified rightly with a sigmoid above "
            f"{least_probability:g}, and they are not of {cells} classes"
        )
    return Grids(torch.tensor(chosen).unflatten(1, (side, side)).transpose(1, 2).flatten(1), side)


def aloe_grids(labels: Tensor, sure: Tensor, side: int, count: int, seed: int = 42) -> Grids:
    """Of at most `count` grids of pictures with labels (N,), those of which all pictures are `sure` (N,), as ALOE does.

    Grid i holds picture i and others of other classes, drawn from all. Raises NotApplicable where none is left.
    """
    generator = torch.Generator().manual_seed(seed)
    cells, chosen = side * side, []
    if len(labels.unique()) < cells:
        raise NotApplicable(f"a grid has pictures of {cells} classes, and there are {len(labels.unique())}")
    for i in range(min(count, len(labels))):
        grid = [i]
        while len(grid) < cells:
            other = int(torch.randint(len(labels), (), generator=generator))
            if all(labels[other] != labels[j] for j in grid):
                grid.append(other)
        if bool(sure[grid].all()):
            chosen.append(grid)
    if not chosen:
        raise NotApplicable(
            f"{int(sure.sum())} of {len(labels)} pictures are classified rightly with enough confidence, and no grid "
            f"of {cells} has only such"
        )
    return Grids(torch.tensor(chosen), side)


def scores_of_grids(
    given: Labelled,
    method: Method,
    grids: Grids,
    make: Callable[..., Tensor],
    smooth: Callable[[Tensor], Tensor] = lambda maps: maps,
) -> Tensor:
    """(G, side²) GridPG of every cell; `smooth` acts on signed maps. A few grids are in memory at a time."""
    cells, decisions, found = grids.side**2, given.decisions(), []
    explain = partial(given.explain, method)
    for part in grids.pictures.split(max(1, given.subject.batch_size // cells)):
        images, own = taken(given.pictures.images, part.flatten().tolist()), decisions.rows(part.flatten())
        if not found and make is native_maps:
            runs_on(given.subject, images, grids.side)
        few = Grids(torch.arange(part.numel()).view(part.shape), grids.side)
        found.append(grid_scores(smooth(make(images, own, few, explain)), few).view(len(part), cells))
    return torch.cat(found)


def quantile(share: float) -> Callable[[Tensor], Tensor]:
    """(R, M, ...) -> (R,): the quantile of all values of each of R resamples."""
    return lambda values: values.flatten(1).quantile(share, dim=1)


# ---------------------------------------------------------------------------------------------------- single deletion


@dataclasses.dataclass(frozen=True)
class Idsds(Protocol):
    """The single-deletion score."""

    side: int = 4
    fill: str = "mean"  # zeros after normalisation

    name = "idsds"
    source = (
        "Hesse et al. 2024, arXiv 2407.11910, and the defaults of its public code: 4 x 4 patches of zeros, raw maps"
    )
    differs = (
        "It is the in-domain score only of a model that was fine-tuned with patches taken away, as the paper's were; "
        "of any other it is the paper's single-deletion score. A map that is equal in all patches counts as 0, where "
        "the paper's code has no number."
    )

    def measure(self, notes: Notes, given: Labelled, method: Method) -> None:
        def values() -> Tensor:
            return torch.cat(
                [
                    single_deletion(
                        given.explain(method, images, wanted),
                        deletion_drops(given.subject, images, wanted, self.side, self.fill),
                        self.side,
                    )
                    for images, wanted, _ in given.parts()
                ]
            )

        notes.measure(self.row(given, method, "single_deletion", "faithfulness"), values)


# ------------------------------------------------------------------------------------------------------------ LibraGrad


@dataclasses.dataclass(frozen=True)
class Libragrad(Protocol):
    """The three families of LibraGrad: faithfulness, completeness error, segmentation."""

    shares: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    fill: str = "mean"
    patch: int = 16  # pixels a side, where a model's own grid of patches is not known

    name = "libragrad"
    masked = 5000
    source = (
        "Mehri et al. 2025, arXiv 2411.16760, and its public code: most and least influential tokens taken away in "
        "steps of a tenth; completeness error; average precision on masks (ImageNet-S)"
    )
    differs = (
        "Patches are filled with the mean colour, where the paper takes their tokens out of the transformer: that has "
        "no meaning for other models; of a CNN, patches are the places of its last features. Confidence and accuracy "
        "are means over the nine steps. The completeness error is divided by max(1, |score|): the paper's own scale "
        "could not be checked. Pictures with masks are drawn by the seed."
    )

    def measure(self, notes: Notes, given: Labelled, method: Method) -> None:
        curves: list[dict[str, Tensor]] = []

        def found(name: str) -> Tensor:
            if not curves:
                curves.append(self._curves(given, method))
            return curves[0][name]

        for name in ("mif_accuracy", "lif_accuracy", "mif_confidence", "lif_confidence"):
            notes.measure(self.row(given, method, name, "faithfulness"), partial(found, name))
        row = self.row(given, method, "completeness_error", "faithfulness")
        if method.in_score_units:
            notes.measure(row, partial(found, "completeness_error"))
        else:
            notes.absent(row, "its maps are not in units of the score")
        row = self.row(given, method, "average_precision", "localisation")
        notes.measure(row, partial(self._precision, given, method))

    def _curves(self, given: Labelled, method: Method) -> dict[str, Tensor]:
        """Every value (N,) that comes from the pictures with labels."""
        found: dict[str, list[Tensor]] = {}
        for images, wanted, rows in given.parts():
            maps, labels = given.explain(method, images, wanted), given.labels[rows]
            unit = self._unit(given.subject, images)
            names: dict[Order, str] = {"most": "mif", "least": "lif"}
            for order, name in names.items():
                rank = ranks(patches(maps, unit), order)
                outputs = removal_outputs(given.subject, images, rank, self.shares, unit, self.fill)
                every = wanted.rows(torch.arange(len(images)).repeat_interleave(len(self.shares)))
                right = (outputs.argmax(1) == labels.repeat_interleave(len(self.shares))).float()
                found.setdefault(f"{name}_accuracy", []).append(right.view(len(images), -1).mean(1))
                sure = every.confidence(outputs).view(len(images), -1).mean(1)
                found.setdefault(f"{name}_confidence", []).append(sure)
            error = completeness_error(maps, wanted.scores(given.outputs[rows]))
            found.setdefault("completeness_error", []).append(error)
        return {name: torch.cat(values) for name, values in found.items()}

    def _unit(self, subject: Subject, images: Tensor) -> int:
        """Pixels of the side of a token, or of a place of a CNN's last features."""
        if subject.tokens is None:
            return self.patch
        with torch.no_grad():
            rows = subject.tokens(subject.model, fitted(images[:1], subject.model)).shape[-2]
        return max(1, images.shape[-2] // rows)

    def _precision(self, given: Labelled, method: Method) -> Tensor:
        masked = given.masked
        if masked is None or masked.masks is None:
            raise NotApplicable("there are no masks; pass --masks SHARDS, such as those of ImageNet-S")
        assert masked.labels is not None
        wanted = ClassDecisions(masked.labels, given.subject.output != LABELS)
        return average_precision(given.explain(method, masked.images, wanted), masked.masks)


# --------------------------------------------------------------------------------------------------- table, and running

PROTOCOLS: dict[str, Protocol] = {one.name: one for one in (BcosV2(), Aloe(), Idsds(), Libragrad())}


def find_protocol(name: str) -> Protocol:
    """The protocol of that name; raises TargetError with what comes close."""
    if name not in PROTOCOLS:
        raise TargetError(
            f"no protocol is called {name!r}.{near_miss(name, PROTOCOLS)} There are: {', '.join(PROTOCOLS)}."
        )
    return PROTOCOLS[name]


def evaluate_protocol(
    protocol: Protocol,
    subjects: Sequence[Subject],
    pictures: Pictures,
    masked: Pictures | None = None,
    methods: Sequence[tuple[str, str]] = (),
    *,
    model: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    seed: int = 0,
    work: Path | None = None,
    progress: bool = True,
) -> Evaluation:
    """Measures a protocol on the explanations of each subject, and on further (model, method) pairs.

    Args:
        pictures: all that there are, with labels that are classes.
        masked: pictures with masks and such labels, where the protocol uses them.
        model, data, work: as of `evaluate_subjects`.

    Raises:
        DataError: the labels are not the numbers of classes.
    """
    check_labels(protocol, pictures, masked)
    pairs = tuple(dict.fromkeys([*((subject.name, OURS) for subject in subjects), *methods]))
    facts = {
        "model": model or {},
        "data": {"pictures": len(pictures), "explained": len(pictures), **(data or {})},
        "settings": {**protocol.record(), "methods": [list(pair) for pair in pairs], "seed": seed},
    }
    notes = Notes(facts, work, seed, progress)
    names = {pair: f"{protocol.name}: {', '.join(pair)}" for pair in pairs}
    done = sum(map(notes.done, names.values()))
    kept = f", of which {done} are done" if done else ""
    about = f"Protocol {protocol.name} in {len(names)} steps{kept}: {len(pictures):,} pictures."
    notes.progress.start(len(names), done, about)
    try:
        for subject in subjects:
            left = [pair for pair in pairs if pair[0] == subject.name and not notes.done(names[pair])]
            if not left:
                continue
            outputs = outputs_of(subject, pictures.images.split(subject.batch_size))
            given = Labelled(subject, pictures, outputs, masked, seed)
            for pair in left:
                notes.step(names[pair], partial(protocol.measure, notes, given, find_method(pair[1])))
    finally:
        notes.progress.stop()
    return notes.evaluation()


def check_labels(protocol: Protocol, pictures: Pictures, masked: Pictures | None = None) -> None:
    """Raises DataError where the labels that a protocol needs are no classes of the model."""
    for some in (pictures, masked):
        if some is not None and not some.labels_are_classes:
            raise DataError(
                f"--protocol {protocol.name} needs the number of each picture's class, and the labels are "
                f"{'words' if some.label_names else 'none'}. Pass --labels with the key of the numbers."
            )
