"""Small alignment runs for tests: their recipes, and what a run left behind."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from bcosify.align.objectives import OBJECTIVES
from bcosify.align.recipe import Phase, Recipe
from bcosify.align.trainer import AlignConfig, align
from bcosify.convert import convert, load_teacher, save

PHASES = (
    Phase("block-local", 40, 1e-3, calibrate=8),
    Phase("end-to-end", 40, 1e-3, b=(2.0, 2.0)),
)
RECIPE = Recipe(
    "B is 2 and biases are gone",
    64,
    4,
    PHASES,
    held_out=8,
    evaluate_every=40,
    checkpoint_every=20,
    log_every=1,
    workers=0,
)
CNN_PHASES = (Phase("end-to-end", 80, 5e-3, b=(1.0, 2.0), beta=(1.0, 0.0), ramp=0.5, batch_statistics=True),)
CNN_RECIPE = dataclasses.replace(RECIPE, phases=CNN_PHASES)


def asking(recipe: Recipe, **settings: Any) -> Recipe:
    """`recipe` with settings for the objectives of all phases that take them."""
    takes = lambda phase: {field.name for field in dataclasses.fields(OBJECTIVES[phase.objective].config_class)}  # noqa: E731
    phases = (
        dataclasses.replace(
            phase, settings=phase.settings | {name: settings[name] for name in settings if name in takes(phase)}
        )
        for phase in recipe.phases
    )
    return dataclasses.replace(recipe, phases=tuple(phases))


def converted(name: str, folder: Path) -> Path:
    """The folder of a converted tiny timm model with random weights."""
    torch.manual_seed(0)
    return save(convert(load_teacher(f"timm:{name}", pretrained=False, image_size=64)), folder / name)


def aligned(run: Path, shards: Path, out: Path, recipe: Recipe = RECIPE, **options) -> list[dict]:
    align(AlignConfig(run, str(shards), out, recipe, quiet=True, **options))
    return rows(out)


def rows(out: Path) -> list[dict]:
    """metrics.jsonl without what the clock decides."""
    lines = (out.with_name(f"{out.name}.run") / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "pictures_per_second"} for line in lines]
