"""What an evaluation found so far, kept in a folder step by step, so that what was stopped can go on."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from ..core.errors import CheckpointError, DataError, NotApplicable
from ..core.files import new_file
from .estimates import Estimate, bootstrap
from .progress import Progress
from .record import FILE, Curve, Evaluation, Measurement, Seconds, read_evaluation

__all__ = ["Notes", "check_work", "clear"]


class Notes:
    """Measurements, curves and seconds as they come in, after those that `folder` holds of the same evaluation.

    `facts` are what the evaluation is of (model, data, settings); steps of another one in the folder are thrown away.
    """

    def __init__(self, facts: dict[str, Any], folder: Path | None, seed: int, progress: bool) -> None:
        self.facts, self.folder, self.seed, self.progress = facts, folder, seed, Progress(progress)
        before = _before(folder, facts)
        self.measurements: list[Measurement] = list(before.measurements)
        self.curves: list[Curve] = list(before.curves)
        self.seconds: list[Seconds] = list(before.seconds)
        if folder is not None and not before.seconds:
            for stale in folder.glob("maps-*.safetensors"):
                stale.unlink()

    def evaluation(self) -> Evaluation:
        return Evaluation(
            **self.facts,
            measurements=tuple(self.measurements),
            curves=tuple(self.curves),
            seconds=tuple(self.seconds),
        )

    def step(self, name: str, run: Callable[[], None]) -> None:
        """Does a step that was not done before, and keeps what it found at once."""
        if self.done(name):
            return
        self.progress.begin(name)
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        took = Seconds(name, round(time.perf_counter() - wall, 2), round(time.process_time() - cpu, 2))
        self.seconds.append(took)
        if self.folder is not None:
            self.evaluation().write(self.folder)
        self.progress.end(name, took.wall)

    def done(self, name: str) -> bool:
        return any(known.step == name for known in self.seconds)

    def maps(self, model: str, method: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The maps by name that `make` gives, or gave before; empty where there are none, which is a row."""
        name = f"maps: {model}, {method}"
        path = None
        if self.folder is not None:
            path = self.folder / f"maps-{model}-{method}.safetensors".replace(" ", "-")
        if self.done(name):
            return load_file(path) if path is not None and path.is_file() else {}
        found: dict[str, Tensor] = {}

        def run() -> None:
            try:
                found.update(make())
            except NotApplicable as error:
                self.absent(Measurement("faithfulness", "maps", model, method), str(error))
                return
            if path is not None:
                with new_file(path) as scratch:
                    save_file({kind: maps.contiguous() for kind, maps in found.items()}, scratch)

        self.step(name, run)
        return found

    def absent(self, row: Measurement, reason: str) -> None:
        """Keeps that there is no such number, and why."""
        self.measurements.append(dataclasses.replace(row, value=None, reason=reason))

    def measure(self, row: Measurement, value: Callable[[], Tensor | Estimate]) -> None:
        """Keeps the estimate that `value` gives, or the mean of its tensor (N,), or why there is none."""
        try:
            found = value()
            estimate = found if isinstance(found, Estimate) else bootstrap(found, self.seed)
            self.measurements.append(row.holding(estimate))
        except NotApplicable as error:
            self.absent(row, str(error))


def check_work(folder: Path | None) -> None:
    """Raises CheckpointError where `folder`, for what is kept meanwhile, holds what no evaluation kept there."""
    if folder is not None and os.path.lexists(folder):
        others = sorted(path.name for path in folder.iterdir() if not _kept(path)) if folder.is_dir() else [folder.name]
        if others:
            raise CheckpointError(
                f"{folder} is where an evaluation keeps what it has done so far, but it holds {', '.join(others[:3])}. "
                "Nothing was written; move that away, or pass another --out."
            )


def clear(folder: Path) -> None:
    """Removes what an evaluation kept in `folder`, and the folder."""
    if folder.is_dir():
        for path in filter(_kept, folder.iterdir()):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        with contextlib.suppress(OSError):
            folder.rmdir()


def _kept(path: Path) -> bool:
    left = path.name.startswith(".") and path.suffix == ".tmp"  # of a step that was killed as it was written
    return left or path.name == FILE or (path.name.startswith("maps-") and path.suffix == ".safetensors")


def _before(folder: Path | None, facts: dict[str, Any]) -> Evaluation:
    """What `folder` holds of the evaluation with these facts; nothing where it holds none, or another one."""
    with contextlib.suppress(DataError):
        if folder is not None:
            found = read_evaluation(folder)
            if all(getattr(found, name) == json.loads(json.dumps(fact)) for name, fact in facts.items()):
                return found
    return Evaluation(**facts, measurements=())
