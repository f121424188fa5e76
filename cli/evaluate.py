"""bcosify evaluate"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .console import console, show_table

CHEAP = ("input-x-gradient", "integrated-gradients", "grad-cam", "occlusion")


def evaluate(
    model: str,
    *,
    data: str,
    masks: str | None = None,
    labels: str | None = None,
    against: list[str] | None = None,
    pictures: int = 128,
    grids: int = 16,
    most_passes: int = 128,
    removals: list[str] | None = None,
    out: Path = Path("report"),
    weights: Path | None = None,
    image_size: int | None = None,
    batch_size: int = 32,
    device: str = "auto",
    seed: int = 0,
    overwrite: bool = False,
    json: bool = False,
) -> dict[str, Any]:
    """Measures a student against its teacher: fidelity, faithfulness and localisation, with intervals, and a report.

    OUT gets evaluation.json and report.html, which works from disk. Explanations of both models and of the other
    methods are judged on the same pictures, for the teacher's own decisions: no labels are needed. What does not apply
    is said. What takes long can be stopped: OUT.run has an evaluation.json of every step that was done, and the same
    command goes on after them.
    Example: bcosify evaluate runs/dino/aligned --data val.tar --masks objects.tar --out report

    Args:
        model: a converted model: a folder, or ORG/REPO[@rev] on the hub.
        data: shards that fidelity is measured on: a folder, a glob, brace syntax, or several joined by ::
        masks: shards whose samples have a mask.png or a box; these pictures are explained, else those of --data are.
        labels: key of a label in each sample's json (or its cls member): adds k-NN, linear probe and zero-shot.
        against: other methods, on the teacher, or on the student as student:METHOD; default input-x-gradient,
            integrated-gradients, grad-cam and occlusion; also lime, rise, attention, rollout; `all`, `none`.
        pictures: at most so many are explained, drawn by --seed.
        grids: how many 2x2 grids GridPG gets (and 3x3 ones of as many cells).
        most_passes: leave a method out of a GridPG protocol where a cell takes more passes than this.
        removals: UNIT:FILL of deletion and insertion: patches or pixels; grey, mean, blur or complement;
            default patches:grey.
        out: folder for the report.
        weights: the teacher's state dict, where it was converted from a file.
        image_size: side in pixels, where it is not the model's own.
        batch_size: pictures a forward pass.
        device: cpu, cuda, ...; auto takes a GPU where there is one.
        seed: of every draw.
        overwrite: replace the folder if it exists.
        json: print the evaluation as JSON on stdout.
    """
    import dataclasses
    import shutil

    import torch

    from ..align.prepare import teacher_of
    from ..convert import embed_texts, load, token_grid
    from ..convert.memory import laid_out
    from ..core.files import check_free, new_folder
    from ..core.versions import versions
    from ..evaluate import suite
    from ..evaluate.report import gallery_of, report_page
    from ..evaluate.subject import Subject, weights_digest
    from .pictures import class_indices, find_pictures, read_pictures

    check_free(out, overwrite)
    settings = suite.Settings(
        _methods(against or CHEAP),
        removals=_removals(removals or ["patches:grey"]),
        grids=grids,
        most_passes=most_passes,
        seed=seed,
    )
    student = load(model)
    preprocess = student.preprocess.at(image_size)
    index = find_pictures(data)
    fidelity_on = class_indices(read_pictures(index, preprocess, label=labels), student.labels)
    shown = index if masks is None else find_pictures(masks)
    explained_on = read_pictures(shown, preprocess, count=pictures, masks=masks is not None, seed=seed)
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    teacher, ours = (
        Subject(
            name,
            laid_out(found.eval().requires_grad_(False)).to(place),
            partial(token_grid, student.source),
            preprocess.mean,
            preprocess.std,
            student.labels is not None,
            batch_size,
        )
        for name, found in (("teacher", teacher_of(student, weights)), ("student", student.model))
    )
    texts = None
    if student.text is not None and fidelity_on.label_names:
        texts = embed_texts(student.text, fidelity_on.label_names)
    # What a stopped evaluation found is beside its report, and is gone when the report is there.
    work = out.with_name(f"{out.name}.run")
    with new_folder(out, overwrite) as folder:
        evaluation, explained = suite.evaluate(
            teacher,
            ours,
            fidelity_on,
            explained_on,
            settings,
            model={
                "reference": student.source.reference,
                "method": student.method,
                "size": preprocess.size,
                "teacher_weights": weights_digest(teacher.model),
                "student_weights": weights_digest(ours.model),
                "versions": versions(),
            },
            data={"data": index.digest, "masks": None if masks is None else shown.digest, "labels": labels},
            texts=texts,
            work=work,
        )
        evaluation.write(folder)
        gallery = gallery_of(explained, student.labels)
        names = [f"{who}: {method}" for who, method in explained.maps]
        title = f"{student.source.reference}, {student.method} student"
        about = (
            f"{len(fidelity_on):,} pictures for fidelity, {len(explained_on):,} explained, at {preprocess.size[0]} px."
        )
        (folder / "report.html").write_text(report_page(evaluation, gallery, title, about, names), "utf-8")
    shutil.rmtree(work, ignore_errors=True)
    _summary(evaluation)
    console.print(f"wrote {out / 'evaluation.json'} and {out / 'report.html'}")
    return dataclasses.asdict(evaluation)


def _methods(words: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """(model, method) pairs of --against; raises TargetError for what is none."""
    from ..core.errors import TargetError
    from ..evaluate.baselines import METHODS, find_method

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
    from ..core.errors import TargetError

    pairs: list[tuple[int | None, str]] = []
    for word in words:
        unit, _, fill = word.partition(":")
        if unit not in ("patches", "pixels"):
            raise TargetError(f"--removals {word}: no unit {unit!r}. Pass patches:FILL or pixels:FILL.")
        pairs.append((1 if unit == "pixels" else None, fill or "grey"))
    return tuple(pairs)


def _summary(evaluation: Any) -> None:
    from ..evaluate.report.tables import fidelity_table, method_tables, turned

    # A terminal is narrow: metrics down, methods across.
    maps = {section: turned(table) for section, table in method_tables(evaluation).items() if table.rows}
    for title, table in {"fidelity": fidelity_table(evaluation), **maps}.items():
        if table.rows:
            rows = [
                [f"{cell.text} ({cell.interval})" if cell.interval else cell.text for cell in row] for row in table.rows
            ]
            heads = [f"{name} ({hint})" if hint else name for name, hint in table.columns]
            show_table(title, heads, rows)
