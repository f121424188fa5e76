"""Held-out fidelity over pictures seen, for the two real bundled models: the README's alignment tables.

    python benchmarks/alignment.py --data FOLDER [--model dinov2_small] [--arm recipe published] [--pictures 9600]

FOLDER holds train-*.tar and val-*.tar (webdataset shards of JPEGs, no labels). For every model and arm a student is
converted, aligned to B = 2 without biases, and explained before and after; the table and OUT/alignment.json say what
came out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from bcosify.align.loader import held_out_batches, to_model_input
from bcosify.align.recipe import Phase, Recipe, load_recipe, scaled
from bcosify.align.shards import expand, index_shards
from bcosify.align.trainer import AlignConfig, align
from bcosify.cli.console import show_table
from bcosify.convert import Student, convert, load, load_teacher, save
from bcosify.explain import SelfTarget, TopTarget, explain

MODELS = {"dinov2_small": "bcos/vit", "efficientnet_lite0": "bcos/cnn"}


def published(recipe: Recipe) -> Recipe:
    """The published way at the same length and size: end to end from an abrupt start, plain cosines, no calibration."""
    pictures = sum(phase.pictures for phase in recipe.phases)
    phase = Phase("end-to-end", pictures, 3e-4, relative=False, clip=1.0)
    return dataclasses.replace(recipe, pressure="B is 2 and biases are gone at once", phases=(phase,), centre=False)


ARMS = {"recipe": lambda recipe: recipe, "published": published}


def ledger(student: Student, pictures: torch.Tensor) -> dict[str, float]:
    """Worst residual over max(1, |score|), and the share of |constants| in |input| + |constants|, over pictures."""
    target = TopTarget(1) if student.labels else SelfTarget()
    explanation = explain(student.model, pictures, target, check=False)
    scale = explanation.scores.abs().clamp_min(1)
    inputs, constants = explanation.input_part.abs(), explanation.constant_part.abs()
    return {
        "residual": float((explanation.residual.abs() / scale).max()),
        "constant_share": float((constants / (inputs + constants)).mean()),
    }


def measure(model: str, arm: str, data: Path, out: Path, overrides: list[str], pictures: int | None) -> dict[str, Any]:
    """One run: converted, aligned, explained."""
    recipe = ARMS[arm](load_recipe(MODELS[model], overrides))
    recipe = recipe if pictures is None else scaled(recipe, pictures)
    folder = out / f"{model}-{arm}-{recipe.image_size}px-{sum(p.pictures for p in recipe.phases)}"
    student = convert(load_teacher(f"bundled:{model}"))
    save(student, folder, overwrite=True)
    val = str(data / "val-*.tar")
    preprocess = student.preprocess.at(recipe.image_size)
    batch = next(iter(held_out_batches(index_shards(expand(val)), size=recipe.image_size, limit=16)))
    shown = to_model_input(batch.pictures, preprocess.mean, preprocess.std)
    before = ledger(student, shown)
    started = time.monotonic()
    config = AlignConfig(folder, str(data / "train-*.tar"), folder / "aligned", recipe, val, overwrite=True)
    result = align(config)
    return {
        "model": model,
        "arm": arm,
        "image_size": recipe.image_size,
        "batch_size": recipe.batch_size,
        "minutes": round((time.monotonic() - started) / 60, 1),
        "curve": result["curve"],
        "ledger_before": before,
        "ledger_after": ledger(load(folder / "aligned"), shown),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--model", choices=MODELS, nargs="+", default=list(MODELS))
    parser.add_argument("--arm", choices=ARMS, nargs="+", default=["recipe"])
    parser.add_argument("--pictures", type=int, help="stretch the recipe to this many pictures")
    parser.add_argument("--set", nargs="+", default=[], help="changes to the recipe, such as image_size=70")
    options = parser.parse_args()
    runs = [
        measure(model, arm, options.data, options.out, options.set, options.pictures)
        for model in options.model
        for arm in options.arm
    ]
    columns = ["raw_cosine", "centred_cosine", "neighbour_agreement", "top1_agreement"]
    for run in runs:
        title = f"{run['model']}, {run['arm']}, {run['image_size']} px, {run['minutes']} min"
        rows = [
            [point["pictures"], point.get("objective", "start"), *(point.get(c, "") for c in columns)]
            for point in run["curve"]
        ]
        show_table(title, ["pictures", "phase", *(c.replace("_", " ") for c in columns)], rows)
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "alignment.json"
    earlier = json.loads(path.read_text())["runs"] if path.is_file() else []
    path.write_text(json.dumps({"machine": machine, "runs": earlier + runs}, indent=2))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
