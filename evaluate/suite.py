"""All metrics over a teacher, its student and the methods that explain them, on the same pictures: an Evaluation.

Costs are shared: random subsets are taken away once a model, the ends of a curve are measured once a model and fill,
every map is made once. What does not apply becomes a row that says why; a fault of ours or of the data is an error.
An evaluation is a sequence of named steps; each is kept as soon as it is done, so that what was stopped can go on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from ..core.errors import DataError, LedgerError, NotApplicable
from ..core.files import new_file
from ..core.pictures import fitted
from ..data.labelled import Pictures
from ..explain import explain_scores
from . import fidelity, localisation, perturbation, probes
from .baselines import Method, find_method, maps_of
from .decisions import ClassDecisions, Decisions, decide
from .estimates import Estimate, bootstrap, jackknife
from .features import DENSE, OUTPUT, cache_key, features_of
from .randomisation import cascade, rank_correlation
from .record import Curve, Evaluation, Measurement, Seconds, read_evaluation
from .subject import Subject, outputs_of

__all__ = ["Explained", "Pictures", "Settings", "evaluate_subjects"]

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
        subset_pictures: of sensitivity-n and infidelity, which need shares x subsets passes of each: the first so many.
    """

    methods: tuple[tuple[str, str], ...] = ()
    unit: int | None = None
    removals: tuple[tuple[int | None, str], ...] = ((None, "grey"),)
    protocols: tuple[tuple[str, int], ...] = (("native", 2), ("native", 3), ("windowed", 2))
    grids: int = 16
    most_passes: int = 128
    confident: float = 0.5
    shares: tuple[float, ...] = (0.1, 0.3, 0.5)
    subsets: int = 8
    subset_pictures: int = 32
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


@dataclasses.dataclass(frozen=True, eq=False)
class Explained:
    """The pictures, both models' outputs (N, D), the decisions, and maps (N, H, W) of every pair that applies."""

    pictures: Pictures
    outputs: dict[str, Tensor]
    decisions: Decisions
    subjects: dict[str, Subject]
    maps: dict[tuple[str, str], Tensor]
    unit: int

    def confidence(self, model: str) -> Tensor:
        """(N,) on the whole pictures."""
        return self.decisions.confidence(self.outputs[model])


class _Notes:
    """Measurements, curves and seconds as they come in, after those that `folder` holds of the same evaluation.

    `facts` are what the evaluation is of (model, data, settings); steps of another one in the folder are thrown away.
    """

    def __init__(self, facts: dict[str, Any], folder: Path | None, seed: int, progress: bool) -> None:
        self.facts, self.folder, self.seed, self.progress = facts, folder, seed, progress
        before = _before(folder, facts)
        self.measurements: list[Measurement] = list(before.measurements)
        self.curves: list[Curve] = list(before.curves)
        self.seconds: list[Seconds] = list(before.seconds)
        if folder is not None and not before.seconds:
            for stale in folder.glob("maps-*.safetensors"):
                stale.unlink()

    def evaluation(self) -> Evaluation:
        return Evaluation(
            **self.facts,
            measurements=tuple(self.measurements),
            curves=tuple(self.curves),
            seconds=tuple(self.seconds),
        )

    def step(self, name: str, run: Callable[[], None]) -> None:
        """Does a step that was not done before, and keeps what it found at once."""
        if self.done(name):
            return
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        took = Seconds(name, round(time.perf_counter() - wall, 2), round(time.process_time() - cpu, 2))
        self.seconds.append(took)
        if self.folder is not None:
            self.evaluation().write(self.folder)

    def done(self, name: str) -> bool:
        return any(known.step == name for known in self.seconds)

    def maps(self, model: str, method: str, make: Callable[[], Tensor]) -> Tensor | None:
        """The maps that `make` gives, or gave before; None where there are none, which then is a row."""
        name, path = f"maps: {model}, {method}", None
        if self.folder is not None:
            path = self.folder / f"maps-{model}-{method}.safetensors"
        if self.done(name):
            return load_file(path)["maps"] if path is not None and path.is_file() else None
        found: list[Tensor] = []

        def run() -> None:
            try:
                found.append(make())
            except NotApplicable as error:
                self.absent(Measurement("faithfulness", "maps", model, method), str(error))
                return
            if path is not None:
                with new_file(path) as scratch:
                    save_file({"maps": found[0].contiguous()}, scratch)

        self.step(name, run)
        return found[0] if found else None

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


