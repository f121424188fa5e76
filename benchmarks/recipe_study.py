"""Which recipe is best, by measurement: experiments at equal pictures seen, on the two real bundled models.

    python benchmarks/recipe_study.py --data FOLDER [--only 'vit/*'] [--pictures N] [--halve] [--out runs/study]

FOLDER holds train-*.tar and val-*.tar (webdataset shards of JPEGs, no labels) and objects-*.tar (objects with exact
masks). Every YAML file below benchmarks/recipes is one experiment, named by its path (`vit/published`):

    why: what is asked
    teacher: dinov2_small            # a model of the `bundled:` scheme
    recipe: bcos/vit                 # what is changed: a recipe that ships, or a file of bases/
    pictures: 1600                   # the whole length, over all phases; several: [1200, 4800]
    set: {phases.0.calibrate: 0}     # changes to the recipe
    sweep: {phases.0.learning_rate: [1e-4, 3e-4, 1e-3]}   # each value with the first seed, the best with all
    seeds: [0, 1]
    keep_student: true               # the aligned folder of each seed's last run stays below --out

Of several lengths the first is run; `--pictures N` runs that length instead. `--halve` thins: of the experiments with
the same teacher and the same lengths, only the better half is run at each next length.

A run that is in the results already is not run again. Writes benchmarks/recipes/results.jsonl (one run a line, with the
columns of columns.py), docs/recipes.md and the picture of the trade-off in it.
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
from bcosify.align.recipe import load_recipe, scaled
from bcosify.align.trainer import AlignConfig, align
from bcosify.convert import convert, load, load_teacher, save
from bcosify.convert.methods import find_method
from columns import Reference, columns, map_columns, refer

HERE = Path(__file__).parent
EXPERIMENTS, RESULTS, PAGE = HERE / "recipes", HERE / "recipes" / "results.jsonl", HERE.parent / "docs" / "recipes.md"
PICTURE = PAGE.with_name("recipes-tradeoff.png")
# What the best value of a sweep is chosen by, and the columns of the table.
CRITERION, CONTRAST = "centred_cosine", "signed_share_contrast"
COLUMNS = {
    "centred_cosine": "centred cosine",
    "raw_cosine": "raw cosine",
    "neighbour_agreement": "neighbours",
    "cka": "CKA",
    "top1_agreement": "top-1",
    "top1_confident": "top-1, teacher sure",
    "in_mask_contrast": "class contrast",
    CONTRAST: "signed contrast",
    "pointing": "pointing",
    "other_pointing": "pointing, other class",
    "gridpg_windowed": "GridPG windowed",
    "gridpg_native": "GridPG native",
    "gridpg_native_pooled": "GridPG native, pooled",
    "in_mask": "inside mask",
    "carried_share": "carried",
    "constant_share": "constants",
}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One file below benchmarks/recipes. `pictures`: its lengths, shortest first."""

    name: str
    why: str
    teacher: str
    recipe: str
    pictures: tuple[int, ...]
    set: dict[str, Any] = dataclasses.field(default_factory=dict)
    sweep: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1)
    keep_student: bool = False

    def settings(self) -> Iterator[dict[str, Any]]:
        """Every combination of the sweep's values, over what is set."""
        for values in itertools.product(*self.sweep.values()):
            yield {**self.set, **dict(zip(self.sweep, values, strict=True))}


def base(recipe: str) -> str:
    """The recipe that is changed: one that ships by its name, or a file beside this one."""
    return str(HERE / recipe) if recipe.endswith(".yaml") else recipe


def read_experiments(pattern: str) -> list[Experiment]:
    """The experiments whose name (such as `vit/published`) matches, in the order of their names."""
    found = []
    for file in sorted(EXPERIMENTS.rglob("*.yaml")):
        name = file.relative_to(EXPERIMENTS).with_suffix("").as_posix()
        if fnmatch.fnmatch(name, pattern):
            values = yaml.safe_load(file.read_text())
            lengths = values["pictures"] if isinstance(values["pictures"], list) else [values["pictures"]]
            values |= {"pictures": tuple(sorted(lengths)), "seeds": tuple(values.get("seeds", (0, 1)))}
            found.append(Experiment(name, **values))
    return found


