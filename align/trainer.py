"""The alignment loop: a frozen teacher, a student, unlabelled pictures, phases.

One process or many (`accelerate launch`): every process makes its own slice of each global batch, and only the
objective around the student is prepared by accelerate (preparing the data too would split it twice). Both models stay
in eval mode, as they are compared as functions: no dropout, and batch statistics only where a phase asks for them.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
import math
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..convert import Student, calibrate, load, reload_teacher, save, set_strength
from ..convert.files import check_free, new_file
from ..convert.layers import batch_statistics, estimate_statistics, scheduled_layers
from ..errors import BcosifyError, CheckpointError, DataError, RecipeError
from . import state
from .fidelity import fidelity
from .loader import Augment, BadSamples, held_out_batches, to_model_input, training_batches
from .objectives import OBJECTIVES, Objective, observe
from .recipe import Phase, Recipe, difference, dump, load_recipe
from .schedule import learning_rate, ramp
from .shards import ShardIndex, expand, index_shards, overlap, split
from .taps import first_tensor

__all__ = ["AlignConfig", "align"]

STOP_SIGNALS = (signal.SIGTERM, *((signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ()))
# The student that is measured and saved has statistics of so many pictures, in batches of this size.
STATISTICS_PICTURES, STATISTICS_BATCH = 256, 32


@dataclasses.dataclass(frozen=True)
class AlignConfig:
    """Where a run reads and writes.

    Attributes:
        run: folder of a converted model.
        data, val: shards (brace syntax, globs, folders); without `val`, some pictures of `data` are held out.
        out: the aligned model; `<out>.run` beside it holds recipe.yaml, metrics.jsonl and checkpoints.
        resume: go on from the newest complete checkpoint.
        init_from: another student of the same conversion, whose weights the run starts from.
        weights: the teacher's own state dict, where it was converted from one and is no longer in the student.
    """

    run: Path
    data: str
    out: Path
    recipe: Recipe
    val: str | None = None
    resume: bool = False
    overwrite: bool = False
    quiet: bool = False
    weights: Path | None = None
    init_from: Path | None = None

    @property
    def work(self) -> Path:
        return self.out.with_name(f"{self.out.name}.run")


def align(config: AlignConfig) -> dict[str, Any]:
    """Aligns the student in `config.run` to its teacher and saves it to `config.out`.

    Returns:
        `out`, `recipe`, `curve` (held-out fidelity over pictures seen), `start`, `final`, `bad_pictures`.

    Raises:
        RecipeError, DataError, CheckpointError, SourceError: all before the first step, but for broken pictures
        (DataError)
            and a loss that is no number any more (BcosifyError).
    """
    recipe = config.recipe
    accelerator = _accelerator(recipe)
    check_free(config.out, config.overwrite)
    student = load(config.run)
    teacher = _teacher(student, config.weights)
    _start_from(student, config.init_from)
    if recipe.gradient_checkpointing:
        _checkpoint_gradients(student.model)
    train, val = _data(config)
    resumed = _prepare_folder(config, accelerator, train)
    run = _Run(config, accelerator, student, teacher.to(accelerator.device), train, val)
    progress = resumed[1] if resumed else state.Progress(0, 0, train.digest)
    if resumed is None:
        run.write_row({"run": {"processes": accelerator.num_processes, "device": str(accelerator.device)}})
        progress = run.evaluated(progress, {"phase": "start"})
    else:
        state.restore(resumed[0], student.model, None)
    first = 0
    with _signals_noted() as run.signals:
        for number, (phase, steps) in enumerate(zip(recipe.phases, recipe.steps, strict=True)):
            if progress.step < first + steps and not run.stopping:
                inside = resumed is not None and progress.step > first
                progress = run.phase(number, phase, first, steps, progress, resumed[0] if resumed and inside else None)
                resumed = None
            first += steps
    result = run.summary(progress) if run.stopping else run.finish(progress)
    accelerator.end_training()
    return result


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
        train: ShardIndex,
        val: ShardIndex,
    ) -> None:
        self.config, self.recipe, self.accelerator = config, config.recipe, accelerator
        self.student, self.teacher = student, teacher
        self.model = student.model.to(accelerator.device).requires_grad_(True)
        self.train, self.val = train, val
        self.bad = BadSamples(train, config.work / "bad_samples.jsonl", config.recipe.max_bad)
        self.classifier = student.labels is not None
        self.seconds, self.seen = 0.0, 0
        self._teacher_outputs: Tensor | None = None
        self.signals: list[int] = []
        self.stopping = False

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

    # ------------------------------------------------------------------------------------------------ training

    def phase(
        self, number: int, phase: Phase, first: int, steps: int, progress: state.Progress, checkpoint: Path | None
    ) -> state.Progress:
        """Runs one phase from `progress.step` to its end."""
        begin = progress.step - first
        objective = OBJECTIVES[phase.objective](self.model, self.recipe)
        gain_pictures = (
            self._calibration_pictures(phase.calibrate or 64) if _needs_pictures(phase, self.recipe) else None
        )
        if gain_pictures is not None:
            objective.centre_on(*observe(self.teacher, gain_pictures, objective.taps))

        def gains() -> None:
            assert gain_pictures is not None
            calls, _ = observe(self.teacher, gain_pictures, objective.taps)
            run = functools.partial(objective.run, gain_pictures, calls)
            calibrate(self.model, self.teacher, gain_pictures, phase.gain, run)

        if checkpoint is None:
            self._move(phase, 0, steps)
            if phase.calibrate:
                gains()
            progress = dataclasses.replace(progress, scales=_scales(self.model, phase.relative))
        optimizer = torch.optim.AdamW(
            [{"params": [p], "scale": s} for p, s in zip(self.model.parameters(), progress.scales, strict=True)],
            lr=phase.learning_rate,
            weight_decay=self.recipe.weight_decay,
            betas=self.recipe.betas,
        )
        if checkpoint is not None:
            state.restore(checkpoint, self.model, optimizer)
        prepared, optimizer = self.accelerator.prepare(objective, optimizer)
        log = _Log(self, number, phase, optimizer)
        for k, batch in enumerate(self._batches(progress.step, first + steps), start=begin):
            self._move(phase, k, steps)
            if k and phase.recalibrate_every and k % phase.recalibrate_every == 0 and k <= phase.ramp * steps:
                gains()
            self.bad.add(batch.bad)
            for group in optimizer.param_groups:
                rate = learning_rate(k, steps, phase.learning_rate, phase.warmup, phase.final_learning_rate)
                group["lr"] = rate * group["scale"]
            optimizer.zero_grad()
            losses = self._backward(phase, objective, prepared, self._normalised(batch.pictures))
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), phase.clip)
            optimizer.step()
            progress = dataclasses.replace(progress, step=first + k + 1, phase=number)
            log.step(progress, losses, norm)
            last = k + 1 == steps
            if last or self._due(progress.step, self.recipe.evaluate_every):
                if phase.batch_statistics:
                    self._settle_statistics()
                progress = self.evaluated(progress, {"phase": number, "objective": phase.objective})
            self.stopping = self._asked_to_stop(progress.step)
            if last or self.stopping or self._due(progress.step, self.recipe.checkpoint_every):
                log.check(progress, losses, norm)
                self._checkpoint(optimizer, progress)
            if self.stopping:
                break
        log.close()
        return progress

    def _backward(self, phase: Phase, objective: Objective, prepared: nn.Module, pictures: Tensor) -> dict[str, Tensor]:
        """Adds the gradient of this process's pictures, part by part; returns the losses over all parts, detached."""
        parts = pictures.chunk(self.recipe.accumulate)
        sums: dict[str, Tensor] = {}
        statistics = batch_statistics(self.model) if phase.batch_statistics else contextlib.nullcontext()
        with statistics:
            for i, part in enumerate(parts):
                share = len(part) / len(pictures)
                last = i + 1 == len(parts)
                with contextlib.nullcontext() if last else self.accelerator.no_sync(prepared):
                    with self.accelerator.autocast():
                        calls, output = observe(self.teacher, part, objective.taps)
                        losses = prepared(part, calls, output)
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
            size=self.recipe.image_size,
            augment=self._augment(),
            workers=self.recipe.workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        return iter(batches)

    def _settle_statistics(self) -> None:
        """Running statistics of the student as it is now, alike in every process."""
        pictures = self._calibration_pictures(STATISTICS_PICTURES)
        estimate_statistics(self.model, pictures.split(STATISTICS_BATCH))

    def _move(self, phase: Phase, k: int, steps: int) -> None:
        """B and beta of step `k`."""
        set_strength(self.model, *(ramp(k, steps, *ends, phase.ramp) for ends in (phase.b, phase.beta)))

    def _due(self, step: int, every: int) -> bool:
        """Whether `every` pictures went by within this step."""
        return step * self.recipe.batch_size // every > (step - 1) * self.recipe.batch_size // every

    def _checkpoint(self, optimizer: torch.optim.Optimizer, progress: state.Progress) -> None:
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            state.write(self.config.work / "checkpoints", self.model, optimizer, progress)
        self.accelerator.wait_for_everyone()

    # ------------------------------------------------------------------------------------------------ measuring

    @torch.no_grad()
    def evaluated(self, progress: state.Progress, where: dict[str, Any]) -> state.Progress:
        """`progress` with one more point on its curve; only the main process measures."""
        if not self.accelerator.is_main_process:
            return progress
        theirs = self._teacher_outputs
        batches = held_out_batches(self.val, size=self.recipe.image_size, workers=0)
        pictures = [self._normalised(batch.pictures) for batch in batches]
        if theirs is None:
            theirs = self._teacher_outputs = torch.cat([first_tensor(self.teacher(batch)) for batch in pictures])
        ours = torch.cat([first_tensor(self.model(batch)) for batch in pictures])
        point = {"pictures": progress.step * self.recipe.batch_size, **where, **fidelity(ours, theirs, self.classifier)}
        self.write_row({"held_out": point})
        if not self.config.quiet:
            shown = ", ".join(f"{name} {value:.3f}" for name, value in point.items() if isinstance(value, float))
            tqdm.write(f"{point['pictures']:>8} pictures: {shown}", file=sys.stderr)
        return dataclasses.replace(progress, curve=(*progress.curve, point))

    def write_row(self, row: dict[str, Any]) -> None:
        """Appends to metrics.jsonl (main process)."""
        if self.accelerator.is_main_process:
            with (self.config.work / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")

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
        }

    def finish(self, progress: state.Progress) -> dict[str, Any]:
        """Saves the aligned student; returns the summary."""
        result = self.summary(progress)
        if self.accelerator.is_main_process:
            summary = {**{key: result[key] for key in ("pictures", "final", "curve")}, "pressure": self.recipe.pressure}
            self.model.cpu()
            save(self.student.with_report(alignment=summary), self.config.out, self.config.overwrite)
        self.accelerator.wait_for_everyone()
        return result


