"""What a run says while it goes: rows of metrics.jsonl, the progress bar, and the guard against NaN."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from ..convert.layers import scheduled_layers
from ..core.errors import BcosifyError
from ..core.files import json_text
from . import state
from .distributed import Prepared
from .trackers import scalars

if TYPE_CHECKING:
    from .run import Run

__all__ = ["METRICS", "PhaseLog", "strengths", "write_row"]

METRICS = "metrics.jsonl"


def write_row(run: Run, row: dict[str, Any], step: int) -> None:
    """Appends one row to metrics.jsonl, and shows it in the trackers as of `step` (main process)."""
    if run.accelerator.is_main_process:
        with (run.config.work / METRICS).open("a") as file:
            file.write(json_text(row) + "\n")
        run.accelerator.log(scalars(row), step=step)


class PhaseLog:
    """Losses since the last row, read from the device once a row; the progress bar; the guard against NaN."""

    def __init__(self, run: Run, prepared: Prepared, progress: state.Progress) -> None:
        number = progress.phase
        self.run, self.recipe, self.number, self.phase = run, run.recipe, number, run.recipe.phases[number]
        self.model, self.optimizer = prepared.model, prepared.optimizer
        self.end = progress.first + self.recipe.steps[number]
        self.total: Tensor | None = None
        self.count, self.since, self.seconds = 0, time.monotonic(), 0.0
        self.bar = tqdm(
            total=self.recipe.steps[number] * self.recipe.batch_size,
            unit="img",
            desc=f"phase {number + 1}/{len(self.recipe.phases)} {self.phase.objective}",
            disable=True if run.config.quiet or not run.accelerator.is_main_process else None,
        )

    def step(self, progress: state.Progress, losses: dict[str, Tensor], norm: Tensor | float | None) -> None:
        batch = self.recipe.batch_size
        if self.count == 0 and self.bar.n == 0:
            self.bar.update((progress.step - progress.first - 1) * batch)
        self.bar.update(batch)
        loss = losses["total"].detach()
        self.total = loss if self.total is None else self.total + loss
        self.count += 1
        if progress.step % self.recipe.log_every == 0 or progress.step == self.end:
            self._row(progress, losses, norm)

    def _row(self, progress: state.Progress, losses: dict[str, Tensor], norm: Tensor | float | None) -> None:
        assert self.total is not None
        total = self.run.accelerator.reduce(self.total, "mean")
        assert isinstance(total, Tensor)
        mean = float(total) / self.count
        self.check(progress, losses, norm, mean)
        now = time.monotonic()
        elapsed, self.since = now - self.since, now
        self.seconds += elapsed
        rate = self.count * self.recipe.batch_size / max(elapsed, 1e-9)
        row = {
            "step": progress.step,
            "pictures": progress.step * self.recipe.batch_size,
            "phase": self.number,
            "objective": self.phase.objective,
            "loss": mean,
            "learning_rate": self.optimizer.param_groups[0]["lr"] / self.optimizer.param_groups[0]["scale"],
            "gradient_norm": None if norm is None else float(norm),
            **strengths(self.model),
            "pictures_per_second": round(rate, 2),
        }
        write_row(self.run, row, progress.step)
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
        found = state.newest(self.run.config.work / state.CHECKPOINTS)
        kept = f"the last good checkpoint is {found}" if found else "there was no checkpoint yet"
        raise BcosifyError(
            f"the loss is {loss} at step {progress.step}, the gradient's norm {norm if norm is None else float(norm)} "
            f"(loss not finite in: {', '.join(worst) or 'an earlier step'}; largest gradient: "
            f"{_largest_gradient(self.model)}); {kept}. Start again with a lower learning rate "
            f"(--set phases.{self.number}.learning_rate=...)."
        )

    def close(self) -> None:
        self.bar.close()


@torch.no_grad()
def _largest_gradient(model: nn.Module) -> str:
    """Name of the parameter whose gradient is largest; one that is no number counts as largest."""
    gradients = ((name, parameter.grad) for name, parameter in model.named_parameters())
    # Of a gradient in shards this process's part: the others may not have come to this line.
    here = ((name, g.to_local() if isinstance(g, DTensor) else g) for name, g in gradients if g is not None)
    sizes = {name: float(gradient.abs().max()) for name, gradient in here if gradient.numel()}
    return max(sizes, key=lambda name: math.inf if math.isnan(sizes[name]) else sizes[name], default="none")


def strengths(model: nn.Module) -> dict[str, float]:
    """B and beta as they stand; the largest where layers differ."""
    values: dict[str, float] = {}
    for _, layer in scheduled_layers(model):
        for name, value in layer.strengths().items():
            values[name] = max(value, values.get(name, value))
    return values