# ----------------------------------------------------------------------------------------------------------- the runs


class Bench:
    """The pictures, and what teachers say of them, read once a teacher and size."""

    def __init__(self, data: Path, out: Path) -> None:
        self.data, self.out = data, out
        self.references: dict[tuple[str, int], Reference] = {}
        self.answers: dict[tuple[str, int], dict[str, Any]] = {}

    def reference(self, name: str, size: int) -> Reference:
        """What students of this teacher are measured against."""
        if (name, size) not in self.references:
            self.references[name, size] = refer(name, size, self.data)
        return self.references[name, size]

    def answer(self, name: str, size: int) -> dict[str, Any]:
        """The columns of the teacher's own maps."""
        if (name, size) not in self.answers:
            reference = self.reference(name, size)
            self.answers[name, size] = map_columns(reference.teacher, reference)
        return self.answers[name, size]

    def run(self, experiment: Experiment, settings: dict[str, Any], seed: int, pictures: int) -> dict[str, Any]:
        """One run: converted, aligned, measured."""
        overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        recipe = scaled(load_recipe(base(experiment.recipe), [*overrides, f"seed={seed}"]), pictures)
        folder = self.out / experiment.name / f"{pictures}" / f"seed-{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        config = find_method("bcos" if recipe.method == "any" else recipe.method).config_class()
        save(convert(load_teacher(f"bundled:{experiment.teacher}"), config), folder / "converted")
        reference = self.reference(experiment.teacher, recipe.image_size)
        started, cpu = time.monotonic(), time.process_time()
        train, val = (str(self.data / f"{part}-*.tar") for part in ("train", "val"))
        result = align(AlignConfig(folder / "converted", train, folder / "aligned", recipe, val, quiet=True))
        minutes, cpu_minutes = (time.monotonic() - started) / 60, (time.process_time() - cpu) / 60
        row = {
            "experiment": experiment.name,
            "teacher": experiment.teacher,
            "settings": settings,
            "seed": seed,
            "image_size": recipe.image_size,
            "pictures": pictures,
            **columns(load(folder / "aligned").model, reference),
            **{f"teacher_{name}": value for name, value in self.answer(experiment.teacher, recipe.image_size).items()},
            "curve": result["curve"],
            "minutes": round(minutes, 1),
            "cpu_minutes": round(cpu_minutes, 1),
            "machine": f"{platform.machine()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}",
        }
        shutil.rmtree(folder / "converted")
        shutil.rmtree(folder / "aligned.run" / "checkpoints", ignore_errors=True)
        if not experiment.keep_student:
            shutil.rmtree(folder / "aligned")
        return row


def read_results() -> list[dict[str, Any]]:
    """All runs so far."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []


def measured(experiment: Experiment, pictures: int, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs of one experiment at one length; a changed experiment is another."""
    settings = list(experiment.settings())
    return [
        row
        for row in rows
        if row["experiment"] == experiment.name and row["pictures"] == pictures and row["settings"] in settings
    ]