class _Log:
    """Losses since the last row, read from the device once a row; the progress bar; the guard against NaN."""

    def __init__(self, run: _Run, number: int, phase: Phase, optimizer: torch.optim.Optimizer) -> None:
        self.run, self.number, self.phase, self.optimizer = run, number, phase, optimizer
        self.total: Tensor | None = None
        self.count, self.since = 0, time.monotonic()
        steps = run.recipe.steps[number]
        self.bar = tqdm(
            total=steps * run.recipe.batch_size,
            unit="img",
            desc=f"phase {number + 1}/{len(run.recipe.phases)} {phase.objective}",
            disable=True if run.config.quiet or not run.accelerator.is_main_process else None,
        )

    def step(self, progress: state.Progress, losses: dict[str, Tensor], norm: Tensor | float | None) -> None:
        batch = self.run.recipe.batch_size
        if self.count == 0 and self.bar.n == 0:
            first = sum(self.run.recipe.steps[: self.number])
            self.bar.update((progress.step - first - 1) * batch)
        self.bar.update(batch)
        loss = losses["total"].detach()
        self.total = loss if self.total is None else self.total + loss
        self.count += 1
        if progress.step % self.run.recipe.log_every == 0 or progress.step == sum(
            self.run.recipe.steps[: self.number + 1]
        ):
            self._row(progress, losses, norm)

    def _row(self, progress: state.Progress, losses: dict[str, Tensor], norm: Tensor | float | None) -> None:
        assert self.total is not None
        total = self.run.accelerator.reduce(self.total, "mean")
        assert isinstance(total, Tensor)
        mean = float(total) / self.count
        self.check(progress, losses, norm, mean)
        now = time.monotonic()
        elapsed, self.since = now - self.since, now
        self.run.seconds += elapsed
        rate = self.count * self.run.recipe.batch_size / max(elapsed, 1e-9)
        row = {
            "step": progress.step,
            "pictures": progress.step * self.run.recipe.batch_size,
            "phase": self.number,
            "objective": self.phase.objective,
            "loss": mean,
            "learning_rate": self.optimizer.param_groups[0]["lr"] / self.optimizer.param_groups[0]["scale"],
            "gradient_norm": None if norm is None else float(norm),
            **_strengths(self.run.model),
            "pictures_per_second": round(rate, 2),
        }
        self.run.write_row(row)
        self.bar.set_postfix_str(f"loss {mean:.4f}")
        self.total, self.count = None, 0

    def check(
        self,
        progress: state.Progress,
        losses: dict[str, Tensor],
        norm: Tensor | float | None,
        mean: float | None = None,
    ) -> None:
        """Raises BcosifyError where loss or gradient are no numbers any more: before a row, and before a checkpoint."""
        loss = float(losses["total"].detach()) if mean is None else mean
        if math.isfinite(loss) and (norm is None or math.isfinite(float(norm))):
            return
        worst = [name for name, value in losses.items() if name != "total" and not bool(torch.isfinite(value))]
        found = state.latest(self.run.config.work / "checkpoints")
        kept = f"the last good checkpoint is {found[0]}" if found else "there was no checkpoint yet"
        raise BcosifyError(
            f"the loss is {loss} at step {progress.step}, the gradient's norm {norm if norm is None else float(norm)} "
            f"(loss not finite in: {', '.join(worst) or 'an earlier step'}; largest gradient: "
            f"{_largest_gradient(self.run.model)}); {kept}. Start again with a lower learning rate "
            f"(--set phases.{self.number}.learning_rate=...)."
        )

    def close(self) -> None:
        self.bar.close()


