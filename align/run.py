"""A run: what it is asked for, what its parts share, and how far it came."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..convert import Student
from ..convert.layers import estimate_gains, estimate_statistics
from ..convert.methods import find_method
from ..convert.output import OutputKind, output_kind
from ..convert.taps import first_tensor
from ..data.workers import STOP_SIGNALS
from ..evaluate.metrics.fidelity import fidelity, sameness
from . import state
from .log import write_row
from .pictures import Pictures
from .prepare import without_checkpointing
from .recipe import Phase, Recipe
from .schedule import Walk
from .sheets import EXPLANATIONS, ExplainedPictures, explained_pictures
from .trackers import log_picture

if TYPE_CHECKING:
    from .callbacks import Callback
    from .log import PhaseLog
    from .phases import Stepper

__all__ = ["AlignConfig", "Learner", "Run", "signals_noted"]


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
        trackers: names of trackers that show what metrics.jsonl holds.
        stream: read `data` from front to end and keep nothing of it (see `stream`); `val` is then needed.
        cache: where remote shards are kept; None is the user's cache.
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
    trackers: tuple[str, ...] = ()
    stream: bool = False
    cache: Path | None = None

    @property
    def work(self) -> Path:
        return self.out.with_name(f"{self.out.name}.run")


class Learner:
    """A student while it is trained: the weights that learn, and their moving average.

    Attributes:
        model: the student's, whose trained part alone asks for gradients.
    """

    def __init__(self, student: Student, decay: float, device: torch.device) -> None:
        """Args: decay: of the moving average; 0 for none."""
        self.model = student.model.to(device).requires_grad_(False)
        # What is not trained gets no gradient at all, so that not even one is computed.
        self.model.get_submodule(find_method(student.method).trains).requires_grad_(True)
        self.decay = decay
        self._moving: ModelEmaV3 | None = None

    @property
    def average(self) -> nn.Module | None:
        """The student with its averaged weights, where there is one."""
        return None if self._moving is None else self._moving.module

    @property
    def result(self) -> nn.Module:
        """What is measured and saved: the average where there is one."""
        return self.model if self.average is None else self.average

    def begin(self) -> None:
        """At the start of a phase the average begins anew."""
        # Buffers are copied: a mean over a moving B would be the B of no function that was ever trained.
        self._moving = ModelEmaV3(self.model, decay=self.decay, exclude_buffers=True) if self.decay else None

    def restore(self, checkpoint: Path) -> None:
        """All weights as they were."""
        self.begin()
        state.restore(checkpoint, self.model, self.average)

    def stepped(self) -> None:
        """After a step of the optimizer."""
        if self._moving is not None:
            self._moving.update(self.model)

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of the weights that are measured."""
        return state.snapshot(self.result)

    def go_back(self, weights: dict[str, Tensor]) -> None:
        """The student as it was when `snapshot` gave these weights."""
        for model in dict.fromkeys((self.model, self.result)):
            model.load_state_dict(weights)


