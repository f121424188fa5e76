"""An alignment: a frozen teacher, a student, unlabelled pictures, phases that descend (`descend`) or solve (`fit`).

One process or many (`accelerate launch`): every process makes its own slice of each global batch, and only the
objective around the student is prepared by accelerate (preparing the data too would split it twice). Both models stay
in eval mode, as they are compared as functions: no dropout, and batch statistics only where a phase asks for them.
"""

from __future__ import annotations

import dataclasses
import uuid
import warnings
from typing import Any

from accelerate.utils import ProjectConfiguration

from ..convert import load, save, teacher_of
from ..convert.history import Alignment
from ..convert.memory import laid_out, memory_format_of
from ..core.files import check_free
from ..core.versions import versions
from ..data.bad import BadSamples
from ..data.loader import check_batch
from . import state
from .checks import check_floor, check_recipe
from .descend import descend
from .distributed import check_sharded, described, make_accelerator
from .fit import fit
from .floor import floored
from .learner import Learner
from .log import strengths, write_row
from .measure import evaluated, explained
from .objectives import FITS
from .pictures import Pictures
from .prepare import checkpoint_gradients, find_data, prepare_folder, start_from
from .prototype_sheet import write_prototypes
from .run import AlignConfig, AlignRun, Outcome
from .stopping import agreement_of, signals_noted
from .trackers import TRACKED, check_trackers, start_trackers

__all__ = ["AlignConfig", "align"]


def align(config: AlignConfig) -> dict[str, Any]:
    """Aligns the student in `config.run` to its teacher and saves it to `config.out`.

    Returns:
        `out`, `pictures` (seen), `curve` (held-out fidelity over pictures seen), its `start` and `final`,
        `bad_pictures`, `seconds`, whether the run was `stopped` (by a signal) or `guarded` (by `min_agreement`), and
        with a floor (`keep`) the strengths that were `kept`.

    Raises:
        RecipeError, DataError, CheckpointError, SourceError: before the first step.
        DataError: too many pictures are broken. BcosifyError: the loss is no number any more.
    """
    recipe = floored(config.recipe)
    config = dataclasses.replace(config, recipe=recipe)
    check_trackers(config.trackers)
    accelerator = make_accelerator(
        recipe.precision,
        log_with=list(config.trackers) or None,
        project_config=ProjectConfiguration(str(config.work), str(config.work / TRACKED)),
    )
    check_sharded(accelerator, recipe)
    check_free(config.out, config.overwrite)
    student = load(config.run)
    teacher = teacher_of(student, config.weights, any(phase.reference_gains for phase in recipe.phases))
    start_from(student, config.init_from)
    check_recipe(recipe, student, teacher)
    if recipe.gradient_checkpointing:
        checkpoint_gradients(student.model, student.source.library)
    train, val = find_data(config)
    check_batch(train, recipe.batch_size, accelerator.num_processes)
    check_floor(recipe, student, len(val))
    resumed = prepare_folder(config, accelerator, train)
    checkpoint, progress = resumed or (None, state.Progress(0, 0, train.digest, run_id=uuid.uuid4().hex[:8]))
    progress = _with_versions(progress)
    bad = BadSamples(train, config.work / "bad_samples.jsonl", recipe.max_bad)
    layout = memory_format_of(student.model)
    pictures = Pictures(recipe, accelerator, student.preprocess, train, val, bad, layout)
    for model in (student.model, teacher):
        laid_out(model)
    learner = Learner(student, recipe.average, accelerator.device)
    run = AlignRun(config, accelerator, student, teacher.to(accelerator.device), pictures, learner, checkpoint)
    start_trackers(accelerator, recipe, config.out, config.work, progress)
    if checkpoint is None:
        write_row(run, {"run": described(accelerator)}, 0)
        progress = evaluated(run, progress)
        if recipe.probe_pictures:
            explained(run, progress)
    else:
        learner.restore(checkpoint)
    outcome = Outcome(progress)
    with signals_noted(run.signals):
        for number in range(len(progress.ends), len(recipe.phases)):
            outcome = (fit if recipe.phases[number].objective in FITS else descend)(run, number, outcome)
            walk = outcome.progress.walk
            if outcome.stopped or outcome.guarded or (walk is not None and walk.furthest < 1):
                break
    result = _summary(run, outcome)
    if not outcome.stopped:
        _save(run, outcome, result)
    accelerator.end_training()
    return result


def _with_versions(progress: state.Progress) -> state.Progress:
    """`progress` of a resumed run under the libraries of now, after a word about those that differ."""
    now = versions()
    changed = [f"{name} {old} -> {now[name]}" for name, old in progress.versions.items() if now.get(name) != old]
    if changed:
        warnings.warn(f"resumed with other versions, so no longer bit for bit: {', '.join(changed)}", stacklevel=3)
    return dataclasses.replace(progress, versions=now)


def _summary(run: AlignRun, outcome: Outcome) -> dict[str, Any]:
    """What `align` returns."""
    progress = outcome.progress
    return {
        "out": str(run.config.out),
        "pictures": progress.step * run.recipe.batch_size,
        "start": progress.curve[0] if progress.curve else None,
        "final": progress.curve[-1] if progress.curve else None,
        "curve": list(progress.curve),
        "bad_pictures": len(run.pictures.bad),
        "seconds": round(outcome.seconds, 1),
        "stopped": outcome.stopped,
        "guarded": outcome.guarded,
        "kept": _kept(run, progress),
    }


def _kept(run: AlignRun, progress: state.Progress) -> dict[str, Any] | None:
    """Where a run with a floor ended: the furthest point above it, or the start, and how much the student agrees."""
    if progress.walk is None:
        return None
    walk = progress.walk
    where = {"floor": run.recipe.keep, "agreement": agreement_of(run, progress), "share_of_path": walk.furthest}
    return {**where, "pictures": walk.step * run.recipe.batch_size, **strengths(run.learner.result)}


def _save(run: AlignRun, outcome: Outcome, result: dict[str, Any]) -> None:
    """Saves the aligned student (main process)."""
    if run.accelerator.is_main_process:
        alignment = Alignment(
            result["pictures"],
            result["final"],
            tuple(result["curve"]),
            result["kept"],
            run.recipe.pressure,
            outcome.fitted,
        )
        if outcome.fitted:
            write_prototypes(run.config.work, run.student.labels, run.pictures.train, outcome.fitted)
        student = dataclasses.replace(run.student, model=run.learner.result.cpu()).with_history(alignment=alignment)
        save(student, run.config.out, run.config.overwrite)
    run.accelerator.wait_for_everyone()