@torch.no_grad()
def _largest_gradient(model: nn.Module) -> str:
    """Name of the parameter whose gradient is largest; one that is no number counts as largest."""
    sizes = {name: float(p.grad.abs().max()) for name, p in model.named_parameters() if p.grad is not None}
    return max(sizes, key=lambda name: math.inf if math.isnan(sizes[name]) else sizes[name], default="none")


@torch.no_grad()
def _scales(model: nn.Module, relative: bool) -> tuple[float, ...]:
    """Root mean square of every parameter, or ones; never so small that a parameter could not leave zero."""
    return tuple(max(float(p.square().mean().sqrt()), 1e-4) if relative else 1.0 for p in model.parameters())


def _needs_pictures(phase: Phase, recipe: Recipe) -> bool:
    return bool(phase.calibrate or recipe.centre)


def _strengths(model: nn.Module) -> dict[str, float]:
    """B and beta as they stand; the largest where layers differ."""
    values: dict[str, float] = {}
    for _, layer in scheduled_layers(model):
        for name, value in layer.strengths().items():
            values[name] = max(value, values.get(name, value))
    return values


def _accelerator(recipe: Recipe) -> Accelerator:
    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    precision = ("bf16" if bf16 else "no") if recipe.precision == "auto" else recipe.precision
    # Units that a phase does not touch have no gradient; buffers are set alike in every process.
    ddp = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
    return Accelerator(mixed_precision=precision, cpu=not torch.cuda.is_available(), kwargs_handlers=[ddp])


