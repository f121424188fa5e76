"""Recipes: what an alignment run does, complete, in one YAML file.

A recipe is a list of phases. Each names its objective, its length in pictures, its learning rate, and how B and beta
move. Wrong keys are all reported at once, one line each, with the nearest right one; the resolved recipe is written
beside the run, and that file alone starts the same run again.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.resources
import itertools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from ..core.errors import RecipeError, first_line, near_miss, translated
from ..core.files import read_text
from ..core.ranges import (
    AMOUNT,
    ANY_COUNT,
    ASCENDING,
    BELOW_ONE,
    COUNT,
    EXPONENT,
    MANY,
    PART,
    SEED,
    SHARE,
    SIDE,
    WINDOW,
    Length,
    Range,
)
from ..core.settings import faults, parse, read_yaml

__all__ = [
    "Need",
    "Phase",
    "Recipe",
    "difference",
    "dump",
    "known_values",
    "list_recipes",
    "load_recipe",
    "saved_recipe",
    "scaled",
]


LIMIT = 2**20  # bytes of a recipe
Need = Literal["blocks", "batch-norm", "layer-norm"]
# Settings of objectives that older recipes have beside their phases.
MOVED = (
    "taps",
    "depths",
    "centre",
    "standardise",
    "output_weight",
    "magnitude_weight",
    "weight_norm",
    "map_weight",
    "map_share",
    "anchor",
)

Share = Annotated[float, SHARE]
Amount = Annotated[float, AMOUNT]
Count = Annotated[int, COUNT]
AnyCount = Annotated[int, ANY_COUNT]
Exponent = Annotated[float, EXPONENT]
Side = Annotated[int, SIDE]
# The strengths that a phase moves.
STRENGTHS = ("b", "beta", "dampening", "carry", "spread")


@dataclasses.dataclass(frozen=True)
class Phase:
    """One stretch of a run.

    Attributes:
        objective: which (see `objectives`). In YAML, with settings of its own:  objective: {end-to-end: {centre: true}}
        settings: these; those that are not among them are at their defaults.
        pictures: how many pictures it sees.
        learning_rate: peak. Fresh optimizer state in every phase, as objectives differ in scale.
        optimizer: `adamw`, or `muon` (orthogonal steps for matrices and kernels, AdamW for the rest; timm's).
        relative: the learning rate counts in units of each parameter's root mean square at the start of the phase, so
            that a step turns every weight by the same angle. B-cos layers respond to angles, and calibration leaves
            weights of very different sizes.
        b, beta, dampening, carry, spread: [start, end]; they move in a straight line over the first `ramp` share of the
            phase, in the layers that have them. carry: the share of the biases that counts in proportion to the layer's
            own input, spread: how much of that proportion is that of the whole map (see `layers.batch_norm`).
        ramps: strength -> [from, to], shares of the phase, where one moves at another time than `ramp` says.
        window: where the proportion of carried biases is taken: 0 for the whole map, below 1 a share of its side, or an
            odd number of places.
        reference_gains: every converted layer keeps, per channel, the size that the teacher's layer has on the same
            pictures (see `layers.reference`), in the place of batch statistics and calibrated gains. reference_decay:
            what is left after a step of the mean over batches that the gains come from, in [0, 1); 0 takes each batch's
            own, which tells the student about the pictures that it sees.
        calibrate: gains are estimated from this many pictures before the first step; 0 leaves the weights.
        recalibrate_every: again every so many steps while B and beta move; 0 never.
        gain: `least-squares` or `rms`.
        batch_statistics: the student's BatchNorms use each batch's statistics while they train, and a mean over many
            batches when they are measured and saved; else they keep the source's.
        warmup: share of the phase with rising learning rate. decay: share with falling learning rate, half a cosine
            down to `final_learning_rate` (a share of the peak); the peak holds in between.
        clip: largest norm of the gradient. adaptive_clip: largest norm of each unit's gradient as a share of its
            weight's norm (Brock et al. 2021); 0 does not clip.
        trust: in the warm-up, every four steps after which the training loss is more than this share above what the
            start of the phase would have on the same pictures are taken back, and the warm-up begins anew, to half the
            rate for the rest of the phase; 0 never.
            The student runs once more a step of the warm-up, and one step in four waits for the device (see `trust`).
        blend: [start, end] over the same `ramp`: share, in [0, 1], of the teacher's block in the output of each of the
            student's blocks, both on the student's input, while it is trained as a whole; it is measured and saved
            without. A block costs the teacher's block once more while the share is above 0.
        own_inputs: [start, end] over the same `ramp`: share, in [0, 1], of the places of each unit's input that are the
            student's own and not the teacher's, in block-local and layer-local phases; drawn anew at each step. The
            student runs once more a step, without a gradient, while the share is above 0.
        patience: the phase ends when so many evaluations in a row, each with B and beta at their ends, bring no better
            centred cosine on the held-out pictures than the best one; 0 never. It then hands on the weights of the best
            one, also where it ran to its end.
    """

    objective: str
    pictures: Count
    learning_rate: Amount
    optimizer: Literal["adamw", "muon"] = "adamw"
    b: tuple[Exponent, Exponent] = (2.0, 2.0)
    beta: tuple[Share, Share] = (0.0, 0.0)
    dampening: tuple[Amount, Amount] = (0.0, 0.0)
    carry: tuple[Share, Share] = (0.0, 0.0)
    spread: tuple[Share, Share] = (0.0, 0.0)
    window: Annotated[float, WINDOW] = 0.0
    ramp: Share = 0.6
    ramps: dict[str, Annotated[tuple[Share, Share], ASCENDING]] = dataclasses.field(default_factory=dict)
    reference_gains: bool = False
    reference_decay: Annotated[float, BELOW_ONE] = 0.95
    relative: bool = True
    calibrate: AnyCount = 0
    recalibrate_every: AnyCount = 0
    gain: Literal["least-squares", "rms"] = "least-squares"
    batch_statistics: bool = False
    warmup: Share = 0.05
    decay: Share = 1.0
    final_learning_rate: Share = 0.05
    clip: Annotated[float, Range(0, above=True, infinite=True)] = 5.0
    adaptive_clip: Amount = 0.0
    patience: AnyCount = 0
    trust: Amount = 0.0
    blend: tuple[Share, Share] = (0.0, 0.0)
    own_inputs: tuple[Share, Share] = (0.0, 0.0)
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def helped(self) -> bool:
        """Whether the teacher's help changes inside the phase."""
        return any(start != end for start, end in (self.blend, self.own_inputs))

    @property
    def moving(self) -> bool:
        """Whether a strength changes inside the phase."""
        return any(start != end for start, end in self.strengths.values())

    @property
    def strengths(self) -> dict[str, tuple[float, float]]:
        """Strength -> (start, end)."""
        return {name: getattr(self, name) for name in STRENGTHS}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A whole run.

    Attributes:
        pressure: what makes the student differ from its teacher, in words: without one, an exact start has nothing to
            learn.
        image_size: side of the training views in pixels, and of all that is measured.
        image_sizes: every step draws the side of its views from these instead, alike in all processes.
        method: conversion method that the recipe is for; `any` fits all.
        needs: what a student must have for the recipe to make sense, of `checks.NEEDS`.
        batch_size: pictures a step, over all processes.
        accumulate: each process takes its share of a batch in so many parts, for less memory; the gradient is the same,
            but for BatchNorm's batch statistics.
        compile: torch.compile for the blocks of teacher and student, for speed; the first steps take long.
        gradient_checkpointing: the student's blocks are run again in the backward pass, for less memory.
        min_agreement: agreement guard: where held-out agreement (top-1, or the centred cosine where there are no
            classes) falls below, the phase ends with the weights of the last measurement above, and the run with it;
            0 guards nothing.
        keep: a floor for held-out agreement (as above), instead of a schedule: strengths move along their path only as
            fast as the student stays above it, in one phase, and the furthest student above it is handed on (see
            `floor`); 0 follows the schedule.
        average: decay of the exponential moving average of the weights that is measured and saved; 0 takes the last.
        crop_scale: smallest and largest share of a picture's area in a view. flip: chance of a mirror image.
        turn: largest angle, in degrees of 0 to 180, that a view is turned by, either way; the corners are grey. 0 turns
            none.
        colour: how strongly brightness, contrast, saturation and hue of a view are changed, 0 to 1; 1 is SimCLR's
            strength (Chen et al. 2020).
        mixup, cutmix: chance that all pictures of a batch are mixed with their neighbours in it, either faded into one
            another (mixup, Zhang et al. 2018) or with a box cut out of the neighbour (CutMix, Yun et al. 2019). One
            share for a batch, each from 0 to 1 alike often. Together at most 1. Teacher and student see the same
            mixture, so no label is needed. Pictures for gains and statistics are never mixed.
        held_out: pictures kept back for the fidelity curve where no --val is given.
        evaluate_every, checkpoint_every: in pictures seen. log_every: in steps.
        probe_pictures: so many held-out pictures are explained before the first step, every `probe_every` pictures and
            at the end of every phase, on one sheet in `<out>.run/explanations`; 0 for none.
        precision: `auto` is bf16 where the device has it, else float32.
        max_bad: largest share of broken pictures before the run stops.
    """

    pressure: str
    image_size: Side
    batch_size: Count
    phases: Annotated[tuple[Phase, ...], Length(1, 100, "phases")]
    image_sizes: Annotated[tuple[Side, ...], Length(0, 100, "sides")] = ()
    method: str = "any"
    needs: tuple[Need, ...] = ()
    accumulate: Count = 1
    gradient_checkpointing: bool = False
    compile: bool = False
    seed: Annotated[int, SEED] = 0
    weight_decay: Amount = 0.0
    betas: tuple[Annotated[float, BELOW_ONE], Annotated[float, BELOW_ONE]] = (0.9, 0.999)
    min_agreement: Share = 0.0
    keep: Share = 0.0
    average: Annotated[float, BELOW_ONE] = 0.0
    crop_scale: Annotated[tuple[Annotated[float, PART], Annotated[float, PART]], ASCENDING] = (0.35, 1.0)
    flip: Share = 0.5
    turn: Annotated[float, Range(0, 180)] = 0.0
    colour: Share = 0.0
    mixup: Share = 0.0
    cutmix: Share = 0.0
    held_out: Annotated[int, Range(2, MANY, whole=True)] = 128
    evaluate_every: AnyCount = 1600
    checkpoint_every: AnyCount = 1600
    log_every: Count = 10
    probe_pictures: AnyCount = 0
    probe_every: AnyCount = 1600
    precision: Literal["auto", "no", "bf16"] = "auto"
    workers: Annotated[int, Range(0, 1024, whole=True)] = 2
    max_bad: Share = 0.01

    def __post_init__(self) -> None:
        if wrong := list(faults(Recipe, self)) or list(_joint_faults(self)):
            raise RecipeError(_listed("the recipe", wrong))

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps of every phase."""
        return tuple(max(1, phase.pictures // self.batch_size) for phase in self.phases)


def list_recipes() -> list[str]:
    """Names of the recipes that ship with bcosify, such as `bcos/vit`."""
    return sorted(_shipped())


def load_recipe(name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that ships as `name`, or the file at this path, with `overrides` such as `phases.0.pictures=800`.

    Settings of an objective that stand beside the phases, as older recipes have them, are read, with a warning that
    says where they belong.

    Raises:
        RecipeError: no such recipe, not YAML, unknown, missing or wrong keys (all of them, a line each).
    """
    from .objectives import moved_settings

    values, moved = moved_settings(_read(str(name), _text(name)))
    for override in overrides:
        key, value = _assignment(override)
        if key in MOVED and isinstance(values, dict):
            values, found = moved_settings({**values, key: value}, over=True)
            moved |= found
        else:
            values = _override(values, key.split("."), value, override)
    recipe = from_values(values, str(name))
    if moved:
        warnings.warn(f"recipe {name}: {_moved_words(recipe, moved)}", stacklevel=2)
    return recipe


def _moved_words(recipe: Recipe, moved: Mapping[str, Sequence[int]]) -> str:
    """Where settings that were beside the phases belong, in one line."""
    written = yaml.safe_load(dump(recipe))["phases"]
    taken = {number: written[number]["objective"] for numbers in moved.values() for number in numbers}
    flow = functools.partial(yaml.safe_dump, default_flow_style=True, width=math.inf)
    forms = "; ".join(f"phases.{n}: {flow({'objective': form}).strip()[1:-1]}" for n, form in sorted(taken.items()))
    unused = [key for key, numbers in moved.items() if not numbers]
    belong = f"{', '.join(moved)}: settings of an objective, which belong into its phase. "
    return belong + (f"Write {forms}" if forms else "") + (f" (no phase takes {', '.join(unused)})" if unused else "")


def saved_recipe(path: Path) -> Recipe:
    """The recipe that a run wrote beside itself, of whatever version, without a word about its form."""
    return from_values(_read(str(path), _text(path)), str(path))


def from_values(values: Any, name: str = "recipe") -> Recipe:
    """Parses plain values (from YAML or JSON) strictly into a Recipe, objectives' settings in their phases."""
    from .objectives import moved_settings, with_settings  # loads the models' side, which a list of recipes need not

    values, wrong = with_settings(moved_settings(values)[0])
    if found := [*faults(Recipe, values), *wrong]:
        raise RecipeError(_listed(f"recipe {name}", found))
    recipe = parse(Recipe, values)
    assert isinstance(recipe, Recipe)
    return recipe


def _listed(what: str, wrong: Sequence[str]) -> str:
    return f"{what} has {len(wrong)} fault(s):\n" + "\n".join(f"  {fault}" for fault in wrong)


def _joint_faults(recipe: Recipe) -> Iterator[str]:
    """What is wrong with values that are right by themselves."""
    mixed = recipe.mixup + recipe.cutmix
    if mixed > 1:
        yield f"mixup, cutmix: a batch is mixed in one way, so their chances may add up to 1; got {mixed:g}"
    if mixed > 0 and recipe.batch_size < 2:
        yield f"mixup, cutmix: a batch of {recipe.batch_size} has no two pictures to mix; set batch_size to 2 or more"


def known_values(path: Path) -> dict[str, Any]:
    """The values in a recipe's file, of which some may be missing: an older version's has fewer keys.

    Raises RecipeError for keys that a recipe does not have, and values of another kind.
    """
    from .objectives import moved_settings, with_settings

    found = _read(str(path), read_text(path, RecipeError, LIMIT))
    values, wrong = with_settings(moved_settings(found)[0])
    if faulty := [*(fault for fault in faults(Recipe, values) if not fault.startswith("missing key")), *wrong]:
        raise RecipeError(_listed(f"recipe {path}", faulty))
    return found


def dump(recipe: Recipe) -> str:
    """YAML that `load_recipe` reads back to an equal recipe."""
    from .objectives import changed

    values = _plain(dataclasses.asdict(recipe))
    for phase in values["phases"]:
        if own := changed(phase["objective"], phase.pop("settings")):
            phase["objective"] = {phase["objective"]: own}
    return yaml.safe_dump(values, sort_keys=False, width=120)


# What a resumed run may have otherwise: how it is computed, not what.
MAY_CHANGE = ("workers", "max_bad", "accumulate", "gradient_checkpointing")


def difference(old: Recipe, new: Recipe) -> str:
    """Unified diff of two recipes, empty where they are of the same run (`MAY_CHANGE` aside)."""
    old = dataclasses.replace(old, **{name: getattr(new, name) for name in MAY_CHANGE})
    return "\n".join(
        difflib.unified_diff(dump(old).splitlines(), dump(new).splitlines(), "run", "asked", lineterm="", n=0)
    )


def scaled(recipe: Recipe, pictures: int) -> Recipe:
    """The same recipe with all phases stretched so that together they see `pictures`."""
    total = sum(phase.pictures for phase in recipe.phases)
    phases = (dataclasses.replace(p, pictures=max(1, round(p.pictures * pictures / total))) for p in recipe.phases)
    return dataclasses.replace(recipe, phases=tuple(phases))


def _shipped() -> dict[str, Any]:
    root = importlib.resources.files("bcosify.recipes")
    found: dict[str, Any] = {}

    def collect(folder: Any, prefix: str) -> None:
        for entry in folder.iterdir():
            if entry.is_dir() and entry.name not in ("__pycache__", "accelerate"):
                collect(entry, f"{prefix}{entry.name}/")
            elif entry.name.endswith(".yaml"):
                found[prefix + entry.name.removesuffix(".yaml")] = entry

    collect(root, "")
    return found


def _text(name: str | Path) -> str:
    shipped, path = _shipped(), Path(name)
    if str(name) in shipped:
        return shipped[str(name)].read_text("utf-8")
    with translated((OSError, ValueError), RecipeError, lambda error: f"recipe {name}: {first_line(error)}."):
        if path.is_file():
            return path.read_text("utf-8")  # a file that is no text is a ValueError too
    raise RecipeError(
        f"no recipe {str(name)!r}.{near_miss(str(name), shipped)} Give a path, or one of: {', '.join(sorted(shipped))}."
    )


def _read(name: str, text: str) -> Any:
    with translated(yaml.YAMLError, RecipeError, lambda error: f"recipe {name} is not YAML: {error}"):
        return read_yaml(text)


def _assignment(override: str) -> tuple[str, Any]:
    key, separator, text = override.partition("=")
    if not separator:
        raise RecipeError(f"--set {override}: write it as key=value, such as phases.0.pictures=800")
    with translated(yaml.YAMLError, RecipeError, lambda error: f"--set {override}: the value is not YAML: {error}"):
        return key, read_yaml(text)


def _override(values: Any, path: Sequence[str], value: Any, override: str) -> Any:
    """`values` with `value` at `path`; an objective that has no settings yet gets some."""
    place: Any = values
    try:
        for key, following in itertools.pairwise(path):
            step: Any = int(key) if isinstance(place, list) else key
            if key == "objective" and place[step] == following:
                place[step] = {following: {}}
            place = place[step]
        place[int(path[-1]) if isinstance(place, list) else path[-1]] = value
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise RecipeError(f"--set {override}: the recipe has no place {'.'.join(path)!r}") from error
    return values


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
