"""A phase that descends: its step loop, and what is due after a step."""

from __future__ import annotations

import dataclasses

from ..convert.layers import fold_gains
from . import state
from .compiling import eager, make_eager
from .distributed import Prepared
from .floor import interval
from .log import PhaseLog, strengths
from .measure import evaluated, explained, settle_statistics
from .run import AlignRun, Outcome
from .schedule import arrived, due
from .stepper import Stepper
from .stopping import asked_to_stop, handed_on, held_to_floor, judged, walked

__all__ = ["descend"]


def descend(run: AlignRun, number: int, outcome: Outcome) -> Outcome:
    """The outcome after phase `number`, or after the step at which the run was asked to stop."""
    recipe, stepper = run.recipe, Stepper(run, number, outcome.progress)
    progress, prepared = stepper.progress, stepper.prepared
    first, stopped = progress.first, False
    log = PhaseLog(run, prepared, progress)
    for batch in run.pictures.batches(progress.step, first + recipe.steps[number]):
        losses, norm = stepper.take(progress, batch)
        progress = dataclasses.replace(progress, step=progress.step + 1)
        log.step(progress, losses, norm)
        outcome = _measured(run, prepared, dataclasses.replace(outcome, progress=progress))
        progress, stopped = outcome.progress, asked_to_stop(run, progress.step)
        leaving = stopped or len(progress.ends) > number
        if leaving or due(progress.step, recipe.batch_size, recipe.checkpoint_every):
            log.check(progress, losses, norm)
            _checkpoint(run, stepper, progress)
        if leaving:
            break
    log.close()
    stepper.close()
    make_eager(run.teacher, prepared.model)
    return dataclasses.replace(outcome, stopped=stopped, seconds=outcome.seconds + log.seconds)


def _measured(run: AlignRun, prepared: Prepared, outcome: Outcome) -> Outcome:
    """The outcome with what is due after the step just made: an evaluation, explanations, the end of the phase."""
    recipe, progress, guarded = run.recipe, outcome.progress, False
    phase, steps, step = recipe.phases[progress.phase], recipe.steps[progress.phase], progress.step - progress.first
    over = step == steps
    every = recipe.evaluate_every
    if recipe.keep:
        every = interval(phase, recipe.batch_size, every)
    evaluate = over or due(progress.step, recipe.batch_size, every)
    explain = recipe.probe_pictures > 0 and (over or due(progress.step, recipe.batch_size, recipe.probe_every))
    if not (evaluate or explain):
        return outcome
    with prepared.whole(), eager(run.teacher):
        settle_statistics(run, phase, everything=over)
        if evaluate:
            progress = evaluated(run, progress, **(strengths(run.learner.result) if recipe.keep else {}))
            if recipe.keep:
                progress = walked(run, progress, every // recipe.batch_size)
            if phase.patience and arrived(phase, step - 1, steps):
                progress = judged(run, progress)
                over = over or progress.waited >= phase.patience
            if recipe.min_agreement:
                progress, guarded = held_to_floor(run, progress)
                over = over or guarded
        if over:
            progress = handed_on(run, progress)
            fold_gains(run.learner.model)
            fold_gains(run.learner.result)
        if explain or (over and recipe.probe_pictures):
            explained(run, progress)
    return dataclasses.replace(outcome, progress=progress, guarded=guarded)


def _checkpoint(run: AlignRun, stepper: Stepper, progress: state.Progress) -> None:
    learner, folder, prepared, trust = run.learner, run.config.work / state.CHECKPOINTS, stepper.prepared, stepper.trust
    progress = dataclasses.replace(progress, trust=trust.numbers())
    run.accelerator.wait_for_everyone()
    with prepared.whole():
        sizes = None if stepper.gains is None else stepper.gains.means
        more = {"sizes": sizes, "best": learner.best, "trusted": trust.kept, "main": run.accelerator.is_main_process}
        state.write(folder, learner.model, prepared.optimizer, progress, learner.average, **more)
    run.accelerator.wait_for_everyone()