def _teacher(student: Student, weights: Path | None) -> nn.Module:
    """The frozen original: a copy of the student while it is still identical, else from its source."""
    at_start = all(value == 1 for _, layer in scheduled_layers(student.model) for value in layer.strengths().values())
    identical = at_start and not {"calibration", "alignment"} & set(student.report)
    model = copy.deepcopy(student.model) if identical else reload_teacher(student.source, weights).model
    return model.eval().requires_grad_(False)


def _start_from(student: Student, folder: Path | None) -> None:
    """Takes the weights of another student of the same source and plan."""
    if folder is None:
        return
    other = load(folder)
    ours, theirs = ((s.source.architecture, s.plan.digest) for s in (student, other))
    if ours != theirs:
        raise CheckpointError(
            f"--init-from {folder}: a student of {other.source.reference} by another plan than that of "
            f"{student.source.reference}. Convert both with the same options."
        )
    student.model.load_state_dict(other.model.state_dict())


def _checkpoint_gradients(model: nn.Module) -> None:
    """Turns on the source library's own gradient checkpointing."""
    for name in ("set_grad_checkpointing", "gradient_checkpointing_enable"):
        for module in model.modules():
            if hasattr(module, name):
                getattr(module, name)()
                return
    raise RecipeError(
        f"gradient_checkpointing: {type(model).__name__} does not know it. Take it out, and use accumulate."
    )


