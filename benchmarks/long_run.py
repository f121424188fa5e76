"""A long alignment, as a curve: what every column is after so many views, and what ten times more would give.

    python benchmarks/long_run.py --student FOLDER --run OUT.run --data FOLDER [--measure] [--snapshot FOLDER]
        [--branch VIEWS A.run B.run]

`--student` is the converted model, `--run` the folder of the run beside its result (a run that still goes on will do).
`--measure` measures all columns of `columns.py` at the newest whole checkpoint and adds a row to
benchmarks/results/long_run.jsonl. `--snapshot` saves that student, to cool down by `bases/cnn-cooldown.yaml`: a run of
a constant rate is better than it looks until its rate has gone down. `--branch` shows runs that follow one another from
a snapshot of so many views, and keeps them in benchmarks/results/long_run_branch.json. The picture docs/long-run.png
and the table in docs/recipes-long.md are always drawn anew: from those rows, and from the run's own metrics.jsonl.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bcosify.align.pictures import STATISTICS_PICTURES
from bcosify.align.recipe import Recipe, load_recipe
from bcosify.align.state import latest, restore
from bcosify.convert import Student, load, save
from bcosify.convert.layers import estimate_gains, fold_gains, scheduled_layers
from bcosify.convert.original import teacher_of
from bcosify.data.index import index_shards
from bcosify.data.loader import held_out_batches
from bcosify.data.names import expand
from bcosify.data.views import to_model_input
from columns import columns, refer

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "long_run.jsonl", ROOT / "docs" / "recipes-long.md"
BRANCH, PICTURE = RESULTS.with_name("long_run_branch.json"), PAGE.with_name("long-run.png")
SHOWN = {
    "pictures": "views",
    "b": "B",
    "centred_cosine": "centred cosine",
    "neighbour_agreement": "neighbours",
    "top1_agreement": "top-1",
    "top1_confident": "top-1, teacher sure",
    "in_mask_contrast": "class contrast",
    "signed_share_contrast": "signed contrast",
    "pointing": "pointing",
    "other_pointing": "pointing, other class",
    "gridpg_windowed": "GridPG windowed",
    "gridpg_native": "GridPG native",
    "gridpg_native_pooled": "GridPG native, pooled",
    "constant_share": "constants",
    "carried_share": "carried",
}
CURVES = ("centred_cosine", "top1_agreement", "neighbour_agreement")


def newest_student(student: Path, run: Path, data: Path) -> tuple[Student, int]:
    """The student of the newest whole checkpoint, with gains at rest, and the views it has seen."""
    found = latest(run / "checkpoints")
    if found is None:
        raise SystemExit(f"{run} has no whole checkpoint yet.")
    checkpoint, progress = found
    made = load(student)
    teacher = teacher_of(made, None, converted=True)
    restore(checkpoint, made.model)
    recipe = load_recipe(str(run / "recipe.yaml"))
    estimate_gains(made.model, teacher, gain_batches(made, recipe, data))
    return made, progress.step * recipe.batch_size


def gain_batches(student: Student, recipe: Recipe, data: Path) -> list[torch.Tensor]:
    """As many whole pictures as a run estimates gains from."""
    index, size = index_shards(expand(str(data / "train-*.tar"))), recipe.image_size
    batches = held_out_batches(index, size=size, workers=0, limit=STATISTICS_PICTURES)
    mean, std = student.preprocess.mean, student.preprocess.std
    return [to_model_input(batch.pictures, mean, std) for batch in batches]


def measure(student: Path, run: Path, data: Path, teacher: str, size: int) -> dict[str, Any]:
    """A row of results: every column of the newest student."""
    made, pictures = newest_student(student, run, data)
    _, layer = next((name, one) for name, one in scheduled_layers(made.model) if "b" in one.strength_names)
    return {"pictures": pictures, **layer.strengths(), **columns(made.model.eval(), refer(teacher, size, data))}


def evaluations(run: Path, since: int = 1) -> list[dict[str, Any]]:
    """What the run itself measured on held-out pictures, from `since` views on."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["held_out"] for row in rows if "held_out" in row and row["held_out"]["pictures"] >= since]


def branch_of(views: int, runs: Sequence[Path]) -> list[dict[str, Any]]:
    """Held-out rows of runs that follow one another from a snapshot of `views` views, over all views."""
    rows: list[dict[str, Any]] = []
    for run in runs:
        found = evaluations(run, since=0)
        rows += [{**row, "pictures": views + row["pictures"]} for row in found if row["pictures"] or not rows]
        views += found[-1]["pictures"]
    return rows