def _before(folder: Path | None, facts: dict[str, Any]) -> Evaluation:
    """What `folder` holds of the evaluation with these facts; nothing where it holds none, or another one."""
    with contextlib.suppress(DataError):
        if folder is not None:
            found = read_evaluation(folder)
            if all(getattr(found, name) == json.loads(json.dumps(fact)) for name, fact in facts.items()):
                return found
    return Evaluation(**facts, measurements=())


def evaluate_subjects(
    teacher: Subject,
    student: Subject,
    fidelity_on: Pictures,
    explained_on: Pictures,
    settings: Settings,
    *,
    model: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    texts: Tensor | None = None,
    work: Path | None = None,
    progress: bool = True,
) -> tuple[Evaluation, Explained]:
    """Measures everything that applies.

    Args:
        fidelity_on: pictures of the fidelity and probe sections.
        explained_on: pictures that are explained, with masks where there are some.
        model, data: facts for the record.
        texts: (K, D) embeddings of the label names, for zero-shot accuracy.
        work: a folder that holds every step as soon as it is done. Given one with steps of the same model, data and
            settings, which `model` and `data` must tell apart, goes on after them.

    Returns:
        The evaluation, and the maps that it was made from.

    Raises:
        DataError: the models do not belong together, or there are no pictures.
    """
    unit = settings.unit or max(1, min(explained_on.images.shape[-2:]) // 8)
    facts = {
        "model": model or {},
        "data": {"pictures": len(fidelity_on), "explained": len(explained_on), **(data or {})},
        "settings": {**dataclasses.asdict(settings), "unit": unit},
    }
    notes = _Notes(facts, work, settings.seed, progress)
    notes.step("fidelity", lambda: _fidelity(notes, teacher, student, fidelity_on, texts))
    explained = _explained(notes, teacher, student, explained_on, settings, unit)
    notes.step("masks", lambda: _masks(notes, explained))
    _faithfulness(notes, explained, settings)
    for protocol, side in settings.protocols:
        _grids(notes, explained, settings, protocol, side)
    return notes.evaluation(), explained


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


def _explained(
    notes: _Notes, teacher: Subject, student: Subject, pictures: Pictures, settings: Settings, unit: int
) -> Explained:
    """Maps of every method for the same decisions: the teacher's own, or the labels where these are classes."""
    subjects = {"teacher": teacher, "student": student}
    outputs = {
        name: outputs_of(subject, pictures.images.split(subject.batch_size)) for name, subject in subjects.items()
    }
    theirs, ours = outputs.values()
    if theirs.shape[1] != ours.shape[1]:
        raise DataError(
            f"Teacher and student do not belong together: the teacher gives {theirs.shape[1]} numbers a picture, the "
            f"student {ours.shape[1]}. Pass the model that the student was converted from."
        )
    if not theirs.isfinite().all():
        raise DataError("The teacher's outputs hold NaN or infinity: its weights are broken, or the pictures are.")
    decisions = decide(theirs, teacher.classifier, pictures.labels if pictures.labels_are_classes else None)
    maps: dict[tuple[str, str], Tensor] = {}
    for model, name in notes.bar(settings.pairs, "maps"):
        make = functools.partial(maps_of, find_method(name), subjects[model], pictures.images, decisions, settings.seed)
        if (found := notes.maps(model, name, make)) is not None:
            maps[model, name] = found
    return Explained(pictures, outputs, decisions, subjects, maps, unit)


# --------------------------------------------------------------------------------------------------------- faithfulness


def _faithfulness(notes: _Notes, explained: Explained, settings: Settings) -> None:
    @functools.cache
    def subsets(model: str) -> tuple[Tensor, Tensor]:
        few = explained.pictures.images[: settings.subset_pictures]
        return perturbation.subset_drops(
            explained.subjects[model],
            few,
            explained.decisions.rows(torch.arange(len(few))),
            shares=settings.shares,
            count=settings.subsets,
            unit=explained.unit,
            seed=settings.seed,
        )

    @functools.cache
    def ends(model: str, fill: str) -> Tensor:
        """(N, 2) confidence on the whole pictures and on the fill alone."""
        subject, images = explained.subjects[model], explained.pictures.images
        filled = (perturbation.FILLS[fill](subject, part) for part in images.split(subject.batch_size))
        gone = explained.decisions.confidence(outputs_of(subject, filled))
        return torch.stack([explained.confidence(model), gone], 1)

    for model in explained.subjects:
        notes.step(f"ledger: {model}", functools.partial(_ledger, notes, explained, model))
    for pair in notes.bar(explained.maps, "faithfulness"):
        name = ", ".join(pair)
        for size, fill in settings.removals:
            variant = _variant(size or explained.unit, fill)
            notes.step(
                f"removal curves: {name}, {variant}",
                functools.partial(_removal, notes, explained, pair, ends, size or explained.unit, fill),
            )
        notes.step(f"average drop: {name}", functools.partial(_drop, notes, explained, pair))
        notes.step(f"sensitivity, infidelity: {name}", functools.partial(_subsets, notes, explained, pair, subsets))
    for model in explained.subjects:
        notes.step(f"randomisation: {model}", functools.partial(_randomised, notes, explained, settings, model))


def _drop(notes: _Notes, explained: Explained, pair: tuple[str, str]) -> None:
    model, method = pair
    subject, maps = explained.subjects[model], explained.maps[pair]
    masked = perturbation.masked_confidence(subject, explained.pictures.images, maps, explained.decisions)
    for metric, values in perturbation.average_drop(explained.confidence(model), masked).items():
        notes.measure(
            Measurement("faithfulness", metric, model, method),
            lambda metric=metric, values=values: _if_not_full(subject, metric) or values,
        )


def _subsets(
    notes: _Notes,
    explained: Explained,
    pair: tuple[str, str],
    subsets: Callable[[str], tuple[Tensor, Tensor]],
) -> None:
    """What random subsets cost is found out by the first method of a model, whose seconds it counts in."""
    model, method = pair
    drawn, drops = subsets(model)
    maps, unit = explained.maps[pair][: len(drawn)], explained.unit
    row = Measurement("faithfulness", "sensitivity_n", model, method)
    notes.measure(row, lambda: perturbation.sensitivity_n(maps, drawn, drops, unit))
    for metric, values in perturbation.infidelity(maps, drawn, drops, unit).items():
        row = dataclasses.replace(row, metric=metric)
        if metric == "infidelity" and not find_method(method).in_score_units:
            notes.absent(row, "its maps are not in units of the score")
        else:
            notes.measure(row, lambda values=values: values)


def _variant(size: int, fill: str) -> str:
    return f"{'pixels' if size == 1 else f'patches of {size}'}, {fill}"


def _if_not_full(subject: Subject, metric: str) -> None:
    if not subject.classifier and metric in ("average_gain", "increase"):
        raise NotApplicable("a model without classes is wholly confident of its own features from the start")


def _ledger(notes: _Notes, explained: Explained, model: str) -> None:
    """How exactly contributions and constants add up, how much of the score the constants are, and how sure it is."""
    subject, pictures, decisions = explained.subjects[model], explained.pictures, explained.decisions
    notes.measure(Measurement("faithfulness", "confidence", model), lambda: explained.confidence(model))
    residuals, shares, carried = [], [], []
    row = Measurement("faithfulness", "ledger_residual", model, OURS)
    try:
        for rows in torch.arange(len(pictures)).split(subject.batch_size):
            images = fitted(pictures.images[rows], subject.model)
            found = explain_scores(subject.model, images, decisions.rows(rows).target(), check=False)
            residuals.append(found.residual.abs() / found.scores.abs().clamp_min(1))
            parts = found.input_part.abs(), found.constant_part.abs()
            shares.append(parts[1] / (parts[0] + parts[1]).clamp_min(1e-12))
            if found.direct is not None:
                carried.append(found.carried_share)
    except LedgerError as error:
        notes.absent(row, str(error))
        return
    notes.measure(row, lambda: torch.cat(residuals).flatten())
    notes.measure(dataclasses.replace(row, metric="bias_share"), lambda: torch.cat(shares).flatten())
    if carried:
        notes.measure(dataclasses.replace(row, metric="carried_share"), lambda: torch.cat(carried).flatten())


def _removal(
    notes: _Notes,
    explained: Explained,
    pair: tuple[str, str],
    ends: Callable[[str, str], Tensor],
    size: int,
    fill: str,
) -> None:
    model, method = pair
    variant, around = _variant(size, fill), ends(model, fill)
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
            seed=notes.seed,
        )
        curves = torch.cat([around[:, :1], inner, around[:, 1:]], 1)
        row = Measurement("faithfulness", of_area, model, method, variant)
        notes.measure(row, lambda curves=curves: perturbation.area(curves, fractions))
        notes.measure(dataclasses.replace(row, metric=of_quarter), lambda curves=curves: curves[:, quarter])
        with contextlib.suppress(NotApplicable):  # the rows above say it
            points = [bootstrap(column, notes.seed) for column in curves.T]
            value, low, high = (tuple(getattr(point, name) for point in points) for name in ("value", "low", "high"))
            notes.curves.append(Curve(model, method, variant, order, fractions, value, low, high))


