"""All that is checked before a run, in one place: of the request, of recipe and models, of the pictures.

Asked is everything that would stop a run later; nothing was written yet.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator

import torch
from accelerate import Accelerator
from torch import nn

from ..convert import Student
from ..convert.blocks import blocks_of
from ..convert.checkpoint import written
from ..convert.layers import ReferenceSized, strength_spans
from ..convert.methods import find_method
from ..convert.output import output_kind
from ..convert.taps import first_tensor
from ..convert.trace import trace_forward
from ..core.errors import DataError, PlanError, RecipeError, near_miss
from ..core.files import check_free, paths_in
from ..core.pictures import fitted, noise_pictures
from ..core.torch_internals import AnyBatchNorm
from ..data.index import ShardIndex
from ..data.loader import check_batch
from ..data.stream import Stream
from ..data.workers import check_shared_memory
from .distributed import check_sharded
from .maps import check_maps
from .objectives import FITS, OBJECTIVES, observe
from .objectives.classes import Classes
from .recipe import Need, Phase, Recipe, list_recipes, load_recipe
from .run import AlignConfig
from .trackers import check_trackers
from .trust import check_trust

__all__ = [
    "NEEDS",
    "check_data",
    "check_floor",
    "check_processes",
    "check_recipe",
    "check_request",
    "choose_recipe",
]


def _has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, AnyBatchNorm) for module in model.modules())


def _has_layer_norm(model: nn.Module) -> bool:
    kinds = (kind.__name__ for module in model.modules() for kind in type(module).__mro__)
    return any(re.search("(layer|rms)_?norm", kind, re.IGNORECASE) for kind in kinds)


NEEDS: dict[Need, Callable[[nn.Module], bool]] = {
    "blocks": lambda model: bool(blocks_of(model)),
    "batch-norm": _has_batch_norm,
    "layer-norm": _has_layer_norm,
}


def choose_recipe(student: Student) -> str:
    """The name of the recipe for the family of `student`: the first of its method's that fits (`--recipe auto`).

    Raises RecipeError where none does.
    """
    names = find_method(student.method).recipes
    for name in names:
        recipe = load_recipe(name)
        with contextlib.suppress(RecipeError):
            if not [*_misfits(recipe, student)]:
                check_objectives(student, recipe)
                return name
    raise RecipeError(
        f"--recipe auto: none of {', '.join(names) or 'the recipes'} is made for {student.source.reference} "
        f"({type(student.model).__name__}, --method {student.method}). Name one, or give a YAML file."
    )


def check_request(config: AlignConfig) -> None:
    """Raises BcosifyError for what is wrong before accelerate starts: trackers, the output."""
    check_trackers(config.trackers)
    inputs = paths_in(config.run, config.data, config.val, config.init_from, config.weights)
    check_free(config.out, config.overwrite, written, inputs)


def check_processes(config: AlignConfig, accelerator: Accelerator) -> None:
    """Raises RecipeError for what any phase asks and weights in shards do not do."""
    check_sharded(accelerator, config.recipe)


def check_data(recipe: Recipe, student: Student, train: ShardIndex | Stream, val: ShardIndex, processes: int) -> None:
    """Raises BcosifyError for pictures that are too few for the batches, or to measure on."""
    check_batch(train, recipe.batch_size, processes)
    side = max((recipe.image_size, *recipe.image_sizes))
    check_shared_memory(recipe.workers, 3 * side * side * recipe.batch_size // processes)
    if len(val) < 2:
        raise DataError(f"--val: {len(val)} picture(s) measure nothing: no mean, no neighbours. Pass 2 or more.")
    check_floor(recipe, student)


def check_recipe(recipe: Recipe, student: Student, teacher: nn.Module) -> None:
    """Raises RecipeError where `recipe` is for other students, names no module of this one, or a size it cannot take.

    The student is run a few times on noise; nothing of it is left.
    """
    _check_family(recipe, student)
    _check_sizes(recipe, student, teacher)
    check_objectives(student, recipe)
    check_strengths(student, recipe)
    check_paths(recipe, student.model)
    check_trust(recipe)
    for phase in recipe.phases:
        {**OBJECTIVES, **FITS}[phase.objective](student.model, recipe, phase.settings)  # refuses what it cannot use
        _check_heard(phase.settings.get("taps", ()), recipe.image_size, teacher)
    check_maps(recipe, student.model, teacher)


def _check_heard(taps: tuple[str, ...], size: int, teacher: nn.Module) -> None:
    if not taps:
        return
    calls, _ = observe(teacher, fitted(noise_pictures(1, (size, size)), teacher), taps)
    if silent := [name for name in taps if name not in calls]:
        raise RecipeError(f"tap {silent[0]!r} is a module that the model never runs: there is nothing to compare.")


def check_strengths(student: Student, recipe: Recipe) -> None:
    """Raises RecipeError, with all that is wrong, for strengths that no layer has, and for what excludes each other."""
    found = strength_spans(student.model)
    sized = any(isinstance(module, ReferenceSized) for module in student.model.modules())
    wrong = []
    for number, phase in enumerate(recipe.phases):
        where = f"phases.{number}"
        for name in phase.ramps:
            if name not in phase.strengths:
                wrong.append(f"{where}.ramps: no strength {name}.{near_miss(name, phase.strengths)}")
        # A window where nothing has one is harmless: no BatchNorm is there to take it.
        for name in ("carry", "spread", "window"):
            value = getattr(phase, name)
            if (any(value) if isinstance(value, tuple) else value) and "carry" not in found:
                wrong.append(f"{where}.{name}: no layer of a {student.method} student carries biases so; take it out")
        if phase.reference_gains and not sized:
            wrong.append(f"{where}.reference_gains: no layer of a {student.method} student has a gain; take it out")
        if phase.reference_gains and phase.batch_statistics:
            wrong.append(f"{where}: reference_gains takes the place of batch_statistics; leave one of them out")
    if wrong:
        raise RecipeError(f"the recipe has {len(wrong)} fault(s):\n" + "\n".join(f"  {line}" for line in wrong))


def check_objectives(student: Student, recipe: Recipe) -> None:
    """Raises RecipeError for an objective that has nothing to teach a student of this method."""
    method = find_method(student.method)
    fitting = [names for swap, names in method.objectives.items() if swap in {s.swap for s in student.plan.swaps}]
    allowed = fitting[0] if fitting else tuple(OBJECTIVES)
    output = output_kind(student)
    for number, phase in enumerate(recipe.phases):
        known = OBJECTIVES.get(phase.objective)
        if known and isinstance(known.make, type) and issubclass(known.make, Classes) and not output.chooses:
            raise RecipeError(
                f"phases.{number}.objective {phase.objective}: {student.source.reference} decides on no classes (its "
                f"output: {output}). Use the objective pairwise, or end-to-end."
            )
        if phase.objective not in allowed:
            raise RecipeError(
                f"phases.{number}.objective {phase.objective}: a student of --method {method.name} "
                f"({type(student.model).__name__}) learns nothing from it. It takes: {', '.join(allowed)}; see the "
                f"recipes {method.name}/... that ship."
            )


def check_paths(recipe: Recipe, student: nn.Module) -> None:
    """Raises RecipeError for help that an objective or a model has no use for."""
    for number, phase in enumerate(recipe.phases):
        for fault in _path_faults(phase, student):
            raise RecipeError(f"phases.{number}.{fault}")


def _path_faults(phase: Phase, student: nn.Module) -> Iterator[str]:
    helped = {"blend": _names("whole"), "own_inputs": _names("fed")}
    for key, objectives in helped.items():
        share = getattr(phase, key)
        if any(share) and phase.objective not in objectives:
            yield f"{key}: the objective {phase.objective} has no use for it; it is for {', '.join(objectives)}"
    if any(phase.blend) and not blocks_of(student):
        yield (
            f"blend: {type(student).__name__} has no blocks whose outputs could be mixed with the teacher's. "
            "Take it out: blend=[0,0]"
        )


def _names(kind: str) -> tuple[str, ...]:
    """The objectives that say so of themselves."""
    return tuple(name for name, known in OBJECTIVES.items() if getattr(known.make, kind))


def check_floor(recipe: Recipe, student: Student) -> None:
    """Raises RecipeError where `keep` is no floor, or nothing says whether the student is above it."""
    if not recipe.keep:
        return
    if recipe.min_agreement:
        raise RecipeError("keep and min_agreement are two floors; take one of them out.")
    if patient := [number for number, phase in enumerate(recipe.phases) if phase.patience]:
        raise RecipeError(
            f"keep hands on the furthest student above the floor, phases.{patient[0]}.patience the one of the best "
            "cosine; take one of them out."
        )
    if recipe.phases[0].objective in FITS or not strength_spans(student.model):
        raise RecipeError(f"keep: a student of --method {student.method} has no strengths that could move slower.")
    picture = fitted(noise_pictures(1, (recipe.image_size, recipe.image_size)), student.model)
    with torch.no_grad():
        output = first_tensor(student.model(picture))
    if output.dim() != 2 or output.shape[1] < 2:
        raise RecipeError(
            f"keep: the output of {student.source.reference} is {tuple(output.shape)} for one picture; agreement is "
            "measured of classes or of a feature, (1, D). Leave keep out."
        )


def _check_family(recipe: Recipe, student: Student) -> None:
    reasons = list(_misfits(recipe, student))
    if not reasons:
        return
    others = {name: load_recipe(name) for name in list_recipes()}
    fitting = [name for name, other in others.items() if other.needs and not [*_misfits(other, student)]]
    advice = f"Use --recipe {' or '.join(fitting)}" if fitting else "No recipe that ships with bcosify is made for it"
    raise RecipeError(
        f"this recipe is not for {student.source.reference}: {', and '.join(reasons)}. {advice}; to run it all the "
        "same, take the condition out: --set method=any needs=[]"
    )


def _misfits(recipe: Recipe, student: Student) -> Iterator[str]:
    """Why the recipe is for other students."""
    if recipe.method not in ("any", student.method):
        yield f"it is for students made by --method {recipe.method}, this one was made by --method {student.method}"
    missing = [need for need in recipe.needs if not NEEDS[need](student.model)]
    if missing:
        yield f"it needs a model with {' and '.join(missing)}, which {type(student.model).__name__} has not"


def _check_sizes(recipe: Recipe, student: Student, teacher: nn.Module) -> None:
    models = (student.model, teacher)
    wanted = sorted({recipe.image_size, *recipe.image_sizes})
    refused = {size: why for size in wanted if (why := _refusal(size, models))}
    if not refused:
        return
    own = max(student.preprocess.size)
    near = sorted({own, *(_nearest(size, step) for size in refused for step in (14, 16, 32))} - set(refused))
    taken = [str(size) for size in near if not _refusal(size, models)]
    size, why = next(iter(refused.items()))
    key = "image_sizes" if size in recipe.image_sizes else "image_size"
    raise RecipeError(
        f"{key}: {student.source.reference} takes no pictures of {', '.join(map(str, refused))} pixels ({why}). "
        f"It takes, for instance, {' and '.join(taken) or 'none that was tried'}: --set {key}=..."
    )


def _refusal(size: int, models: Iterable[nn.Module]) -> str:
    """Why one of `models` does not run on pictures of `size`; empty where all do."""
    for model in models:
        try:
            trace_forward(model, (size, size))
        except PlanError as error:
            cause = str(error.__cause__ or error).strip().splitlines()
            return cause[0] if cause else type(error.__cause__).__name__
    return ""


def _nearest(size: int, step: int) -> int:
    return max(1, round(size / step)) * step
