"""`bcosify.evaluate`: a converted model and shards become an Evaluation and its report, with the command's options."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..convert import Preprocess, Student, embed_texts, load, teacher_of, token_grid
from ..convert.layers import scheduled_layers
from ..convert.memory import laid_out
from ..convert.output import OutputKind, output_kind
from ..core.devices import find_device
from ..core.errors import DataError, TargetError
from ..core.files import check_free, new_folder, paths_in
from ..core.ranges import ANY_COUNT, COUNT, SEED, SIDE, ranged
from ..core.versions import versions
from ..data.index import ShardIndex
from ..data.labelled import Pictures, class_indices, find_pictures, read_pictures
from .baselines import METHODS, find_method
from .protocols import Protocol, check_labels, evaluate_protocol, find_protocol
from .record import REPORT, Evaluation, written
from .report import gallery_of, report_page
from .store import check_work, clear
from .subject import Subject, weights_digest
from .suite import Explained, Settings, evaluate_subjects

__all__ = ["CHEAP", "evaluate"]

# The methods that a student is compared with where nothing else is said.
CHEAP = ("input-x-gradient", "integrated-gradients", "grad-cam", "occlusion")
REMOVALS = ("patches:grey",)
Shards = str | Path | Sequence[str | Path]


@ranged(
    pictures=COUNT,
    grids=ANY_COUNT,
    most_passes=ANY_COUNT,
    image_size=SIDE,
    batch_size=COUNT,
    seed=SEED,
    max_pixels=COUNT,
)
def evaluate(
    model: Student | str | Path,
    *,
    data: Shards,
    masks: Shards | None = None,
    labels: str | None = None,
    against: Sequence[str] | None = None,
    pictures: int = 128,
    grids: int | None = None,
    most_passes: int = 128,
    removals: Sequence[str] | None = None,
    controls: bool = True,
    protocol: str | None = None,
    out: str | Path | None = None,
    weights: str | Path | None = None,
    image_size: int | None = None,
    batch_size: int = 32,
    device: str = "auto",
    seed: int = 0,
    max_pixels: int | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Evaluation:
    """Measures a student against its teacher and other methods: fidelity, faithfulness and localisation.

    Explanations are judged on the same pictures for the teacher's own decisions, so no labels are needed. See
    `evaluate_subjects` for other models than a student and its teacher.

    Args:
        model: a Student, or a converted model: a folder, or ORG/REPO[@rev] on the hub.
        data: shards that fidelity is measured on: folders, globs, brace syntax.
        masks: shards whose samples have a mask.png or a box; these pictures are explained, else those of `data` are.
        labels: key of a label in each sample's json (or its cls member): adds k-NN, linear probe and zero-shot.
        against: other methods, on the teacher, or on the student as student:METHOD; default `CHEAP`; `all`, `none`.
        pictures: at most so many are explained, drawn by `seed`.
        grids: how many 2x2 grids GridPG gets (and 3x3 ones of as many cells); default 16, of fewer than 64 pictures a
            quarter of them.
        most_passes: leave a method out of a GridPG protocol where a cell takes more passes than this.
        removals: UNIT:FILL of deletion and insertion: patches or pixels; grey, mean, blur or complement.
        controls: also measure models and maps that know less, beside every figure (see `metrics.controls`).
        protocol: measure a published protocol instead, with its settings: one of `PROTOCOLS`. It needs `labels`, which
            are class numbers, and uses all of `data`; `against` is then nothing unless given.
        out: also write evaluation.json and report.html to this folder. `out`.run then keeps every step that is done, so
            that the same call goes on after an interruption.
        weights: the teacher's state dict, where it was converted from a file.
        image_size: side in pixels, where it is not the model's own.
        batch_size: pictures a forward pass.
        device: cpu, cuda, ...; auto takes a GPU where there is one.
        seed: of every draw.
        max_pixels: larger pictures are skipped, or read smaller if they are JPEGs (see `data.pictures`).
        overwrite: replace `out` if it exists.
        progress: show bars on stderr.

    Raises:
        DataError, TargetError, CheckpointError, SourceError: before anything is written.
    """
    out = None if out is None else Path(out)
    place = find_device(device)
    published = None if protocol is None else find_protocol(protocol)
    if published is not None:
        given = {"masks": masks, "pictures": pictures, "grids": grids, "most_passes": most_passes}
        _check_fixed(published, labels, {**given, "removals": removals, "controls": controls})
        against = against or ["none"]
    if out is not None:
        check_free(out, overwrite, written, paths_in(model, data, masks, weights))
    settings = Settings(
        _methods([against] if isinstance(against, str) else against or CHEAP),
        removals=_removals([removals] if isinstance(removals, str) else removals or REMOVALS),
        most_passes=most_passes,
        controls=controls,
        seed=seed,
    )
    student = _opened(model)
    preprocess = student.preprocess.at(image_size)
    output = output_kind(student)
    if published is not None and not output.chooses:
        raise DataError(f"--protocol {protocol} is about classes, and the model has none. Leave --protocol out.")
    index = find_pictures(data)
    shown = index if masks is None else find_pictures(masks)
    fidelity_on = _pictures(index, preprocess, output, label=labels, max_pixels=max_pixels)
    explained_on = None
    if published is None or masks is not None:
        count, label = (pictures, None) if published is None else (published.masked, labels)
        drawn = {"count": count, "masks": masks is not None, "seed": seed}
        explained_on = _pictures(shown, preprocess, output, label=label, max_pixels=max_pixels, **drawn)
    if published is not None:
        check_labels(published, fidelity_on, explained_on)
    # In the record as `skipped`: they are in none of its numbers.
    broken = [*fidelity_on.skipped, *(() if explained_on is None else explained_on.skipped)]
    skipped = [one._asdict() for one in dict.fromkeys(broken)]
    teacher, ours = _subjects(student, weights, preprocess, batch_size, place)
    model_facts = _model_facts(student, preprocess, teacher, ours)
    data_facts = {
        "data": index.digest,
        "masks": None if masks is None else shown.digest,
        "labels": labels,
        **({"skipped": skipped} if skipped else {}),
    }
    texts = None
    if student.text is not None and fidelity_on.label_names:
        texts = embed_texts(student.text, fidelity_on.label_names)
    # What a stopped evaluation found is beside its report, and is gone when the report is there.
    work = None if out is None else out.with_name(f"{out.name}.run")
    check_work(work)
    with _report_folder(out, overwrite) as folder:
        options = {"model": model_facts, "data": data_facts, "work": work, "progress": progress}
        if published is None:
            assert explained_on is not None
            untrained = {"untrained": partial(_untrained, student, weights, ours)} if controls else None
            evaluation, explained = evaluate_subjects(
                *(teacher, ours, fidelity_on, explained_on, settings.sized(len(explained_on), grids)),
                texts=texts,
                untrained=untrained,
                **options,
            )
        else:
            evaluation = evaluate_protocol(
                published, (teacher, ours), fidelity_on, explained_on, settings.methods, seed=seed, **options
            )
            explained = None
        if folder is not None:
            _write(folder, evaluation, explained, student, preprocess, len(fidelity_on), len(skipped))
    if work is not None:
        clear(work)
    return evaluation


def _opened(model: Student | str | Path) -> Student:
    """The student, a copy of one that is given: it may be moved and laid out anew here."""
    if isinstance(model, Student):
        return dataclasses.replace(model, model=copy.deepcopy(model.model))
    return load(model)


def _pictures(index: ShardIndex, preprocess: Preprocess, output: OutputKind, **options: Any) -> Pictures:
    """As `read_pictures`; label numbers are classes, where the model has some."""
    return class_indices(read_pictures(index, preprocess, **options), output.count if output.chooses else 0)


def _model_facts(student: Student, preprocess: Preprocess, teacher: Subject, ours: Subject) -> dict[str, Any]:
    """What is measured, for the record."""
    return {
        "reference": student.source.reference,
        "method": student.method,
        "size": preprocess.size,
        "teacher_weights": weights_digest(teacher.model),
        "student_weights": weights_digest(ours.model),
        "versions": versions(),
    }


def _check_fixed(protocol: Protocol, labels: str | None, given: Mapping[str, object]) -> None:
    """Raises TargetError where a protocol has no labels, or where options ask for other settings than it has."""
    if labels is None:
        raise TargetError(
            f"--protocol {protocol.name} measures labels, and none are given. Pass --labels cls, or the key of the "
            "class number in each sample's json."
        )
    if given["masks"] is not None and not protocol.masked:
        raise TargetError(f"--protocol {protocol.name} uses no masks. Leave --masks out.")
    defaults = inspect.signature(evaluate).parameters
    if told := [name for name, value in given.items() if name != "masks" and value != defaults[name].default]:
        words = ", ".join("--no-controls" if name == "controls" else f"--{name.replace('_', '-')}" for name in told)
        raise TargetError(
            f"--protocol {protocol.name} has settings of its own, and {words} would change them. Leave "
            f"{words} out, or --protocol."
        )


def _subjects(
    student: Student, weights: str | Path | None, preprocess: Preprocess, batch_size: int, device: torch.device
) -> list[Subject]:
    """The teacher and the student, on the device."""
    teacher, output = teacher_of(student, None if weights is None else Path(weights)), output_kind(student)
    return [
        Subject(
            name,
            laid_out(found.eval().requires_grad_(False)).to(device),
            partial(token_grid, student.source),
            preprocess.mean,
            preprocess.std,
            output.chooses,
            batch_size,
            output.kind,
        )
        for name, found in (("teacher", teacher), ("student", student.model))
    ]


def _untrained(student: Student, weights: str | Path | None, like: Subject) -> Subject:
    """The student as it was converted, at the strengths that it has now, with all weights its teacher's."""
    model = teacher_of(student, None if weights is None else Path(weights), converted=True)
    now = dict(scheduled_layers(student.model))
    for name, layer in scheduled_layers(model):
        for strength, value in now[name].strengths().items():
            layer.set_strength(strength, value)
    return dataclasses.replace(
        like, name="untrained", model=laid_out(model.eval().requires_grad_(False)).to(like.device)
    )


