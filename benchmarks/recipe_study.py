"""Which recipe is best, by measurement: experiments at equal pictures seen, on the two real bundled models.

    python benchmarks/recipe_study.py --data FOLDER [--only 'vit/*'] [--out runs/study]

FOLDER holds train-*.tar and val-*.tar (webdataset shards of JPEGs, no labels) and objects-*.tar (objects with exact
masks). Every YAML file below benchmarks/recipes is one experiment, named by its path (`vit/published`):

    why: what is asked
    teacher: dinov2_small            # a model of the `bundled:` scheme
    recipe: bcos/vit                 # what is changed
    pictures: 1600                   # the whole length, over all phases
    set: {phases.0.calibrate: 0}     # changes to the recipe
    sweep: {phases.0.learning_rate: [1e-4, 3e-4, 1e-3]}   # each value with the first seed, the best with all
    seeds: [0, 1]

A run that is in the results already is not run again. Writes benchmarks/recipes/results.jsonl (one run a line) and
docs/recipes.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import itertools
import json
import platform
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from bcosify.align.loader import held_out_batches, to_model_input
from bcosify.align.recipe import load_recipe, scaled
from bcosify.align.shards import expand, index_shards
from bcosify.align.trainer import AlignConfig, align
from bcosify.cli.pictures import find_pictures, read_pictures
from bcosify.convert import Preprocess, convert, load, load_teacher, save
from bcosify.convert.methods import find_method
from bcosify.evaluate.decisions import decide
from bcosify.evaluate.fidelity import fidelity
from bcosify.evaluate.localisation import positive_shares
from bcosify.evaluate.suite import Pictures
from bcosify.explain import Target, explain
from torch import Tensor, nn

HERE = Path(__file__).parent
EXPERIMENTS, RESULTS, PAGE = HERE / "recipes", HERE / "recipes" / "results.jsonl", HERE.parent / "docs" / "recipes.md"
# What the best value of a sweep is chosen by, and the columns of the table.
CRITERION = "centred_cosine"
COLUMNS = {
    "centred_cosine": "centred cosine",
    "raw_cosine": "raw cosine",
    "neighbour_agreement": "neighbours",
    "cka": "CKA",
    "top1_agreement": "top-1",
    "in_mask": "inside mask",
    "constant_share": "constants",
}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One file below benchmarks/recipes."""

    name: str
    why: str
    teacher: str
    recipe: str
    pictures: int
    set: dict[str, Any] = dataclasses.field(default_factory=dict)
    sweep: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1)

    def settings(self) -> Iterator[dict[str, Any]]:
        """Every combination of the sweep's values, over what is set."""
        for values in itertools.product(*self.sweep.values()):
            yield {**self.set, **dict(zip(self.sweep, values, strict=True))}


def read_experiments(pattern: str) -> list[Experiment]:
    """The experiments whose name (such as `vit/published`) matches, in the order of their names."""
    found = []
    for file in sorted(EXPERIMENTS.rglob("*.yaml")):
        name = file.relative_to(EXPERIMENTS).with_suffix("").as_posix()
        if fnmatch.fnmatch(name, pattern):
            values = yaml.safe_load(file.read_text())
            found.append(Experiment(name, **{**values, "seeds": tuple(values.get("seeds", (0, 1)))}))
    return found


def whole_objects(shards: str, size: int, preprocess: Preprocess) -> Pictures:
    """All pictures of `shards`, each resized whole with the mask of the one object on it."""
    index, whole = find_pictures(shards), dataclasses.replace(preprocess.at(size), crop_pct=1.0)
    return read_pictures(index, whole, count=len(index), masks=True)


@torch.no_grad()
def outputs(model: nn.Module, pictures: Tensor) -> Tensor:
    """(N, D)."""
    return torch.cat([model(part) for part in pictures.split(32)])


def explained(model: nn.Module, objects: Pictures, target: Target) -> dict[str, float]:
    """Share of the positive contribution inside the mask, of the constants in the ledger, and its worst residual."""
    explanation = explain(model, objects.images, target, batch_size=16, check=False)
    inside = positive_shares(explanation.contributions[:, 0], objects.masks)
    inputs, constants = explanation.input_part.abs(), explanation.constant_part.abs()
    residual = explanation.residual.abs() / explanation.scores.abs().clamp_min(1)
    return {
        "in_mask": float(inside.mean()),
        "constant_share": float((constants / (inputs + constants)).mean()),
        "residual": float(residual.max()),
    }


