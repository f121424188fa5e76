"""The alignment loop: a frozen teacher, a student, unlabelled pictures, phases.

One process or many (`accelerate launch`): every process makes its own slice of each global batch, and only the
objective around the student is prepared by accelerate (preparing the data too would split it twice). Both models stay
in eval mode, as they are compared as functions: no dropout, and batch statistics only where a phase asks for them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import signal
import sys
import threading
import uuid
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, broadcast
from timm.utils.agc import adaptive_clip_grad
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..convert import Student, calibrate, load, save, set_strength
from ..convert.checkpoint import versions
from ..convert.files import check_free
from ..convert.layers import batch_statistics, estimate_statistics, scheduled_layers
from ..convert.methods import find_method
from ..convert.taps import first_tensor
from ..evaluate.fidelity import fidelity
from . import state
from .checks import check_recipe
from .compiling import compile_blocks, eager, make_eager
from .distributed import Prepared, check_sharded, described, make_accelerator, prepare, whole
from .loader import Augment, BadSamples, Batch, check_batch, held_out_batches, to_model_input, training_batches
from .log import PhaseLog, write_row
from .objectives import FITS, OBJECTIVES, observe
from .optimizers import make_optimizer
from .prepare import (
    AlignConfig,
    checkpoint_gradients,
    find_data,
    prepare_folder,
    start_from,
    teacher_of,
    without_checkpointing,
)
from .probe import EXPLANATIONS, Probe, make_probe
from .prototype_sheet import write_prototypes
from .recipe import Phase
from .schedule import learning_rate, ramp
from .shards import ShardIndex
from .stream import Stream
from .trackers import TRACKED, check_trackers, log_picture, start_trackers

__all__ = ["AlignConfig", "align"]

STOP_SIGNALS = (signal.SIGTERM, *((signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ()))
# The student that is measured and saved has statistics of so many pictures, in batches of this size.
STATISTICS_PICTURES, STATISTICS_BATCH = 256, 32


def align(config: AlignConfig) -> dict[str, Any]:
    """Aligns the student in `config.run` to its teacher and saves it to `config.out`.

    Returns:
        `out`, `recipe`, `curve` (held-out fidelity over pictures seen), `start`, `final`, `bad_pictures`.

    Raises:
        RecipeError, DataError, CheckpointError, SourceError: before the first step.
        DataError: too many pictures are broken. BcosifyError: the loss is no number any more.
    """
    recipe = config.recipe
    check_trackers(config.trackers)
    accelerator = make_accelerator(
        recipe.precision,
        log_with=list(config.trackers) or None,
        project_config=ProjectConfiguration(str(config.work), str(config.work / TRACKED)),
    )
    check_sharded(accelerator, recipe)
    check_free(config.out, config.overwrite)
    student = load(config.run)
    teacher = teacher_of(student, config.weights)
    start_from(student, config.init_from)
    check_recipe(recipe, student, teacher)
    if recipe.gradient_checkpointing:
        checkpoint_gradients(student.model)
    train, val = find_data(config)
    check_batch(train, recipe.batch_size, accelerator.num_processes)
    resumed = prepare_folder(config, accelerator, train)
    run = _Run(config, accelerator, student, teacher.to(accelerator.device), train, val)
    started = state.Progress(0, 0, train.digest, versions=versions(), run_id=uuid.uuid4().hex[:8])
    progress = _with_versions(resumed[1]) if resumed else started
    start_trackers(accelerator, recipe, config.out, config.work, progress)
    if resumed is None:
        write_row(config.work, {"run": described(accelerator)}, accelerator, 0)
        progress = run.evaluated(progress, {"phase": "start"})
        if recipe.probe_pictures:
            run.explained(progress)
    else:
        run.restore(resumed[0])
    with _signals_noted() as run.signals:
        for number, (phase, steps) in enumerate(zip(recipe.phases, recipe.steps, strict=True)):
            if number >= len(progress.ends) and not (run.stopping or run.guarded):
                first = progress.ends[-1] if progress.ends else 0
                inside = resumed is not None and progress.step > first
                progress = run.phase(number, phase, first, steps, progress, resumed[0] if resumed and inside else None)
                resumed = None
    result = run.summary(progress) if run.stopping else run.finish(progress)
    accelerator.end_training()
    return result


def _with_versions(progress: state.Progress) -> state.Progress:
    """`progress` of a resumed run under the libraries of now, after a word about those that differ."""
    now = versions()
    changed = [f"{name} {old} -> {now[name]}" for name, old in progress.versions.items() if now.get(name) != old]
    if changed:
        warnings.warn(f"resumed with other versions, so no longer bit for bit: {', '.join(changed)}", stacklevel=3)
    return dataclasses.replace(progress, versions=now)


@contextlib.contextmanager
def _signals_noted() -> Iterator[list[int]]:
    """Inside, SIGTERM and SIGUSR1 (what Slurm sends before it takes a node away) are noted, and end nothing."""
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield noted  # only the main thread may handle signals
        return
    before = {number: signal.signal(number, lambda number, _: noted.append(number)) for number in STOP_SIGNALS}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Run:
    """What the phases of one run share."""

    def __init__(
        self,
        config: AlignConfig,
        accelerator: Accelerator,
        student: Student,
        teacher: nn.Module,
        train: ShardIndex | Stream,
        val: ShardIndex,
    ) -> None:
        self.config, self.recipe, self.accelerator = config, config.recipe, accelerator
        self.student, self.teacher = student, teacher
        self.model = student.model.to(accelerator.device).requires_grad_(False)
        # What is not trained gets no gradient at all, so that not even one is computed.
        self.model.get_submodule(find_method(student.method).trains).requires_grad_(True)
        self.train, self.val = train, val
        self.bad = BadSamples(train, config.work / "bad_samples.jsonl", config.recipe.max_bad)
        self.classifier = student.labels is not None
        self.seconds = 0.0
        self._teacher_outputs: Tensor | None = None
        self.average: ModelEmaV3 | None = None
        self._probe: Probe | None = None
        self.signals: list[int] = []
        self.stopping = False
        self.best: dict[str, Tensor] | None = None
        self.guarded = False
        self.fitted: dict[str, Any] = {}

    # ------------------------------------------------------------------------------------------------ pictures

    def _normalised(self, pictures: Tensor) -> Tensor:
        preprocess = self.student.preprocess
        return to_model_input(pictures, preprocess.mean, preprocess.std, self.accelerator.device)

    def _calibration_pictures(self, count: int) -> Tensor:
        """The same pictures in every process and after every resume: gains must agree, or DDP's copies part."""
        batch = min(16, count)
        batches = training_batches(
            self.train,
            seed=self.recipe.seed + 1,
            global_batch=batch,
            steps=-(-count // batch),
            size=self.recipe.image_size,
            augment=self._augment(),
        )
        return self._normalised(torch.cat([item.pictures for item in batches])[:count])

    def _augment(self) -> Augment:
        return Augment(scale=self.recipe.crop_scale, flip=self.recipe.flip)

    @property
    def _result(self) -> nn.Module:
        """What is measured and saved: the averaged student where the recipe asks for one."""
        return self.model if self.average is None else self.average.module

    def _new_average(self) -> ModelEmaV3 | None:
        decay = self.recipe.average
        # Buffers are copied: a mean over a moving B would be the B of no function that was ever trained.
        return ModelEmaV3(self.model, decay=decay, exclude_buffers=True) if decay else None

    def restore(self, checkpoint: Path) -> None:
        """Student and average as they were."""
        self.average = self._new_average()
        state.restore(checkpoint, self.model, self.average and self.average.module)

    # ------------------------------------------------------------------------------------------------ training

    def phase(
        self, number: int, phase: Phase, first: int, steps: int, progress: state.Progress, checkpoint: Path | None
    ) -> state.Progress:
        """Runs one phase from `progress.step` to its end."""
        if phase.objective in FITS:
            return self._fit(number, phase, first, steps, progress)
        begin = progress.step - first
        self.model.to(self.accelerator.device)  # shards of an earlier phase leave it on the CPU
        objective = OBJECTIVES[phase.objective](self.model, self.recipe)
        pictured = phase.calibrate or phase.recalibrate_every or objective.asks_teacher
        gain_pictures = self._calibration_pictures(phase.calibrate or 64) if pictured else None
        if gain_pictures is not None:
            objective.centre_on(*observe(self.teacher, gain_pictures, objective.taps))

        def gains() -> None:
            assert gain_pictures is not None
            calls, _ = observe(self.teacher, gain_pictures, objective.taps)
            run = functools.partial(objective.run, gain_pictures, calls)
            calibrate(self.model, self.teacher, gain_pictures, phase.gain, run)

        if checkpoint is None:
            self._move(self.model, phase, 0, steps)
            if phase.calibrate:
                gains()
            progress = progress.in_phase(number, _scales(self.model, phase.relative), objective.begin())
            self.best = None
            if self.recipe.min_agreement:  # the weights to go back to, should the first measurement fail
                progress, self.best = dataclasses.replace(progress, best_step=first), state.snapshot(self.model)
            self.average = self._new_average()
        else:
            objective.go_on(progress.begun)
            self.best = state.best_of(checkpoint)
        scales = progress.scales
        prepared = prepare(self.accelerator, objective, lambda model: make_optimizer(model, phase, self.recipe, scales))
        model, optimizer = prepared.model, prepared.optimizer
        if checkpoint is not None:
            state.restore_optimizer(checkpoint, optimizer)
        if self.recipe.compile:
            compile_blocks(self.teacher, objective.taps, moving=False)
            compile_blocks(model, objective.taps, moving=phase.moving)
        log = PhaseLog(
            self.recipe, number, first, model, optimizer, self.accelerator, self.config.work, self.config.quiet
        )
        for k, batch in enumerate(self._batches(progress.step, first + steps), start=begin):
            if phase.moving:
                self._move(model, phase, k, steps)
            if k and phase.recalibrate_every and k % phase.recalibrate_every == 0 and k <= phase.ramp * steps:
                with prepared.whole(), eager(self.teacher):
                    gains()
            self.bad.add(batch.bad)
            for group in optimizer.param_groups:
                rate = learning_rate(
                    k, steps, phase.learning_rate, phase.warmup, phase.final_learning_rate, phase.decay
                )
                group["lr"] = rate * group["scale"]
            optimizer.zero_grad()
            losses = self._backward(phase, objective.taps, prepared, self._normalised(batch.pictures))
            norm = self.accelerator.clip_grad_norm_(model.parameters(), phase.clip)
            norm = None if norm is None else whole(norm)
            if phase.adaptive_clip:
                adaptive_clip_grad(model.parameters(), phase.adaptive_clip)
            optimizer.step()
            if self.average is not None:
                self.average.update(self.model)
            progress = dataclasses.replace(progress, step=first + k + 1)
            log.step(progress, losses, norm)
            progress, last = self._measured(prepared, number, k, steps, progress)
            self.stopping = self._asked_to_stop(progress.step)
            if last or self.stopping or self._due(progress.step, self.recipe.checkpoint_every):
                log.check(progress, losses, norm)
                self._checkpoint(prepared, progress)
            if self.stopping or last:
                break
        log.close()
        make_eager(self.teacher, model)
        self.seconds += log.seconds
        return progress

    @torch.no_grad()
    def _fit(self, number: int, phase: Phase, first: int, steps: int, progress: state.Progress) -> state.Progress:
        """A phase that gathers features of its pictures and then solves; stopped on the way, it starts again."""
        fit = FITS[phase.objective](self.model, self.recipe)
        ids: list[Tensor] = []
        for batch in self._batches(first, first + steps):
            self.bad.add(batch.bad)
            fit.gather(self._normalised(batch.pictures))
            ids.append(batch.ids)
            self.stopping = self._asked_to_stop(progress.step)
            if self.stopping:
                return progress
        fit.join(self.accelerator.gather)
        shown = self.accelerator.gather(torch.cat(ids).to(self.accelerator.device))
        assert isinstance(shown, Tensor)
        self.fitted = fit.solve([self._normalised(batch.pictures) for batch in self._held_out()])
        for prototype in self.fitted["prototypes"]:
            prototype["nearest"] = id = int(shown[prototype["nearest"]])
            if isinstance(self.train, ShardIndex):
                prototype["picture"] = f"{Path(self.train.file(id).path).name}:{self.train.key(id)}"
        progress = dataclasses.replace(progress.in_phase(number, ()), step=first + steps)
        progress = self.evaluated(progress, {"phase": number, "objective": phase.objective})
        return dataclasses.replace(progress, ends=(*progress.ends, progress.step))

    def _backward(self, phase: Phase, taps: tuple[str, ...], prepared: Prepared, pictures: Tensor) -> dict[str, Tensor]:
        """Adds the gradient of this process's pictures, part by part; returns the losses over all parts, detached."""
        parts = pictures.chunk(self.recipe.accumulate)
        sums: dict[str, Tensor] = {}
        statistics = batch_statistics(prepared.model) if phase.batch_statistics else contextlib.nullcontext()
        with statistics:
            for i, part in enumerate(parts):
                share = len(part) / len(pictures)
                last = i + 1 == len(parts)
                with contextlib.nullcontext() if last else self.accelerator.no_sync(prepared.module):
                    with self.accelerator.autocast():
                        calls, output = observe(self.teacher, part, taps)
                        losses = prepared.module(part, calls, output)
                    self.accelerator.backward(losses["total"] * share)
                for name, loss in losses.items():
                    sums[name] = sums.get(name, 0.0) + loss.detach() * share
        return sums

    def _asked_to_stop(self, step: int) -> bool:
        """Whether any process was sent a stop signal; all agree, as they ask each other at the same steps."""
        if self.accelerator.num_processes == 1:
            return bool(self.signals)
        if step % self.recipe.log_every:
            return False
        noted = torch.tensor(float(len(self.signals)), device=self.accelerator.device)
        total = self.accelerator.reduce(noted, "sum")
        assert isinstance(total, Tensor)
        return bool(total > 0)

    def _batches(self, first: int, end: int) -> Iterator[Any]:
        """This process's batches of steps [first, end), with a progress bar over the phase."""
        batches = training_batches(
            self.train,
            seed=self.recipe.seed,
            global_batch=self.recipe.batch_size,
            first_step=first,
            steps=end - first,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            size=self.recipe.image_sizes or self.recipe.image_size,
            augment=self._augment(),
            workers=self.recipe.workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        return iter(batches)

    def _settle_statistics(self) -> None:
        """Running statistics of the student as it is now, alike in every process."""
        pictures = self._calibration_pictures(STATISTICS_PICTURES)
        estimate_statistics(self._result, pictures.split(STATISTICS_BATCH))

    def _move(self, model: nn.Module, phase: Phase, k: int, steps: int) -> None:
        """The strengths of step `k`."""
        moving = {name: getattr(phase, name) for name in ("b", "beta", "dampening")}
        strengths = {name: ramp(k, steps, start, end, phase.ramp) for name, (start, end) in moving.items()}
        for moved in dict.fromkeys((model, self._result)):
            set_strength(moved, **strengths)

    def _due(self, step: int, every: int) -> bool:
        """Whether `every` pictures went by within this step; 0 is never."""
        return every > 0 and step * self.recipe.batch_size // every > (step - 1) * self.recipe.batch_size // every

    def _checkpoint(self, prepared: Prepared, progress: state.Progress) -> None:
        self.accelerator.wait_for_everyone()
        with prepared.whole():
            folder, main = self.config.work / state.CHECKPOINTS, self.accelerator.is_main_process
            average = self.average and self.average.module
            state.write(folder, self.model, prepared.optimizer, progress, average, best=self.best, main=main)
        self.accelerator.wait_for_everyone()

    # -------------------------------------------------------------------------------------------- early stopping

    def _measured(
        self, prepared: Prepared, number: int, k: int, steps: int, progress: state.Progress
    ) -> tuple[state.Progress, bool]:
        """What is due after step `k` of a phase: an evaluation, explanations; and whether the phase ends here."""
        phase, last = self.recipe.phases[number], k + 1 == steps
        evaluate = last or self._due(progress.step, self.recipe.evaluate_every)
        explain = self.recipe.probe_pictures > 0 and (last or self._due(progress.step, self.recipe.probe_every))
        if not (evaluate or explain):
            return progress, False
        where = {"phase": number, "objective": phase.objective}
        with prepared.whole(), eager(self.teacher):
            if phase.batch_statistics:
                self._settle_statistics()
            if evaluate:
                progress = self.evaluated(progress, where)
                if phase.patience and _arrived(phase, k, steps):
                    progress = self._judged(progress)
                    last = last or progress.waited >= phase.patience
                if self.recipe.min_agreement:
                    progress = self._held_to_floor(progress)
                    last = last or self.guarded
            if last:
                progress = self._ended(progress, where)
            if explain or (last and self.recipe.probe_pictures):
                self.explained(progress)
        return progress, last

    def _judged(self, progress: state.Progress) -> state.Progress:
        """`progress` after the evaluation that was just made; keeps the weights where it was the best so far."""
        score = progress.curve[-1]["centred_cosine"] if self.accelerator.is_main_process else 0.0
        progress = progress.judged(self._told(score))
        if progress.best_step == progress.step:
            self.best = state.snapshot(self._result)
        return progress

    def _held_to_floor(self, progress: state.Progress) -> state.Progress:
        """`progress` after the evaluation that was just made; keeps the weights where they still agree enough."""
        point = progress.curve[-1] if self.accelerator.is_main_process else {"centred_cosine": 0.0}
        self.guarded = self._told(point.get("top1_agreement", point["centred_cosine"])) < self.recipe.min_agreement
        if self.guarded:
            return progress
        self.best = state.snapshot(self._result)
        return dataclasses.replace(progress, best_step=progress.step)

    def _told(self, score: float) -> float:
        """The main process's `score`, in every process."""
        told = broadcast(torch.tensor(score, dtype=torch.float64, device=self.accelerator.device))
        assert isinstance(told, Tensor)
        return float(told)

    def _ended(self, progress: state.Progress, where: dict[str, Any]) -> state.Progress:
        """`progress` at the end of a phase, with the student as it was at the phase's best evaluation."""
        if self.best is not None and progress.best_step < progress.step:
            for model in dict.fromkeys((self.model, self._result)):
                model.load_state_dict(self.best)
            progress = self.evaluated(progress, {**where, "weights_of": progress.best_step * self.recipe.batch_size})
        self.best = None
        return dataclasses.replace(progress, ends=(*progress.ends, progress.step))

    # ------------------------------------------------------------------------------------------------ measuring

    def _held_out(self) -> Iterable[Batch]:
        return held_out_batches(self.val, size=self.recipe.image_size, workers=0)

    @torch.no_grad()
    def evaluated(self, progress: state.Progress, where: dict[str, Any]) -> state.Progress:
        """`progress` with one more point on its curve; only the main process measures."""
        if not self.accelerator.is_main_process:
            return progress
        theirs = self._teacher_outputs
        pictures = [self._normalised(batch.pictures) for batch in self._held_out()]
        if theirs is None:
            theirs = self._teacher_outputs = torch.cat([first_tensor(self.teacher(batch)) for batch in pictures])
        ours = torch.cat([first_tensor(self._result(batch)) for batch in pictures])
        point = {"pictures": progress.step * self.recipe.batch_size, **where, **fidelity(ours, theirs, self.classifier)}
        write_row(self.config.work, {"held_out": point}, self.accelerator, progress.step)
        if not self.config.quiet:
            shown = ", ".join(f"{name} {value:.3f}" for name, value in point.items() if isinstance(value, float))
            tqdm.write(f"{point['pictures']:>8} pictures: {shown}", file=sys.stderr)
        return dataclasses.replace(progress, curve=(*progress.curve, point))

    def explained(self, progress: state.Progress) -> None:
        """Writes and logs a sheet of explanations; only the main process explains."""
        if not self.accelerator.is_main_process:
            return
        if self._probe is None:
            count, size = self.recipe.probe_pictures, self.recipe.image_size
            self._probe = make_probe(self.teacher, self.val, count, size, self._normalised, self.student.labels)
        pictures = progress.step * self.recipe.batch_size
        out = self.config.work / EXPLANATIONS / f"{pictures:08d}.png"
        model = self._result
        with without_checkpointing(model) if self.recipe.gradient_checkpointing else contextlib.nullcontext():
            sheet = self._probe.write(model, out)
        if sheet is not None:
            log_picture(self.accelerator, EXPLANATIONS, sheet, progress.step)

    def summary(self, progress: state.Progress) -> dict[str, Any]:
        """What `align` returns; `stopped` where a signal ended the run, whose last step is in a checkpoint."""
        return {
            "out": str(self.config.out),
            "pictures": progress.step * self.recipe.batch_size,
            "start": progress.curve[0] if progress.curve else None,
            "final": progress.curve[-1] if progress.curve else None,
            "curve": list(progress.curve),
            "bad_pictures": len(self.bad),
            "seconds": round(self.seconds, 1),
            "stopped": self.stopping,
            "guarded": self.guarded,
        }

    def finish(self, progress: state.Progress) -> dict[str, Any]:
        """Saves the aligned student; returns the summary."""
        result = self.summary(progress)
        if self.accelerator.is_main_process:
            summary = {**{key: result[key] for key in ("pictures", "final", "curve")}, "pressure": self.recipe.pressure}
            if self.fitted:
                summary |= {"fit": self.fitted}
                write_prototypes(self.config.work, self.student.labels, self.train, self.fitted)
            student = dataclasses.replace(self.student, model=self._result.cpu()).with_report(alignment=summary)
            save(student, self.config.out, self.config.overwrite)
        self.accelerator.wait_for_everyone()
        return result


@torch.no_grad()
def _scales(model: nn.Module, relative: bool) -> tuple[float, ...]:
    """Root mean square of every parameter, or ones; at least the size that a layer names for what starts at zero."""
    named = {
        id(layer.get_parameter(name)): size
        for _, layer in scheduled_layers(model)
        for name, size in layer.natural_sizes.items()
    }
    # Never so small that a parameter could not leave zero.
    return tuple(
        max(float(p.square().mean().sqrt()), named.get(id(p), 1e-4)) if relative else 1.0 for p in model.parameters()
    )


def _arrived(phase: Phase, k: int, steps: int) -> bool:
    """Whether B and beta are at their ends at step `k`: before, the student is nearer to its teacher for free."""
    return k >= phase.ramp * steps or not phase.moving
