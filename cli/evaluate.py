"""bcosify evaluate"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import console, show_cells

if TYPE_CHECKING:
    from ..evaluate import Evaluation


ACROSS = 5  # methods in a table


def evaluate(
    model: str,
    *,
    data: str,
    masks: str | None = None,
    labels: str | None = None,
    against: list[str] | None = None,
    pictures: int = 128,
    grids: int | None = None,
    most_passes: int = 128,
    removals: list[str] | None = None,
    controls: bool = True,
    protocol: str | None = None,
    out: Path = Path("report"),
    weights: Path | None = None,
    image_size: int | None = None,
    batch_size: int = 32,
    device: str = "auto",
    seed: int = 0,
    max_pixels: int | None = None,
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
            integrated-gradients, grad-cam and occlusion; also smoothgrad, lime, rise, attention, rollout,
            chefer, legrad, grad-eclip, attn-lrp, libragrad; `all`, `none`.
        pictures: at most so many are explained, drawn by --seed.
        grids: how many 2x2 grids GridPG gets (and 3x3 ones of as many cells); default 16, of fewer than 64 pictures a
            quarter of them.
        most_passes: leave a method out of a GridPG protocol where a cell takes more passes than this.
        removals: UNIT:FILL of deletion and insertion: patches or pixels; grey, mean, blur or complement;
            default patches:grey.
        controls: leave out what shows how figures look where there is nothing to find: a Gaussian, edges, an averaged
            map, the untrained student, and students with shuffled blocks.
        protocol: measure a published protocol instead, every setting as published: bcos-v2, aloe, idsds or libragrad.
            It needs --labels with class numbers, and takes all of --data; of other methods those that --against names.
        out: folder for the report.
        weights: the teacher's state dict, where it was converted from a file.
        image_size: side in pixels, where it is not the model's own.
        batch_size: pictures a forward pass.
        device: cpu, cuda, ...; auto takes a GPU where there is one.
        seed: of every draw.
        max_pixels: pictures with more pixels are skipped, or read smaller if they are JPEGs; 100000000 if not given.
        overwrite: replace the folder if it exists.
        json: print the evaluation as JSON on stdout.
    """
    from ..evaluate import evaluate as evaluate_model

    evaluation = evaluate_model(
        model,
        data=data,
        masks=masks,
        labels=labels,
        against=against,
        pictures=pictures,
        grids=grids,
        most_passes=most_passes,
        removals=removals,
        controls=controls,
        protocol=protocol,
        out=out,
        weights=weights,
        image_size=image_size,
        batch_size=batch_size,
        device=device,
        seed=seed,
        max_pixels=max_pixels,
        overwrite=overwrite,
        progress=True,
    )
    _summary(evaluation)
    console.print(f"wrote {out / 'evaluation.json'} and {out / 'report.html'}")
    return dataclasses.asdict(evaluation)


def _summary(evaluation: Evaluation) -> None:
    from ..evaluate.report.tables import Table, fidelity_table, method_tables, student_first, turned
    from ..evaluate.verdict import verdict

    if "protocol" in evaluation.settings:
        console.print(f"{evaluation.settings['protocol']}: {evaluation.settings['source']}", style="bold")
        console.print(evaluation.settings["differs"])
    else:
        said = verdict(evaluation)
        console.print(str(said), style="bold red" if said.doubtful else "bold")
    # A terminal is narrow: metrics down, and a few methods across.
    maps = {
        f"{section}, continued" if start else section: turned(Table(table.columns, rows[start : start + ACROSS]))
        for section, table in method_tables(evaluation).items()
        for rows in [student_first(table).rows]
        for start in range(0, len(rows), ACROSS)
    }
    for title, table in {"fidelity": fidelity_table(evaluation), **maps}.items():
        if table.rows:
            heads = [f"{name} ({hint})" if hint else name for name, hint in table.columns]
            show_cells(title, heads, table)