def _data(config: AlignConfig) -> tuple[ShardIndex, ShardIndex]:
    train = index_shards(expand(config.data), progress=not config.quiet)
    if config.val is not None:
        val = index_shards(expand(config.val), progress=not config.quiet)
        if same := overlap(train, val):
            shown = ", ".join(f"{ours} = {theirs}" for ours, theirs in same[:5])
            raise DataError(
                f"--val is no measure: {len(same)} of its pictures are in --data too ({shown}). Take them out "
                "of one of the two, or leave --val out, and some pictures of --data are held out."
            )
        return train, val
    return split(train, config.recipe.held_out, config.recipe.seed)


def _prepare_folder(
    config: AlignConfig, accelerator: Accelerator, train: ShardIndex
) -> tuple[Path, state.Progress] | None:
    """Makes `work`, or checks that it belongs to the same run; returns the checkpoint to go on from."""
    written = config.work / "recipe.yaml"
    if config.resume and written.is_file():
        changed = difference(load_recipe(written), config.recipe)
        if changed:
            raise RecipeError(
                f"--resume goes on with the recipe that the run was started with; this one differs:\n{changed}"
            )
        found = state.latest(config.work / "checkpoints")
        if found and found[1].data != train.digest:
            raise RecipeError(
                f"--resume: {config.data} is not the data that the run was started with (its index differs)."
            )
        if found:
            _cut_metrics(config.work / "metrics.jsonl", found[1].step, config.recipe.batch_size, accelerator)
            return found
    elif config.resume:
        raise CheckpointError(f"--resume: there is no run in {config.work}. Leave --resume out to start one.")
    elif written.is_file() and not config.overwrite:
        raise CheckpointError(
            f"{config.work} holds an earlier run. Pass --resume to go on, --overwrite, or another --out."
        )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        config.work.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "bad_samples.jsonl"):
            (config.work / name).unlink(missing_ok=True)
        shutil.rmtree(config.work / "checkpoints", ignore_errors=True)
        with new_file(written) as scratch:
            scratch.write_text(dump(config.recipe))
    accelerator.wait_for_everyone()
    return None


def _cut_metrics(path: Path, step: int, batch_size: int, accelerator: Accelerator) -> None:
    """Drops rows from after the checkpoint: the resumed run writes them again."""
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and path.is_file():
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        kept = [r for r in rows if r.get("pictures", r.get("held_out", {}).get("pictures", 0)) <= step * batch_size]
        with new_file(path) as scratch:
            scratch.write_text("".join(json.dumps(row) + "\n" for row in kept))
    accelerator.wait_for_everyone()