def power_law(views: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """(scale, exponent) of 1 - value = scale * views^-exponent, by least squares of the logarithms."""
    slope, offset = np.polyfit(np.log(views), np.log1p(-np.asarray(values)), 1)
    return math.exp(offset), -float(slope)


def forecast(points: Sequence[dict[str, Any]], name: str) -> float | None:
    """What `name` is after ten times the views of the last point, by the power law; None of fewer than three points."""
    if len(points) < 3:
        return None
    scale, exponent = power_law([row["pictures"] for row in points], [row[name] for row in points])
    return 1 - scale * (10 * points[-1]["pictures"]) ** -exponent


def draw(
    curve: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], branch: Sequence[dict[str, Any]], hold: int
) -> None:
    """All curves over views, on a logarithmic axis; the fit of the hold as dashes, the branch as dots."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    held = [row for row in curve if row["pictures"] > hold]
    for name in CURVES:
        (line,) = left.plot([r["pictures"] for r in curve], [r[name] for r in curve], ".-", label=SHOWN[name])
        left.plot([r["pictures"] for r in branch], [r[name] for r in branch], "x:", color=line.get_color(), linewidth=1)
        if len(held) >= 3:
            scale, exponent = power_law([r["pictures"] for r in held], [r[name] for r in held])
            views = np.geomspace(held[0]["pictures"], 10 * held[-1]["pictures"])
            left.plot(views, 1 - scale * views**-exponent, "--", color=line.get_color(), linewidth=1)
    for name in ("signed_share_contrast", "pointing", "other_pointing", "gridpg_windowed", "top1_confident"):
        right.plot([row["pictures"] for row in rows], [row[name] for row in rows], "o-", label=SHOWN[name])
    for axes in (left, right):
        axes.set(xscale="log", xlabel="views", ylim=(None, 1))
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.savefig(PICTURE, dpi=110)


def page(
    curve: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], branch: Sequence[dict[str, Any]], hold: int
) -> str:
    """The Markdown of docs/recipes-long.md."""
    lines = [
        "# The long run of EfficientNet-Lite0",
        "",
        "Written by `benchmarks/long_run.py` from a run of `benchmarks/bases/cnn-long.yaml`; its columns are those of",
        "[recipes.md](recipes.md).",
        "",
        f"![all columns over views]({PICTURE.name})",
        "",
        "| " + " | ".join(SHOWN.values()) + " |",
        "| " + " | ".join("---" for _ in SHOWN) + " |",
    ]
    for row in rows:
        cells = [f"{row[key]:,}" if key == "pictures" else f"{row[key]:.3f}" for key in SHOWN]
        lines.append("| " + " | ".join(cells) + " |")
    held = [row for row in curve if row["pictures"] > hold]
    lines += ["", f"The ramp ends after {hold:,} views; the run has seen {curve[-1]['pictures']:,}."]
    if len(held) < 3:
        lines.append("A fit needs three evaluations after the ramp, and there are not so many yet.")
    else:
        said = [f"{SHOWN[name]} {forecast(held, name):.3f}" for name in CURVES]
        lines.append(f"By a power law through the {len(held)} evaluations since, ten times the views would give:")
        lines.append(f"{', '.join(said)}.")
    if branch:
        lines += [
            "",
            f"A branch left it after {branch[0]['pictures']:,} views to cool down (crosses; the recipe's end is",
            "`benchmarks/bases/cnn-cooldown.yaml`). Its last student comes with the package.",
            "",
            "| views | centred cosine | top-1 | neighbours |",
            "| --- | --- | --- | --- |",
        ]
        for row in branch:
            figures = " | ".join(f"{row[name]:.3f}" for name in CURVES)
            lines.append(f"| {row['pictures']:,} | {figures} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--teacher", default="efficientnet_lite0")
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--hold", type=int, default=30_000, help="views after which nothing is ramped any more.")
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--snapshot", type=Path)
    parser.add_argument("--branch", nargs="+", metavar=("VIEWS", "RUN"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.measure:
        row = measure(args.student, args.run, args.data, args.teacher, args.size)
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
    if args.snapshot is not None:
        made, pictures = newest_student(args.student, args.run, args.data)
        fold_gains(made.model)
        recipe = load_recipe(str(args.run / "recipe.yaml"))
        notes = {"continued from": {"recipe": dataclasses.asdict(recipe), "pictures": pictures}}
        save(made.with_history(notes=notes), args.snapshot)
        print(f"the student of {pictures:,} views: {args.snapshot}")
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []
    curve = evaluations(args.run)
    if args.branch:
        views, *runs = args.branch
        BRANCH.write_text(json.dumps(branch_of(int(views), [Path(run) for run in runs]), indent=1))
    branch = json.loads(BRANCH.read_text()) if BRANCH.is_file() else []
    draw(curve, rows, branch, args.hold)
    PAGE.write_text(page(curve, rows, branch, args.hold))


if __name__ == "__main__":
    main()
