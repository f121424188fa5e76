"""The phases of a run: those that descend, step by step, and those that gather features and then solve."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

import torch
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor

from ..convert import calibrate, set_strength
from ..convert.layers import RunningGains, batch_statistics, mean_sizes, recording, reference_gains
from ..convert.taps import Call
from ..core.errors import BcosifyError, first_line
from ..data.index import ShardIndex
from ..data.loader import Batch
from . import state
from .compiling import compile_blocks, eager, make_eager
from .distributed import prepare, whole
from .log import PhaseLog
from .maps import Aim, decided, own_directions, teacher_maps
from .objectives import FITS, OBJECTIVES, observe
from .objectives.end_to_end import EndToEnd
from .optimizers import make_optimizer, scales
from .paths import Draw, blended, with_own_inputs
from .run import Run
from .schedule import Walk, evaluated_every, learning_rate, path, share_at, strengths_at, warm_steps
from .trust import Trust

__all__ = ["Stepper", "descend", "fit"]


def descend(run: Run, number: int) -> None:
    """Takes the steps of phase `number`, and does what is due after each; a signal ends it early."""
    stepper, progress = Stepper(run, number), run.progress
    log = PhaseLog(run, stepper.prepared, progress)
    run.stepper, run.log = stepper, log
    end = progress.first + run.recipe.steps[number]
    for batch in run.pictures.batches(progress.step, end):
        with _memory_said(run):
            stepper.losses, stepper.norm = stepper.take(progress, batch)
        progress.step += 1
        log.step(progress, stepper.losses, stepper.norm)
        run.over, run.stopped = progress.step == end, run.asked_to_stop()
        # What every process sees alike; a checkpoint that is written now must know of all broken pictures before it.
        if run.over or run.stopped or progress.step % run.recipe.log_every == 0 or _due(run):
            run.pictures.share_noted()
        _after_step(run, stepper)
        if run.over or run.stopped:
            break
    log.close()
    stepper.close()
    make_eager(run.teacher, stepper.prepared.model)
    run.seconds += log.seconds


@contextlib.contextmanager
def _memory_said(run: Run) -> Iterator[None]:
    """Inside, memory that is not enough for a step is told in one line, with what needs less."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        # On a CPU torch raises a RuntimeError that tells itself by its words alone; other errors are of that kind too.
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocate memory" not in str(error):
            raise
        raise BcosifyError(
            f"a step of {run.recipe.batch_size} pictures of {run.recipe.image_size} pixels does not fit into memory "
            f"({first_line(error)[:160]}). The same steps in less memory: --set accumulate="
            f"{2 * run.recipe.accumulate}, or gradient_checkpointing=true. Or take a smaller batch_size or image_size."
        ) from error


def _due(run: Run) -> bool:
    return any(callback.due(run) for callback in run.callbacks)


def _after_step(run: Run, stepper: Stepper) -> None:
    if not _due(run):
        return
    with stepper.prepared.whole(), eager(run.teacher):
        for callback in run.callbacks:
            if callback.due(run):  # asked only now: one before it may have ended the phase
                callback.act(run)


@torch.no_grad()
def fit(run: Run, number: int) -> None:
    """Solves phase `number`; stopped on the way, it starts again."""
    progress, pictures = run.progress, run.pictures
    phase = run.recipe.phases[number]
    solver = FITS[phase.objective](run.learner.model, run.recipe, phase.settings)
    end = progress.step + run.recipe.steps[number]
    ids: list[Tensor] = []
    for batch in pictures.batches(progress.step, end):
        pictures.note(batch.bad)
        solver.gather(pictures.normalised(batch.pictures))
        ids.append(batch.ids)
        run.stopped = run.asked_to_stop()
        if run.stopped:
            return
    pictures.share_noted()
    solver.join(run.accelerator.gather)
    shown = run.accelerator.gather(torch.cat(ids).to(run.accelerator.device))
    assert isinstance(shown, Tensor)
    run.fitted = solver.solve(list(pictures.held_out()))
    for prototype in run.fitted["prototypes"]:
        prototype["nearest"] = id = int(shown[prototype["nearest"]])
        if isinstance(pictures.train, ShardIndex):
            prototype["picture"] = f"{Path(pictures.train.file(id).path).name}:{pictures.train.key(id)}"
    progress.begin_phase(number, ())
    progress.step = end
    run.evaluate()
    progress.end_phase()