@dataclasses.dataclass(eq=False)
class Run:
    """A run of `align`; all that changes on the way is here or in the parts named here.

    Attributes:
        student: as it was loaded; its model is the one that `learner` trains.
        progress: what a checkpoint says of where the run is.
        callbacks: what is done after a step where it is due, in this order.
        checkpoint: what a resumed run goes on from.
        stepper, log: of the phase that runs.
        walk: how far the phase has come along its path, under a floor (`Recipe.keep`).
        over: the phase ends after the step just taken.
        guarded: held-out agreement fell below `Recipe.min_agreement`, which ends the run.
        stopped: a signal ended the run; its last step is in a checkpoint.
        signals: numbers of the stop signals that came.
        seconds: spent on steps.
        fitted: what a phase that solves found.
    """

    config: AlignConfig
    accelerator: Accelerator
    student: Student
    teacher: nn.Module
    pictures: Pictures
    learner: Learner
    progress: state.Progress
    callbacks: list[Callback] = dataclasses.field(default_factory=list)
    checkpoint: Path | None = None
    stepper: Stepper | None = None
    log: PhaseLog | None = None
    walk: Walk | None = None
    over: bool = False
    guarded: bool = False
    stopped: bool = False
    signals: list[int] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    fitted: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        return self.config.recipe

    @property
    def phase(self) -> Phase:
        return self.recipe.phases[self.progress.phase]

    @property
    def steps(self) -> int:
        """Steps of the phase, if nothing ends it early."""
        return self.recipe.steps[self.progress.phase]

    def outputs(self, model: nn.Module) -> Tensor:
        """(N, D): what `model` makes of the N held-out pictures."""
        return torch.cat([first_tensor(model(batch)) for batch in self.pictures.held_out()])

    @functools.cached_property
    def teacher_outputs(self) -> Tensor:
        return self.outputs(self.teacher)

    @functools.cached_property
    def output(self) -> OutputKind:
        return output_kind(self.student)

    @functools.cached_property
    def explained(self) -> ExplainedPictures:
        """The held-out pictures that are explained as the run goes."""
        return explained_pictures(self.teacher, self.pictures, self.output)

    @torch.no_grad()
    def evaluate(self, **notes: Any) -> None:
        """Adds a point, with `notes` on it, to the curve of held-out fidelity; only the main process measures."""
        if not self.accelerator.is_main_process:
            return
        progress = self.progress
        found = fidelity(self.outputs(self.learner.result), self.teacher_outputs, self.output.chooses)
        begun = {"phase": progress.phase, "objective": self.phase.objective}
        where = begun if progress.step else {"phase": "start"}
        point = {"pictures": progress.step * self.recipe.batch_size, **where, **notes, **found}
        write_row(self, {"held_out": point}, progress.step)
        if not self.config.quiet:
            shown = ", ".join(f"{name} {value:.3f}" for name, value in point.items() if isinstance(value, float))
            tqdm.write(f"{point['pictures']:>8} pictures: {shown}", file=sys.stderr)
        if not progress.curve and (same := sameness(self.teacher_outputs, self.output.chooses)):
            warnings.warn(f"held-out agreement says little: {same}. Hold out more and other pictures.", stacklevel=2)
        progress.curve = (*progress.curve, point)

    def newest(self, *names: str) -> float:
        """The first of `names` that the newest evaluation has: the main process has made it, and tells all others."""
        point = self.progress.curve[-1] if self.accelerator.is_main_process else {}
        value = next((point[name] for name in names if name in point), 0.0)
        told = broadcast(torch.tensor(value, dtype=torch.float64, device=self.accelerator.device))
        assert isinstance(told, Tensor)
        return float(told)

    def agreement(self) -> float:
        """Held-out agreement at the newest evaluation: top-1, or the centred cosine where there are no classes."""
        return self.newest("top1_agreement", "centred_cosine")

    def explain(self) -> None:
        """Writes and logs a sheet of explanations; only the main process explains."""
        if not self.accelerator.is_main_process:
            return
        model, pictures = self.learner.result, self.progress.step * self.recipe.batch_size
        explained = self.explained
        library = self.student.source.library
        with without_checkpointing(model, library) if self.recipe.gradient_checkpointing else contextlib.nullcontext():
            sheet = explained.write(model, self.config.work / EXPLANATIONS / f"{pictures:08d}.png")
        if sheet is not None:
            log_picture(self.accelerator, EXPLANATIONS, sheet, self.progress.step)

    def settle_statistics(self, everything: bool = False) -> None:
        """Statistics and gains of the student as it is now, alike in every process.

        Of what is measured; or of `everything`, where there is an average beside the weights that learn.
        """
        if not (self.phase.batch_statistics or self.phase.reference_gains):
            return
        batches = self.pictures.statistics()
        models = (self.learner.model, self.learner.result) if everything else (self.learner.result,)
        for model in dict.fromkeys(models):
            if self.phase.batch_statistics:
                estimate_statistics(model, batches)
            if self.phase.reference_gains:
                estimate_gains(model, self.teacher, batches)

    def asked_to_stop(self) -> bool:
        """Whether any process was sent a stop signal; all agree, as they ask each other at the same steps."""
        if self.accelerator.num_processes == 1:
            return bool(self.signals)
        if self.progress.step % self.recipe.log_every:
            return False
        noted = torch.tensor(float(len(self.signals)), device=self.accelerator.device)
        total = self.accelerator.reduce(noted, "sum")
        assert isinstance(total, Tensor)
        return bool(total > 0)


@contextlib.contextmanager
def signals_noted(noted: list[int]) -> Iterator[None]:
    """Inside, stop signals are `noted`, and end nothing: SIGTERM, SIGUSR1 (what Slurm sends before it takes a node
    away), SIGHUP (the terminal is gone), and one Ctrl-C. A second Ctrl-C ends the run where it is. SIGHUP and
    SIGINT that are ignored outside (nohup, a shell's background) are ignored inside; SIGUSR1 is noted all the same, as
    a launcher that ignores it (`slurm.sh`) hands that down.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return

    def note(number: int, frame: object) -> None:
        if number == signal.SIGINT and number in noted:
            raise KeyboardInterrupt
        noted.append(number)

    quiet = [n for n in (signal.SIGINT, getattr(signal, "SIGHUP", None)) if n and signal.getsignal(n) == signal.SIG_IGN]
    heard = [number for number in STOP_SIGNALS if number not in quiet]
    before = {number: signal.signal(number, note) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