@contextlib.contextmanager
def _report_folder(out: Path | None, overwrite: bool) -> Iterator[Path | None]:
    if out is None:
        yield None
    else:
        with new_folder(out, overwrite, written) as folder:
            yield folder


def _write(
    folder: Path,
    evaluation: Evaluation,
    explained: Explained | None,
    student: Student,
    preprocess: Preprocess,
    count: int,
    skipped: int,
) -> None:
    """evaluation.json and report.html; `count` pictures were used for fidelity, and `skipped` could not be read."""
    evaluation.write(folder)
    gallery = [] if explained is None else gallery_of(explained, output_kind(student))
    title = f"{student.source.reference}, {student.method} student"
    what = (
        f"{count:,} pictures for fidelity, {len(explained.pictures):,} explained"
        if explained
        else f"{count:,} pictures"
    )
    about = f"{what}, at {preprocess.size[0]} px."
    if explained is None:
        about += f" Protocol {evaluation.settings['protocol']}: {evaluation.settings['source']}."
    about += f" {skipped:,} could not be read." if skipped else ""
    (folder / REPORT).write_text(report_page(evaluation, gallery, title, about), "utf-8")


def _methods(words: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """(model, method) pairs of --against; raises TargetError for what is none."""
    if list(words) == ["none"]:
        return ()
    words = list(METHODS) if list(words) == ["all"] else [name for word in words for name in word.split(",")]
    pairs = []
    for word in words:
        who, _, method = word.rpartition(":")
        if who not in ("", "teacher", "student"):
            raise TargetError(f"--against {word}: there is no model {who!r}. Pass teacher:METHOD or student:METHOD.")
        pairs.append((who or "teacher", find_method(method).name))
    return tuple(pairs)


def _removals(words: Sequence[str]) -> tuple[tuple[int | None, str], ...]:
    """(unit, fill) pairs of --removals."""
    pairs: list[tuple[int | None, str]] = []
    for word in words:
        unit, _, fill = word.partition(":")
        if unit not in ("patches", "pixels"):
            raise TargetError(f"--removals {word}: no unit {unit!r}. Pass patches:FILL or pixels:FILL.")
        pairs.append((1 if unit == "pixels" else None, fill or "grey"))
    return tuple(pairs)