class Stepper:
    """What takes the steps of phase `number`, from the phase's start, or from inside it after a resume.

    Attributes:
        prepared: the objective that is minimised, and its optimizer.
        losses, norm: of the last step; no norm where it was refused.
    """

    def __init__(self, run: Run, number: int) -> None:
        self.run, self.phase, self.steps = run, run.recipe.phases[number], run.recipe.steps[number]
        self.losses: dict[str, Tensor] = {}
        self.norm: Tensor | float | None = None
        progress = run.progress
        model = run.learner.model.to(run.accelerator.device)  # shards of an earlier phase leave it on the CPU
        self.objective = OBJECTIVES[self.phase.objective](model, run.recipe, self.phase.settings)
        pictured = self.phase.calibrate or self.phase.recalibrate_every or self.objective.asks_teacher
        self.gain_pictures = run.pictures.calibration(self.phase.calibrate or 64) if pictured else None
        if self.gain_pictures is not None:
            self.objective.centre_on(*observe(run.teacher, self.gain_pictures, self.objective.taps))
        checkpoint = run.checkpoint if progress.step > progress.first else None
        if checkpoint is None:
            self._begin(number)
        else:
            self.objective.go_on(progress.begun)
        sizes = self._sizes(checkpoint)
        # A walk moves strengths that the phase itself leaves where they are.
        self.moving = self.phase.moving or run.walk is not None
        self.step = progress.step - progress.first
        self.prepared = prepare(
            run.accelerator,
            self.objective,
            lambda model: make_optimizer(model, self.phase, run.recipe, progress.scales),
        )
        if checkpoint is not None:
            state.restore_optimizer(checkpoint, self.prepared.optimizer)
        self.trust = self._trust(checkpoint)
        self.gains = RunningGains(self.prepared.model, self.phase.reference_decay, sizes) if sizes else None
        if run.recipe.compile:
            compile_blocks(run.teacher, self.objective.taps, moving=False)
            compile_blocks(self.prepared.model, self.objective.taps, moving=self.moving)

    def _sizes(self, checkpoint: Path | None) -> dict[str, Tensor]:
        """The mean sizes that reference gains start from, or go on with from `checkpoint`; none otherwise."""
        run = self.run
        if not (self.phase.reference_gains and self.phase.reference_decay):
            return {}
        if checkpoint is not None:
            return state.sizes_of(checkpoint, run.accelerator.device)
        return mean_sizes(run.learner.model, run.teacher, run.pictures.statistics())

    def close(self) -> None:
        """At the end of the phase."""
        if self.gains is not None:
            self.gains.stop()

    def _trust(self, checkpoint: Path | None) -> Trust:
        """The phase's trust, as it was where the run goes on from `checkpoint`."""
        accelerator = self.run.accelerator
        models = [self.prepared.model, *filter(None, [self.run.learner.average])]
        warm = warm_steps(self.phase, self.steps)
        mean = functools.partial(accelerator.reduce, reduction="mean")
        trust = Trust(self.phase.trust, warm, models, self.prepared.optimizer, mean)  # type: ignore[arg-type]
        if checkpoint is None:
            trust.begin()
        else:
            kept = state.trusted_of(checkpoint, accelerator.device)
            trust.go_on(self.run.progress.trust, kept, accelerator.device)
        return trust

    def _begin(self, number: int) -> None:
        """What comes before a phase's first step alone."""
        run, recipe, progress = self.run, self.run.recipe, self.run.progress
        run.walk = None
        if recipe.keep:
            run.walk = Walk.begin(progress.step, evaluated_every(recipe, self.phase) // recipe.batch_size, self.steps)
        set_strength(run.learner.model, **self._strengths())
        if self.phase.calibrate:
            self._gains()
        progress.begin_phase(number, scales(run.learner.model, self.phase.relative), self.objective.begin())
        run.learner.begin()
        for callback in run.callbacks:
            callback.begin(run)

    def _strengths(self) -> dict[str, float]:
        """Every strength, and the window, of the student that takes the next step."""
        run, step = self.run, self.run.progress.step
        if run.walk is not None:
            return path(self.phase, run.walk.at(step))
        return strengths_at(self.phase, step - run.progress.first, self.steps)

    def take(self, progress: state.Progress, batch: Batch) -> tuple[dict[str, Tensor], Tensor | float | None]:
        """Takes the next step; returns losses, and the norm of the gradient before it was clipped."""
        run, phase, model, optimizer = self.run, self.phase, self.prepared.model, self.prepared.optimizer
        k = self.step = progress.step - progress.first
        if self.moving:
            self._move(self._strengths())
        ramps = run.walk is not None or k <= phase.ramp * self.steps
        if k and phase.recalibrate_every and k % phase.recalibrate_every == 0 and ramps:
            with self.prepared.whole(), eager(run.teacher):
                self._gains()
        run.pictures.note(batch.bad)
        rate = self.trust.rate(k, learning_rate(phase, k, self.steps), phase.learning_rate)
        rate *= 1.0 if run.walk is None else run.walk.rate
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        optimizer.zero_grad()
        pictures = run.pictures.normalised(batch.pictures)
        losses = self._backward(pictures)
        if self.trust.refuses(k, losses["total"], lambda: self._backward(pictures, learn=False)["total"]):
            if self.gains is not None:
                self.gains.forget()
            return losses, None
        if self.gains is not None:
            self.gains.advance()
        norm = run.accelerator.clip_grad_norm_(model.parameters(), phase.clip)
        if phase.adaptive_clip:
            adaptive_clip_grad(model.parameters(), phase.adaptive_clip)
        optimizer.step()
        run.learner.stepped()
        return losses, None if norm is None else whole(norm)

    def _move(self, strengths: dict[str, float]) -> None:
        for model in dict.fromkeys((self.prepared.model, self.run.learner.result)):
            set_strength(model, **strengths)

    def _gains(self) -> None:
        """Fits gains to the teacher, with the student fed as its objective feeds it."""
        assert self.gain_pictures is not None
        calls, _ = observe(self.run.teacher, self.gain_pictures, self.objective.taps)
        fed = functools.partial(self.objective.run, self.gain_pictures, calls)
        calibrate(self.run.learner.model, self.run.teacher, self.gain_pictures, self.phase.gain, fed)

    @contextlib.contextmanager
    def _helped(self) -> Iterator[None]:
        """Inside, the student's layers take from each batch, and from the teacher, what the phase says."""
        model, blend = self.prepared.model, share_at(self.phase, "blend", self.step, self.steps)
        with blended(model, self.run.teacher, blend), contextlib.ExitStack() as stack:
            if self.phase.batch_statistics:
                stack.enter_context(batch_statistics(model))
            if self.phase.reference_gains:
                stack.enter_context(reference_gains(model, self.run.teacher))
            yield

    def _fed(self, calls: dict[str, Call], part: Tensor, first: int) -> dict[str, Call]:
        """The teacher's calls on `part`, which begins at this process's picture `first`, as the units are fed."""
        share = share_at(self.phase, "own_inputs", self.step, self.steps)
        if not share:
            return calls
        own, _ = observe(self.prepared.model, part, self.objective.taps)
        return with_own_inputs(calls, own, share, len(part), self._draw(first))

    def _aims(self, part: Tensor, output: Tensor, first: int) -> tuple[Aim, ...]:
        """What the maps of some of `part` are to be, where the objective compares maps."""
        if not isinstance(self.objective, EndToEnd) or not self.objective.map_weight:
            return ()
        some, theirs = (whole[: max(1, round(self.objective.map_share * len(part)))] for whole in (part, output))
        if not self.run.output.chooses:
            assert self.objective.mean_output is not None
            directions = own_directions(theirs, self.objective.mean_output)
        else:
            directions = decided(theirs, self._draw(first))
        return (Aim(directions, teacher_maps(self.run.teacher, some, directions)),)

    def _draw(self, first: int) -> Draw:
        """The dice of this step for the pictures from this process's picture `first` on."""
        recipe, accelerator = self.run.recipe, self.run.accelerator
        before = accelerator.process_index * (recipe.batch_size // accelerator.num_processes)
        return Draw(recipe.seed, self.run.progress.step, recipe.batch_size, before + first)

    def _backward(self, pictures: Tensor, learn: bool = True) -> dict[str, Tensor]:
        """Adds the gradient of this process's pictures, part by part; returns the losses over all parts, detached.

        Without `learn` it returns the losses alone, where gradients are off.
        """
        accelerator, module = self.run.accelerator, self.prepared.module
        parts = pictures.chunk(self.run.recipe.accumulate)
        sums: dict[str, Tensor] = {}
        with self._helped():
            for i, part in enumerate(parts):
                share = len(part) / len(pictures)
                last = i + 1 == len(parts)
                with contextlib.nullcontext() if last else accelerator.no_sync(module):
                    with accelerator.autocast():
                        with recording(self.run.teacher) if self.phase.reference_gains else contextlib.nullcontext():
                            calls, output = observe(self.run.teacher, part, self.objective.taps)
                        calls = self._fed(calls, part, sum(map(len, parts[:i])))
                        losses = module(part, calls, output, *self._aims(part, output, sum(map(len, parts[:i]))))
                    if learn:
                        accelerator.backward(losses["total"] * share)
                    if learn and self.gains is not None:
                        self.gains.collect(share)
                for name, loss in losses.items():
                    sums[name] = sums.get(name, 0.0) + loss.detach() * share
        return sums