class Bench:
    """The pictures, and what teachers say of them, read once a teacher and size."""

    def __init__(self, data: Path, out: Path) -> None:
        self.data, self.out = data, out
        self.teachers: dict[tuple[str, int], tuple[Tensor, Tensor, Pictures, Target, dict[str, float]]] = {}

    def teacher(self, name: str, size: int) -> tuple[Tensor, Tensor, Pictures, Target, dict[str, float]]:
        """Held-out pictures, the teacher's outputs on them, objects, what is asked of them, the teacher's answer."""
        if (name, size) not in self.teachers:
            teacher = load_teacher(f"bundled:{name}", image_size=size)
            mean, std = teacher.preprocess.mean, teacher.preprocess.std
            batches = held_out_batches(index_shards(expand(str(self.data / "val-*.tar"))), size=size, workers=0)
            held_out = to_model_input(torch.cat([batch.pictures for batch in batches]), mean, std)
            objects = whole_objects(str(self.data / "objects-*.tar"), size, teacher.preprocess)
            target = decide(outputs(teacher.model, objects.images), teacher.labels is not None).target()
            answer = explained(teacher.model, objects, target)
            self.teachers[name, size] = (held_out, outputs(teacher.model, held_out), objects, target, answer)
        return self.teachers[name, size]

    def run(self, experiment: Experiment, settings: dict[str, Any], seed: int) -> dict[str, Any]:
        """One run: converted, aligned, measured."""
        overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        recipe = scaled(load_recipe(experiment.recipe, [*overrides, f"seed={seed}"]), experiment.pictures)
        folder = self.out / experiment.name / f"seed-{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        config = find_method("bcos" if recipe.method == "any" else recipe.method).config_class()
        student = convert(load_teacher(f"bundled:{experiment.teacher}"), config)
        save(student, folder / "converted")
        held_out, theirs, objects, target, answer = self.teacher(experiment.teacher, recipe.image_size)
        started, cpu = time.monotonic(), time.process_time()
        train, val = (str(self.data / f"{part}-*.tar") for part in ("train", "val"))
        result = align(AlignConfig(folder / "converted", train, folder / "aligned", recipe, val, quiet=True))
        minutes, cpu_minutes = (time.monotonic() - started) / 60, (time.process_time() - cpu) / 60
        aligned = load(folder / "aligned").model
        row = {
            "experiment": experiment.name,
            "teacher": experiment.teacher,
            "settings": settings,
            "seed": seed,
            "image_size": recipe.image_size,
            "pictures": experiment.pictures,
            **fidelity(outputs(aligned, held_out), theirs, student.labels is not None),
            **explained(aligned, objects, target),
            "teacher_in_mask": answer["in_mask"],
            "mask_area": float(objects.masks.mean()),
            "curve": result["curve"],
            "minutes": round(minutes, 1),
            "cpu_minutes": round(cpu_minutes, 1),
            "machine": f"{platform.machine()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}",
        }
        shutil.rmtree(folder / "converted")
        shutil.rmtree(folder / "aligned.run" / "checkpoints", ignore_errors=True)
        return row


def read_results() -> list[dict[str, Any]]:
    """All runs so far."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []


def measured(experiment: Experiment, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs of one experiment at its present length; a changed experiment is another."""
    settings = list(experiment.settings())
    return [
        row
        for row in rows
        if row["experiment"] == experiment.name
        and row["pictures"] == experiment.pictures
        and row["settings"] in settings
    ]