def _randomised(notes: _Notes, explained: Explained, settings: Settings, model: str) -> None:
    """How much of a map stays when what the model learnt is shuffled away, block by block from the top."""
    images = explained.pictures.images[: settings.cascade_pictures]
    decisions = explained.decisions.rows(torch.arange(len(images)))
    methods = [method for known, method in explained.maps if known == model and find_method(method).cheap]
    for share, shuffled in cascade(explained.subjects[model], settings.cascade_steps, settings.seed):
        for method in methods:
            before = explained.maps[model, method][: len(images)]
            notes.measure(
                Measurement("faithfulness", "randomised", model, method, f"{share:.0%} of the blocks"),
                lambda method=method, shuffled=shuffled, before=before: rank_correlation(
                    before,
                    maps_of(find_method(method), shuffled, images, decisions, settings.seed),
                    explained.unit,
                ),
            )


# --------------------------------------------------------------------------------------------------------- localisation


def _masks(notes: _Notes, explained: Explained) -> None:
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


def _grids(notes: _Notes, explained: Explained, settings: Settings, protocol: str, side: int) -> None:
    """One GridPG protocol: the same grids, chosen by the teacher alone, for every method."""
    pictures, decisions, variant = explained.pictures, explained.decisions, f"{protocol} {side}x{side}"

    @functools.cache
    def grids() -> localisation.Grids:
        eligible = explained.confidence("teacher") >= settings.confident
        if isinstance(decisions, ClassDecisions):
            # With labels, the teacher must be right; without, its own class is the decision.
            eligible &= explained.outputs["teacher"].argmax(1) == decisions.classes
        # As many cells in every protocol.
        count = max(1, settings.grids * 4 // side**2)
        chosen = localisation.choose_grids(decisions, eligible, side, count, settings.seed)
        for subject in explained.subjects.values():
            runs_on(subject, pictures.images, side if protocol == "native" else 1)
        return chosen

    def scores(model: str, way: Method) -> Tensor:
        passes = way.passes * (side**2 if protocol == "native" else (2 * side - 1) ** 2)
        passes = -(-passes // side**2) if way.shared else passes
        if passes > settings.most_passes:
            raise NotApplicable(f"{passes} passes a cell are more than {settings.most_passes} (--most-passes)")

        def maps(images: Tensor, wanted: Decisions) -> Tensor:
            return maps_of(way, explained.subjects[model], images, wanted, settings.seed)

        make = localisation.native_maps if protocol == "native" else localisation.windowed_maps
        found = localisation.grid_scores(make(pictures.images, decisions, grids(), maps), grids())
        # Cells of a grid are not independent: the interval is over grids.
        return found.view(len(grids()), -1).mean(1)

    for model, method in notes.bar(explained.maps, f"GridPG, {variant}"):
        row = Measurement("localisation", "gridpg", model, method, variant)
        value = functools.partial(scores, model, find_method(method))
        notes.step(f"GridPG {variant}: {model}, {method}", functools.partial(notes.measure, row, value))


@torch.no_grad()
def runs_on(subject: Subject, images: Tensor, side: int) -> None:
    """Raises NotApplicable where the model does not take pictures `side` times as high and wide."""
    try:
        subject.model(fitted(images[:1].repeat(1, 1, side, side), subject.model))
    except Exception as error:  # noqa: BLE001 - libraries raise anything here
        size = " x ".join(str(length * side) for length in images.shape[-2:])
        raise NotApplicable(f"the model does not take pictures of {size}: {str(error).splitlines()[0]}") from error