def best(runs: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """The settings that did best with `seed`."""
    return max((run for run in runs if run["seed"] == seed), key=lambda run: run[CRITERION])["settings"]


def study(bench: Bench, experiment: Experiment, pictures: int) -> None:
    """Runs what is missing of one experiment at one length."""
    first, *others = experiment.seeds
    for settings in experiment.settings():
        _once(bench, experiment, settings, first, pictures)
    winner = best(measured(experiment, pictures, read_results()), first)
    for seed in others:
        _once(bench, experiment, winner, seed, pictures)


def _once(bench: Bench, experiment: Experiment, settings: dict[str, Any], seed: int, pictures: int) -> None:
    known = measured(experiment, pictures, read_results())
    if any(row["settings"] == settings and row["seed"] == seed for row in known):
        return
    row = bench.run(experiment, settings, seed, pictures)
    with RESULTS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    shown = ", ".join(f"{title} {row[key]:.3f}" for key, title in COLUMNS.items() if key in row)
    changed = {key: settings[key] for key in experiment.sweep}
    print(f"{experiment.name} {changed or ''} {pictures} seed {seed}: {shown} ({row['minutes']} min)", flush=True)


def summary(experiment: Experiment, pictures: int, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Means over the seeds of the best settings, and the spread (largest minus smallest) of the criterion."""
    runs = measured(experiment, pictures, rows)
    if not any(run["seed"] == experiment.seeds[0] for run in runs):
        return None
    winner = best(runs, experiment.seeds[0])
    chosen = [run for run in runs if run["settings"] == winner]
    values = [run[CRITERION] for run in chosen]
    numbers = [key for key, value in chosen[0].items() if isinstance(value, float)]
    means = {key: statistics.fmean(run[key] for run in chosen) for key in numbers if all(key in run for run in chosen)}
    return {**means, "spread": max(values) - min(values), "seeds": len(chosen), "settings": winner, "runs": runs}


# ---------------------------------------------------------------------------------------------------------- halving


def decisions_kept(found: dict[str, Any]) -> float:
    """How far a student decides like its teacher: top-1 agreement, or centred cosine where there are no classes."""
    return found.get("top1_agreement", found[CRITERION])


def better_half(group: list[Experiment], pictures: int, rows: list[dict[str, Any]]) -> list[Experiment]:
    """The half (rounded up) of `group` that did best at this length, each counted at the better of its two places: by
    decisions kept and by class contrast. Those that were not run or not measured so are left out."""
    found = {e.name: summary(e, pictures, rows) for e in group}
    ranked = {name: one for name, one in found.items() if one is not None and CONTRAST in one}
    places = [
        {name: place for place, name in enumerate(sorted(ranked, key=lambda name: -value(ranked[name])))}
        for value in (decisions_kept, lambda one: one[CONTRAST])
    ]
    order = sorted(ranked, key=lambda name: (min(p[name] for p in places), sum(p[name] for p in places)))
    chosen = order[: -(-len(order) // 2)]
    return [experiment for experiment in group if experiment.name in chosen]


def chosen(experiments: list[Experiment], halve: bool, pictures: int | None) -> Iterator[tuple[Experiment, int]]:
    """What is to be run, in order. Asked one by one, so that a length sees the results of the one before it."""
    groups: dict[tuple[str, tuple[int, ...]], list[Experiment]] = {}
    for experiment in experiments:
        groups.setdefault((experiment.teacher, experiment.pictures), []).append(experiment)
    for (_, lengths), group in groups.items():
        for place, length in enumerate(lengths):
            if place and halve:
                before, group = group, better_half(group, lengths[place - 1], read_results())
                print(f"{length} pictures: {len(group)} of {len(before)}: {', '.join(e.name for e in group)}")
            if length == pictures or (pictures is None and (halve or not place)):
                yield from ((experiment, length) for experiment in group)


# --------------------------------------------------------------------------------------------------------- the page


def page(experiments: list[Experiment], rows: list[dict[str, Any]]) -> str:
    """docs/recipes.md: one table a teacher, size and length, best first."""
    intro, _, _ = PAGE.read_text().partition("<!-- tables -->") if PAGE.is_file() else ("# Recipes\n\n", "", "")
    parts = [intro + "<!-- tables -->\n<!-- Written by benchmarks/recipe_study.py; what is above may be edited. -->\n"]
    if PICTURE.is_file():
        parts.append(f"\n![decisions kept against class contrast, a point for each arm and length]({PICTURE.name})\n")
    for (teacher, size, pictures), members in sorted(summaries(experiments, rows).items()):
        shown = {key: title for key, title in COLUMNS.items() if any(key in found for _, found in members)}
        of_teacher: dict[str, Any] = {}
        for run in (run for _, found in members for run in found["runs"]):
            of_teacher |= {key.removeprefix("teacher_"): run[key] for key in run if key.startswith("teacher_")}
        itself = ", ".join(f"{title} {_cell(of_teacher, key)}" for key, title in shown.items() if key in of_teacher)
        parts.append(
            f"\n## {teacher}, {size} px, {pictures:,} pictures seen\n\nThe teacher itself: {itself}; chance inside the "
            f"mask is its area: {members[0][1]['mask_area']:.3f}.\n\n"
            f"| experiment | asked | {' | '.join(shown.values())} | seeds (spread) |\n"
            f"| --- | --- |{' --- |' * (len(shown) + 1)}\n"
        )
        for experiment, found in sorted(members, key=lambda member: -member[1][CRITERION]):
            name = experiment.name.partition("/")[2]
            cells = " | ".join(_cell(found, key) for key in shown)
            parts.append(
                f"| {name} | {experiment.why}{_swept(experiment, found)} | {cells} "
                f"| {found['seeds']} ({found['spread']:.3f}) |\n"
            )
    waiting = [e.name for e in experiments if all(summary(e, length, rows) is None for length in e.pictures)]
    if waiting:
        parts.append(f"\nNot run yet: {', '.join(waiting)}.\n")
    return "".join(parts)


Summaries = dict[tuple[str, int, int], list[tuple[Experiment, dict[str, Any]]]]


def summaries(experiments: list[Experiment], rows: list[dict[str, Any]]) -> Summaries:
    """Teacher, size and length -> the experiments that were run so, each with its summary."""
    groups: Summaries = {}
    for experiment, pictures in ((e, length) for e in experiments for length in e.pictures):
        found = summary(experiment, pictures, rows)
        if found is not None:
            size = found["runs"][0]["image_size"]
            groups.setdefault((experiment.teacher, size, pictures), []).append((experiment, found))
    return groups


def _cell(found: dict[str, Any], key: str) -> str:
    """A value, with half of its interval where it has one; empty where it was not measured."""
    if key not in found:
        return ""
    if f"{key}_low" not in found:
        return f"{found[key]:.3f}"
    return f"{found[key]:+.3f} ± {(found[f'{key}_high'] - found[f'{key}_low']) / 2:.3f}"


def draw(groups: Summaries, path: Path) -> bool:
    """The trade-off, a panel for each teacher and size: decisions kept against class contrast, a point for each arm and
    length. Returns whether there was anything to draw."""
    panels: dict[tuple[str, int], list[tuple[int, str, dict[str, Any]]]] = {}
    for (teacher, size, pictures), members in sorted(groups.items()):
        measured_so = [(pictures, e.name.partition("/")[2], found) for e, found in members if CONTRAST in found]
        if measured_so:
            panels.setdefault((teacher, size), []).extend(measured_so)
    if not panels:
        return False
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(8 * len(panels), 6), layout="constrained", squeeze=False)
    for axis, ((teacher, size), points) in zip(axes[0], panels.items(), strict=True):
        for number, length in enumerate(sorted({pictures for pictures, _, _ in points})):
            label = f"{length:,} pictures seen"
            for _, name, found in (point for point in points if point[0] == length):
                x, y = decisions_kept(found), found[CONTRAST]
                reach = [[y - found[f"{CONTRAST}_low"]], [found[f"{CONTRAST}_high"] - y]]
                axis.errorbar(x, y, reach, fmt="o", color=f"C{number}", elinewidth=0.5, alpha=0.8, label=label)
                axis.annotate(name, (x, y), (4, 4), textcoords="offset points", fontsize=7)
                label = ""
        of_teacher = points[-1][2]["runs"][-1][f"teacher_{CONTRAST}"]
        axis.plot(1, of_teacher, "k*", markersize=12, label="the teacher itself")
        axis.axhline(0, color="grey", linewidth=0.8)
        kept = "top-1 agreement" if "top1_agreement" in points[0][2] else "centred cosine"
        axis.set_xlabel(f"decisions kept: {kept} with the teacher, held-out pictures")
        axis.set_ylabel("signed contrast in the mask, decision minus another")
        axis.set_title(f"{teacher}, {size} px")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
    return True


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
    parser.add_argument("--pictures", type=int, help="this length alone, of the experiments that list it")
    parser.add_argument("--halve", action="store_true", help="go on at each next length with the better half")
    options = parser.parse_args()
    if options.data is not None:
        bench = Bench(options.data, options.out)
        for experiment, pictures in chosen(read_experiments(options.only), options.halve, options.pictures):
            study(bench, experiment, pictures)
    everything, rows = read_experiments("*"), read_results()
    drawn = draw(summaries(everything, rows), PICTURE)
    PAGE.write_text(page(everything, rows))
    print(f"wrote {PAGE}{f' and {PICTURE}' if drawn else ', no picture: no run has a class contrast yet'}")


if __name__ == "__main__":
    main()
