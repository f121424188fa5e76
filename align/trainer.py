"""An alignment: a frozen teacher, a student, unlabelled pictures, phases that descend or solve (see `phases`).

One process or many (`accelerate launch`): every process makes its own slice of each global batch, and only the
objective around the student is prepared by accelerate (preparing the data too would split it twice). Both models stay
in eval mode, as they are compared as functions: no dropout, and batch statistics only where a phase asks for them.
"""

from __future__ import annotations

import dataclasses
import signal
import uuid
import warnings
from typing import Any

from accelerate.utils import ProjectConfiguration

from ..convert import load, save, teacher_of
from ..convert.history import Alignment
from ..convert.memory import laid_out, memory_format_of
from ..core.files import json_text, new_file
from ..core.versions import versions
from ..data.bad import BadSamples
from . import state
from .callbacks import default_callbacks
from .checks import check_data, check_processes, check_recipe, check_request
from .distributed import described, make_accelerator
from .log import strengths, write_row
from .objectives import FITS
from .objectives.prototypes import write_prototypes
from .phases import descend, fit
from .pictures import Pictures
from .prepare import RESULT, checkpoint_gradients, find_data, finished, prepare_folder, start_from
from .run import AlignConfig, Learner, Run, signals_noted
from .schedule import floored
from .trackers import TRACKED, start_trackers

__all__ = ["AlignConfig", "align"]


def align(config: AlignConfig) -> dict[str, Any]:
    """Aligns the student in `config.run` to its teacher and saves it to `config.out`.

    Returns:
        `out`, `pictures` (seen), `curve` (held-out fidelity over pictures seen), its `start` and `final`,
        `bad_pictures`, `seconds`, whether the run was `stopped` (by a signal) or `guarded` (by `min_agreement`), and
        with a floor (`keep`) the strengths that were `kept`; `finished` where it was resumed and had ended before.

    Raises:
        RecipeError, DataError, CheckpointError, SourceError: before the first step.
        DataError: too many pictures are broken. BcosifyError: the loss is no number any more.
    """
    recipe = floored(config.recipe)
    config = dataclasses.replace(config, recipe=recipe)
    if (done := finished(config)) is not None:
        return {**done, "finished": True}
    check_request(config)
    accelerator = make_accelerator(
        recipe.precision,
        log_with=list(config.trackers) or None,
        project_config=ProjectConfiguration(str(config.work), str(config.work / TRACKED)),
    )
    check_processes(config, accelerator)
    student = load(config.run)
    teacher = teacher_of(student, config.weights, any(phase.reference_gains for phase in recipe.phases))
    start_from(student, config.init_from)
    check_recipe(recipe, student, teacher)
    if recipe.gradient_checkpointing:
        checkpoint_gradients(student.model, student.source.library)
    train, val = find_data(config)
    check_data(recipe, student, train, val, accelerator.num_processes)
    resumed = prepare_folder(config, accelerator, train)
    checkpoint, progress = resumed or (None, state.Progress(0, 0, train.digest, run_id=uuid.uuid4().hex[:8]))
    _note_versions(progress)
    bad = BadSamples(train, config.work / "bad_samples.jsonl", recipe.max_bad, accelerator.is_main_process)
    layout = memory_format_of(student.model)
    pictures = Pictures(recipe, accelerator, student.preprocess, train, val, bad, layout)
    for model in (student.model, teacher):
        laid_out(model)
    learner, teacher = Learner(student, recipe.average, accelerator.device), teacher.to(accelerator.device)
    callbacks = default_callbacks()
    run = Run(config, accelerator, student, teacher, pictures, learner, progress, callbacks, checkpoint)
    start_trackers(accelerator, recipe, config.out, config.work, progress)
    if checkpoint is None:
        write_row(run, {"run": described(accelerator)}, 0)
        run.evaluate()
        if recipe.probe_pictures:
            run.explain()
    else:
        learner.restore(checkpoint)
        for callback in callbacks:
            if (saved := state.saved_of(checkpoint, callback.name)) is not None:
                callback.restore(run, saved)
    with signals_noted(run.signals):
        for number in range(len(progress.ends), len(recipe.phases)):
            (fit if recipe.phases[number].objective in FITS else descend)(run, number)
            if run.stopped or run.guarded:
                break
    result = _summary(run)
    if not run.stopped:
        _save(run, result)
    accelerator.end_training()
    if signal.SIGINT in run.signals:
        # Whoever pressed Ctrl-C wants what comes after this run to stop too.
        done = "the run was finished" if not run.stopped else "go on with the same command and --resume"
        raise KeyboardInterrupt(f"interrupted at {result['pictures']} pictures; {done}")
    return result


def _note_versions(progress: state.Progress) -> None:
    """Notes the libraries of now, after a word about those that a resumed run was last started with."""
    now = versions()
    changed = [f"{name} {old} -> {now[name]}" for name, old in progress.versions.items() if now.get(name) != old]
    if changed:
        warnings.warn(f"resumed with other versions, so no longer bit for bit: {', '.join(changed)}", stacklevel=3)
    progress.versions = now


def _summary(run: Run) -> dict[str, Any]:
    """What `align` returns."""
    progress = run.progress
    return {
        "out": str(run.config.out),
        "pictures": progress.step * run.recipe.batch_size,
        "start": progress.curve[0] if progress.curve else None,
        "final": progress.curve[-1] if progress.curve else None,
        "curve": list(progress.curve),
        "bad_pictures": len(run.pictures.bad),
        "seconds": round(run.seconds, 1),
        "stopped": run.stopped,
        "guarded": run.guarded,
        "kept": _kept(run),
        "finished": False,
    }


def _kept(run: Run) -> dict[str, Any] | None:
    """Where a run with a floor ended: the furthest point above it, or the start, and how much the student agrees."""
    if run.walk is None:
        return None
    where = {"floor": run.recipe.keep, "agreement": run.agreement(), "share_of_path": run.walk.furthest}
    return {**where, "pictures": run.walk.step * run.recipe.batch_size, **strengths(run.learner.result)}


def _save(run: Run, result: dict[str, Any]) -> None:
    """Saves the aligned student (main process)."""
    if run.accelerator.is_main_process:
        alignment = Alignment(
            result["pictures"],
            result["final"],
            tuple(result["curve"]),
            result["kept"],
            run.recipe.pressure,
            run.fitted,
        )
        if run.fitted:
            write_prototypes(run.config.work, run.output, run.pictures.train, run.fitted)
        # It is known at the size that it was trained and measured at, which its teacher's need not be.
        prepared = run.student.preprocess.at(run.recipe.image_size)
        student = dataclasses.replace(run.student, model=run.learner.result.cpu(), preprocess=prepared)
        student = student.with_history(alignment=alignment)
        save(student, run.config.out, run.config.overwrite)
        with new_file(run.config.work / RESULT) as scratch:
            scratch.write_text(json_text(result, indent=2))
    run.accelerator.wait_for_everyone()