def best(runs: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """The settings that did best with `seed`."""
    return max((run for run in runs if run["seed"] == seed), key=lambda run: run[CRITERION])["settings"]


def study(bench: Bench, experiment: Experiment) -> None:
    """Runs what is missing of one experiment."""
    first, *others = experiment.seeds
    for settings in experiment.settings():
        _once(bench, experiment, settings, first)
    winner = best(measured(experiment, read_results()), first)
    for seed in others:
        _once(bench, experiment, winner, seed)


def _once(bench: Bench, experiment: Experiment, settings: dict[str, Any], seed: int) -> None:
    known = measured(experiment, read_results())
    if any(row["settings"] == settings and row["seed"] == seed for row in known):
        return
    row = bench.run(experiment, settings, seed)
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    shown = ", ".join(f"{title} {row[key]:.3f}" for key, title in COLUMNS.items() if key in row)
    changed = {key: settings[key] for key in experiment.sweep}
    print(f"{experiment.name} {changed or ''} seed {seed}: {shown} ({row['minutes']} min)", flush=True)


def summary(experiment: Experiment, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Means over the seeds of the best settings, and the spread (largest minus smallest) of the criterion."""
    runs = measured(experiment, rows)
    if not any(run["seed"] == experiment.seeds[0] for run in runs):
        return None
    winner = best(runs, experiment.seeds[0])
    chosen = [run for run in runs if run["settings"] == winner]
    values = [run[CRITERION] for run in chosen]
    means = {key: statistics.fmean(run[key] for run in chosen) for key in COLUMNS if key in chosen[0]}
    return {**means, "spread": max(values) - min(values), "seeds": len(chosen), "settings": winner, "runs": runs}


def page(experiments: list[Experiment], rows: list[dict[str, Any]]) -> str:
    """docs/recipes.md: one table a teacher, size and length, best first."""
    intro, _, _ = PAGE.read_text().partition("<!-- tables -->") if PAGE.is_file() else ("# Recipes\n\n", "", "")
    parts = [intro + "<!-- tables -->\n<!-- Written by benchmarks/recipe_study.py; what is above may be edited. -->\n"]
    groups: dict[tuple[str, int, int], list[tuple[Experiment, dict[str, Any]]]] = {}
    for experiment in experiments:
        found = summary(experiment, rows)
        if found is not None:
            size = found["runs"][0]["image_size"]
            groups.setdefault((experiment.teacher, size, experiment.pictures), []).append((experiment, found))
    for (teacher, size, pictures), members in sorted(groups.items()):
        shown = {key: title for key, title in COLUMNS.items() if key in members[0][1]}
        one = members[0][1]["runs"][0]
        parts.append(
            f"\n## {teacher}, {size} px, {pictures:,} pictures seen\n\nThe teacher itself: inside mask "
            f"{one['teacher_in_mask']:.3f}; chance, the mask's area: {one['mask_area']:.3f}.\n\n"
            f"| experiment | asked | {' | '.join(shown.values())} | seeds (spread) |\n"
            f"| --- | --- |{' --- |' * (len(shown) + 1)}\n"
        )
        for experiment, found in sorted(members, key=lambda member: -member[1][CRITERION]):
            name = experiment.name.partition("/")[2]
            cells = " | ".join(f"{found[key]:.3f}" for key in shown)
            parts.append(
                f"| {name} | {experiment.why}{_swept(experiment, found)} | {cells} "
                f"| {found['seeds']} ({found['spread']:.3f}) |\n"
            )
    waiting = [experiment.name for experiment in experiments if summary(experiment, rows) is None]
    if waiting:
        parts.append(f"\nNot run yet: {', '.join(waiting)}.\n")
    return "".join(parts)


def _swept(experiment: Experiment, found: dict[str, Any]) -> str:
    """Every value of the sweep with what it gave, for the table."""
    if not experiment.sweep:
        return ""
    first = experiment.seeds[0]
    values = [
        f"{', '.join(str(run['settings'][key]) for key in experiment.sweep)}: {run[CRITERION]:.3f}"
        for run in found["runs"]
        if run["seed"] == first
    ]
    return f". {', '.join(experiment.sweep)} = {'; '.join(values)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="without it, only the page is written anew")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--only", default="*", help="names of experiments, such as 'vit/*'")
    options = parser.parse_args()
    if options.data is not None:
        bench = Bench(options.data, options.out)
        for experiment in read_experiments(options.only):
            study(bench, experiment)
    PAGE.write_text(page(read_experiments("*"), read_results()))
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
