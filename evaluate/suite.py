"""All metrics over a teacher, its student and the methods that explain them, on the same pictures: an Evaluation.

Costs are shared: random subsets are taken away once a model, the ends of a curve are measured once a model and fill,
every map is made once. What does not apply becomes a row that says why; a fault of ours or of the data is an error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..convert.trace import fitted
from ..errors import DataError, LedgerError, NotApplicable
from ..explain import explain
from . import fidelity, localisation, perturbation, probes
from .baselines import Method, find_method, maps_of
from .decisions import ClassDecisions, Decisions, decide
from .estimates import Estimate, bootstrap, jackknife
from .features import DENSE, OUTPUT, cache_key, features_of
from .randomisation import cascade, rank_correlation
from .record import Curve, Evaluation, Measurement, Seconds
from .subject import Subject, outputs_of

__all__ = ["Explained", "Pictures", "Settings", "evaluate"]

OURS = "explanation"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured and how finely. The same settings, weights and pictures give the same numbers on one machine.

    Attributes:
        methods: (model, method) pairs; `explanation` of both models comes first in any case.
        unit: pixels of a square that is taken away; None: an eighth of the side.
        removals: (unit, fill) of every pair of curves; None for `unit`.
        grids: how many 2 x 2 grids GridPG gets; of 3 x 3, as many cells.
        most_passes: a method has no part in a GridPG protocol where a cell would take it more passes of one picture's
            size than this.
        confident: the teacher's least probability for a picture to be in a grid.
        cascade_pictures, cascade_steps: of the randomisation check.
        shares, subsets: sizes and number of the random subsets.
    """

    methods: tuple[tuple[str, str], ...] = ()
    unit: int | None = None
    removals: tuple[tuple[int | None, str], ...] = ((None, "grey"),)
    protocols: tuple[tuple[str, int], ...] = (("native", 2), ("native", 3), ("windowed", 2))
    grids: int = 16
    most_passes: int = 256
    confident: float = 0.5
    shares: tuple[float, ...] = (0.1, 0.3, 0.5)
    subsets: int = 8
    cascade_pictures: int = 16
    cascade_steps: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for _, method in self.methods:
            find_method(method)
        for _, fill in self.removals:
            if fill not in perturbation.FILLS:
                raise DataError(f"no fill is called {fill!r}. There are: {', '.join(perturbation.FILLS)}.")

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        return tuple(dict.fromkeys([("teacher", OURS), ("student", OURS), *self.methods]))


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
        images: (N, 3, H, W) normalised; pictures for fidelity alone may be read batch by batch.
        keys: names of the pictures.
        masks: (N, H, W) in [0, 1], or None.
        labels: (N,) classes; `label_names` may name them.
        labels_are_classes: whether a label is an index of the classifier's outputs.
        digest: of pictures and preprocessing, for caches.
    """

    images: Any  # Tensor or Images
    keys: tuple[str, ...]
    masks: Tensor | None = None
    labels: Tensor | None = None
    label_names: tuple[str, ...] | None = None
    labels_are_classes: bool = False
    digest: str | None = None

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
class Explained:
    """The pictures, the decision about each, and the maps (N, H, W) of every (model, method) that applies."""

    pictures: Pictures
    decisions: Decisions
    subjects: dict[str, Subject]
    maps: dict[tuple[str, str], Tensor]
    unit: int


class _Notes:
    """Measurements, curves and seconds as they come in."""

    def __init__(self, seed: int, progress: bool) -> None:
        self.seed = seed
        self.progress = progress
        self.measurements: list[Measurement] = []
        self.curves: list[Curve] = []
        self.seconds: list[Seconds] = []

    @contextlib.contextmanager
    def timed(self, step: str) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        took = Seconds(step, round(time.perf_counter() - wall, 2), round(time.process_time() - cpu, 2))
        self.seconds.append(took)

    def absent(self, row: Measurement, reason: str) -> None:
        """Keeps that there is no such number, and why."""
        self.measurements.append(dataclasses.replace(row, value=None, reason=reason))

    def measure(self, row: Measurement, value: Callable[[], Tensor | Estimate]) -> None:
        """Keeps the estimate that `value` gives, or the mean of its tensor (N,), or why there is none."""
        try:
            found = value()
            estimate = found if isinstance(found, Estimate) else bootstrap(found, self.seed)
            self.measurements.append(row.holding(estimate))
        except NotApplicable as error:
            self.absent(row, str(error))

    def bar(self, items: Iterable[Any], title: str) -> Iterator[Any]:
        return tqdm(items, desc=title, disable=not self.progress, leave=False)  # type: ignore[return-value]


def evaluate(
    teacher: Subject,
    student: Subject,
    fidelity_on: Pictures,
    explained_on: Pictures,
    settings: Settings,
    *,
    model: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    texts: Tensor | None = None,
    progress: bool = True,
) -> tuple[Evaluation, Explained]:
    """Measures everything that applies.

    Args:
        fidelity_on: pictures of the fidelity and probe sections.
        explained_on: pictures that are explained, with masks where there are some.
        model, data: facts for the record.
        texts: (K, D) embeddings of the label names, for zero-shot accuracy.

    Returns:
        The evaluation, and the maps that it was made from.

    Raises:
        DataError: the models do not belong together, or there are no pictures.
    """
    notes = _Notes(settings.seed, progress)
    with notes.timed("fidelity"):
        _fidelity(notes, teacher, student, fidelity_on, texts)
    explained = _explained(notes, teacher, student, explained_on, settings)
    _faithfulness(notes, explained, settings)
    _localisation(notes, explained, settings)
    evaluation = Evaluation(
        model=model or {},
        data={"pictures": len(fidelity_on), "explained": len(explained_on), **(data or {})},
        settings={**dataclasses.asdict(settings), "unit": explained.unit},
        measurements=tuple(notes.measurements),
        curves=tuple(notes.curves),
        seconds=tuple(notes.seconds),
    )
    return evaluation, explained


# -------------------------------------------------------------------------------------------------- fidelity and probes


def _fidelity(notes: _Notes, teacher: Subject, student: Subject, pictures: Pictures, texts: Tensor | None) -> None:
    features = {}
    for subject in (teacher, student):
        batches = notes.bar(pictures.images.split(subject.batch_size), f"features, {subject.name}")
        key = None if pictures.digest is None else cache_key(subject, pictures.digest)
        features[subject.name] = features_of(subject, batches, key)
    theirs, ours = features["teacher"], features["student"]

    def row(metric: str, variant: str = "") -> Measurement:
        return Measurement("fidelity", metric, "both", variant=variant)

    for name, target in theirs.items():
        if name == DENSE or name not in ours:
            continue
        for metric, values in fidelity.cosines(ours[name], target).items():
            notes.measure(row(metric, name), lambda values=values: _several(values))
        pair = (ours[name], target)
        notes.measure(
            row("linear_cka", name),
            lambda pair=pair: _several(
                jackknife(lambda rows: fidelity.linear_cka(pair[0][rows], pair[1][rows]), len(pair[0]), notes.seed)
            ),
        )
    outputs = (ours[OUTPUT], theirs[OUTPUT])
    notes.measure(row("neighbour_agreement"), lambda: _several(fidelity.neighbour_agreement(*outputs)))
    for metric in ("top1_agreement", "top5_agreement", "kl"):
        notes.measure(
            row(metric), lambda metric=metric: _of_classifier(teacher) or fidelity.agreement(*outputs)[metric]
        )
    if DENSE in theirs and DENSE in ours:
        notes.measure(row("dense_agreement"), lambda: fidelity.dense_agreement(ours[DENSE], theirs[DENSE]))
    for subject, found in ((teacher, theirs), (student, ours)):
        _probes(notes, subject, found[OUTPUT], pictures, texts)


def _several(values: Any) -> Any:
    """As it is; one picture has no mean to be centred on."""
    if (values.n if isinstance(values, Estimate) else len(values)) < 2:
        raise NotApplicable("one picture has no others to compare with")
    return values


def _of_classifier(subject: Subject) -> None:
    if not subject.classifier:
        raise NotApplicable("the model has no classes")


def _probes(notes: _Notes, subject: Subject, features: Tensor, pictures: Pictures, texts: Tensor | None) -> None:
    def row(metric: str, variant: str = "") -> Measurement:
        return Measurement("probes", metric, subject.name, variant=variant)

    labels = pictures.labels
    if labels is None:
        reason = "the pictures have no labels; pass --labels KEY"
        for metric in ("knn", "linear_probe", "zero_shot"):
            notes.absent(row(metric), reason)
        return
    for metric, probe in (("knn", probes.knn), ("linear_probe", probes.linear_probe)):
        notes.measure(
            row(metric),
            lambda probe=probe: probe(features, labels, probes.split_labelled(labels, notes.seed)).correct.float(),
        )
    if texts is None:
        notes.absent(row("zero_shot"), "the model has no text tower")
    else:
        notes.measure(row("zero_shot"), lambda: probes.zero_shot(features, texts, labels).float())
    if subject.classifier and pictures.labels_are_classes:
        notes.measure(row("accuracy"), lambda: (features.argmax(1) == labels).float())


# ----------------------------------------------------------------------------------------------------------- explaining


def _explained(notes: _Notes, teacher: Subject, student: Subject, pictures: Pictures, settings: Settings) -> Explained:
    """Maps of every method for the same decisions: the teacher's own, or the labels where these are classes."""
    with notes.timed("decisions"):
        outputs = outputs_of(teacher, pictures.images.split(teacher.batch_size))
        ours = outputs_of(student, pictures.images[:1].split(1))
    if outputs.shape[1] != ours.shape[1]:
        raise DataError(
            f"Teacher and student do not belong together: the teacher gives {outputs.shape[1]} numbers a picture, the "
            f"student {ours.shape[1]}. Pass the model that the student was converted from."
        )
    if not outputs.isfinite().all():
        raise DataError("The teacher's outputs hold NaN or infinity: its weights are broken, or the pictures are.")
    decisions = decide(outputs, teacher.classifier, pictures.labels if pictures.labels_are_classes else None)
    subjects = {"teacher": teacher, "student": student}
    maps: dict[tuple[str, str], Tensor] = {}
    for model, name in notes.bar(settings.pairs, "maps"):
        with notes.timed(f"maps: {model}, {name}"):
            try:
                maps[model, name] = maps_of(
                    find_method(name), subjects[model], pictures.images, decisions, settings.seed
                )
            except NotApplicable as error:
                notes.absent(Measurement("faithfulness", "maps", model, name), str(error))
    unit = settings.unit or max(1, min(pictures.images.shape[-2:]) // 8)
    return Explained(pictures, decisions, subjects, maps, unit)


# --------------------------------------------------------------------------------------------------------- faithfulness


def _faithfulness(notes: _Notes, explained: Explained, settings: Settings) -> None:
    pictures, decisions, unit, seed = explained.pictures, explained.decisions, explained.unit, settings.seed
    whole, subsets = {}, {}
    for name, subject in explained.subjects.items():
        with notes.timed(f"ledger: {name}"):
            _ledger(notes, subject, pictures, decisions)
        with notes.timed(f"random subsets: {name}"):
            outputs = outputs_of(subject, pictures.images.split(subject.batch_size))
            whole[name] = decisions.confidence(outputs)
            subsets[name] = perturbation.subset_drops(
                subject,
                pictures.images,
                decisions,
                shares=settings.shares,
                count=settings.subsets,
                unit=unit,
                seed=seed,
            )
        notes.measure(Measurement("faithfulness", "confidence", name), lambda name=name: whole[name])
    ends: dict[tuple[str, str], Tensor] = {}
    for (model, method), maps in notes.bar(list(explained.maps.items()), "faithfulness"):
        subject = explained.subjects[model]

        def row(metric: str, variant: str = "", model: str = model, method: str = method) -> Measurement:
            return Measurement("faithfulness", metric, model, method, variant)

        with notes.timed(f"removal curves: {model}, {method}"):
            for size, fill in settings.removals:
                if (model, fill) not in ends:
                    filled = (
                        perturbation.FILLS[fill](subject, part) for part in pictures.images.split(subject.batch_size)
                    )
                    gone = decisions.confidence(outputs_of(subject, filled))
                    ends[model, fill] = torch.stack([whole[model], gone], 1)
                _removal(notes, explained, (model, method), ends[model, fill], size or unit, fill, seed)
        with notes.timed(f"drop, sensitivity, infidelity: {model}, {method}"):
            masked = perturbation.masked_confidence(subject, pictures.images, maps, decisions)
            for metric, values in perturbation.average_drop(whole[model], masked).items():
                notes.measure(
                    row(metric),
                    lambda metric=metric, values=values, subject=subject: _if_not_full(subject, metric) or values,
                )
            drawn, drops = subsets[model]
            notes.measure(
                row("sensitivity_n"),
                lambda maps=maps, drawn=drawn, drops=drops: perturbation.sensitivity_n(maps, drawn, drops, unit),
            )
            for metric, values in perturbation.infidelity(maps, drawn, drops, unit).items():
                if metric == "infidelity" and not find_method(method).in_score_units:
                    notes.absent(row(metric), "its maps are not in units of the score")
                else:
                    notes.measure(row(metric), lambda values=values: values)
    _randomised(notes, explained, settings)


def _if_not_full(subject: Subject, metric: str) -> None:
    if not subject.classifier and metric in ("average_gain", "increase"):
        raise NotApplicable("a model without classes is wholly confident of its own features from the start")


def _ledger(notes: _Notes, subject: Subject, pictures: Pictures, decisions: Decisions) -> None:
    """How exactly contributions and constants add up, and how much of the score the constants are."""
    residuals, shares = [], []
    row = Measurement("faithfulness", "ledger_residual", subject.name, OURS)
    try:
        for rows in torch.arange(len(pictures)).split(subject.batch_size):
            images = fitted(pictures.images[rows], subject.model)
            found = explain(subject.model, images, decisions.rows(rows).target(), check=False)
            residuals.append(found.residual.abs() / found.scores.abs().clamp_min(1))
            parts = found.input_part.abs(), found.constant_part.abs()
            shares.append(parts[1] / (parts[0] + parts[1]).clamp_min(1e-12))
    except LedgerError as error:
        notes.absent(row, str(error))
        return
    notes.measure(row, lambda: torch.cat(residuals).flatten())
    notes.measure(dataclasses.replace(row, metric="bias_share"), lambda: torch.cat(shares).flatten())


def _removal(
    notes: _Notes, explained: Explained, pair: tuple[str, str], ends: Tensor, size: int, fill: str, seed: int
) -> None:
    model, method = pair
    variant = f"{'pixels' if size == 1 else f'patches of {size}'}, {fill}"
    fractions = (0.0, *perturbation.FRACTIONS, 1.0)
    quarter = fractions.index(0.25)
    names: tuple[tuple[perturbation.Order, str, str], ...] = (
        ("most", "deletion_auc", "removed_most_25"),
        ("least", "insertion_auc", "removed_least_25"),
    )
    for order, of_area, of_quarter in names:
        inner = perturbation.removal_curve(
            explained.subjects[model],
            explained.pictures.images,
            explained.maps[pair],
            explained.decisions,
            order,
            unit=size,
            fill=fill,
            seed=seed,
        )
        curves = torch.cat([ends[:, :1], inner, ends[:, 1:]], 1)
        row = Measurement("faithfulness", of_area, model, method, variant)
        notes.measure(row, lambda curves=curves: perturbation.area(curves, fractions))
        notes.measure(dataclasses.replace(row, metric=of_quarter), lambda curves=curves: curves[:, quarter])
        with contextlib.suppress(NotApplicable):  # the rows above say it
            points = [bootstrap(column, seed) for column in curves.T]
            value, low, high = (tuple(getattr(point, name) for point in points) for name in ("value", "low", "high"))
            notes.curves.append(Curve(model, method, variant, order, fractions, value, low, high))


def _randomised(notes: _Notes, explained: Explained, settings: Settings) -> None:
    """How much of a map stays when what the student learnt is shuffled away, block by block from the top."""
    images = explained.pictures.images[: settings.cascade_pictures]
    decisions = explained.decisions.rows(torch.arange(len(images)))
    for model, subject in explained.subjects.items():
        methods = [method for known, method in explained.maps if known == model and find_method(method).cheap]
        with notes.timed(f"randomisation: {model}"):
            for share, shuffled in cascade(subject, settings.cascade_steps, settings.seed):
                for method in methods:
                    row = Measurement("faithfulness", "randomised", model, method, f"{share:.0%} of the blocks")
                    before = explained.maps[model, method][: len(images)]
                    notes.measure(
                        row,
                        lambda method=method, shuffled=shuffled, before=before: rank_correlation(
                            before,
                            maps_of(find_method(method), shuffled, images, decisions, settings.seed),
                            explained.unit,
                        ),
                    )


# --------------------------------------------------------------------------------------------------------- localisation


def _localisation(notes: _Notes, explained: Explained, settings: Settings) -> None:
    masks = explained.pictures.masks
    for (model, method), maps in explained.maps.items():
        row = Measurement("localisation", "energy_in_mask", model, method)
        if masks is None:
            reason = "the pictures have no masks; pass --masks SHARDS"
            notes.absent(row, reason)
            continue
        notes.measure(row, lambda maps=maps: localisation.energy_in_mask(maps, masks))
        notes.measure(
            dataclasses.replace(row, metric="pointing_game"), lambda maps=maps: localisation.pointing_game(maps, masks)
        )
    if masks is not None:
        row = Measurement("localisation", "mask_area", "both")
        notes.measure(row, lambda: (masks > 0.5).float().mean((1, 2)))
    for protocol, side in settings.protocols:
        _grids(notes, explained, settings, protocol, side)


def _grids(notes: _Notes, explained: Explained, settings: Settings, protocol: str, side: int) -> None:
    """One GridPG protocol: the same grids, chosen by the teacher alone, for every method; those that fail are rows."""
    pictures, decisions = explained.pictures, explained.decisions
    variant = f"{protocol} {side}x{side}"
    outputs = outputs_of(explained.subjects["teacher"], pictures.images.split(explained.subjects["teacher"].batch_size))
    eligible = decisions.confidence(outputs) >= settings.confident
    if isinstance(decisions, ClassDecisions):
        # With labels, the teacher must be right; without, its own class is the decision.
        eligible &= outputs.argmax(1) == decisions.classes
    # As many cells in every protocol.
    count, rows = max(1, settings.grids * 4 // side**2), {}
    for model, method in explained.maps:
        rows[model, method] = Measurement("localisation", "gridpg", model, method, variant)
    try:
        grids = localisation.choose_grids(decisions, eligible, side, count, settings.seed)
        for subject in explained.subjects.values():
            runs_on(subject, pictures.images, side if protocol == "native" else 1)
    except NotApplicable as error:
        for row in rows.values():
            notes.absent(row, str(error))
        return
    make = localisation.native_maps if protocol == "native" else localisation.windowed_maps
    for (model, method), row in notes.bar(list(rows.items()), f"GridPG, {variant}"):
        way = find_method(method)
        passes = way.passes * (side**2 if protocol == "native" else (2 * side - 1) ** 2)
        if passes > settings.most_passes:
            notes.absent(row, f"{passes} passes a cell are more than {settings.most_passes} (--most-passes)")
            continue

        def maps(images: Tensor, wanted: Decisions, way: Method = way, model: str = model) -> Tensor:
            return maps_of(way, explained.subjects[model], images, wanted, settings.seed)

        with notes.timed(f"GridPG {variant}: {model}, {method}"):
            # Cells of a grid are not independent: the interval is over grids.
            notes.measure(
                row,
                lambda maps=maps: (
                    localisation.grid_scores(make(pictures.images, decisions, grids, maps), grids)
                    .view(len(grids), -1)
                    .mean(1)
                ),
            )


@torch.no_grad()
def runs_on(subject: Subject, images: Tensor, side: int) -> None:
    """Raises NotApplicable where the model does not take pictures `side` times as high and wide."""
    try:
        subject.model(fitted(images[:1].repeat(1, 1, side, side), subject.model))
    except Exception as error:  # noqa: BLE001 - libraries raise anything here
        size = " x ".join(str(length * side) for length in images.shape[-2:])
        raise NotApplicable(f"the model does not take pictures of {size}: {str(error).splitlines()[0]}") from error
