"""Trackers beside metrics.jsonl, through accelerate: TensorBoard, Weights & Biases, Trackio.

metrics.jsonl is the record, and is always written; a tracker shows the same rows, and pictures, while a run goes. Steps
are those of the run, also after a resume. What an interrupted run logged after its last checkpoint is logged again:
TensorBoard purges the old rows, Weights & Biases keeps the first (they are equal), Trackio keeps both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from PIL import Image

from ..core.errors import BcosifyError, near_miss
from .recipe import Recipe
from .state import Progress

__all__ = ["TRACKED", "check_trackers", "log_picture", "scalars", "start_trackers"]

PROJECT = "bcosify"
TRACKED = "trackers"  # folder inside a run's


def check_trackers(names: Iterable[str]) -> None:
    """Raises BcosifyError for a tracker that is not known, or not installed."""
    available = {str(tracker) for tracker in get_available_trackers()}
    for name in names:
        if name not in SHOW:
            raise BcosifyError(
                f"--tracker {name}: no such tracker.{near_miss(name, SHOW)} There are: {', '.join(SHOW)}."
            )
        if name not in available:
            raise BcosifyError(
                f"--tracker {name}: it is not installed. Nothing was written. Type `pip install {name}`, or leave the "
                "tracker out: metrics.jsonl holds the same rows."
            )


def start_trackers(accelerator: Accelerator, recipe: Recipe, out: Path, work: Path, progress: Progress) -> None:
    """Opens the trackers that `accelerator` was made with, at the step where the run is (main process).

    Raises BcosifyError where one of them refuses. What it said is not repeated: it may hold a key.
    """
    if not accelerator.log_with or not accelerator.is_main_process:
        return
    folder = work / TRACKED
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{out.absolute().parent.name}/{out.name}"
    options = {
        "tensorboard": {"purge_step": progress.step + 1},
        "wandb": {"id": progress.run_id, "name": name, "resume": "allow", "dir": str(folder)},
        "trackio": {"name": f"{name} {progress.run_id}", "resume": "allow"},
    }
    try:
        settings = None if progress.step else dict(_flat(dataclasses.asdict(recipe)))
        accelerator.init_trackers(PROJECT, settings, options)
    except Exception as error:
        raise BcosifyError(
            f"--tracker {' '.join(map(str, accelerator.log_with))}: it could not be started ({type(error).__name__}). "
            "Log in first (`wandb login`), or work without the network (WANDB_MODE=offline), or leave the tracker out."
        ) from error


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row of metrics.jsonl, by the names that trackers group them under."""
    grouped = {key: value if isinstance(value, dict) else {} for key, value in row.items()}
    grouped["train"] = {key: value for key, value in row.items() if not isinstance(value, dict)}
    return {
        f"{group}/{key}": value
        for group, values in grouped.items()
        for key, value in values.items()
        if isinstance(value, int | float)
    }


def log_picture(accelerator: Accelerator, name: str, picture: Image.Image, step: int) -> None:
    """Shows `picture` in every tracker that was started."""
    pixels = np.asarray(picture.convert("RGB"))
    for tracker in accelerator.trackers:
        SHOW[tracker.name](tracker, name, pixels, step)


def _flat(values: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Nested settings by dotted names, as --set takes them; what is no plain value as text."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Sequence) and value and isinstance(value[0], dict):
            for number, item in enumerate(value):
                yield from _flat(item, f"{name}.{number}.")
        else:
            yield name, value if isinstance(value, bool | int | float | str) else str(value)


# Pictures (H, W, 3) uint8. accelerate has one `log_images` for them, but its trackers want different shapes.


def _in_tensorboard(tracker: Any, name: str, pixels: np.ndarray, step: int) -> None:
    tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")


def _in_wandb(tracker: Any, name: str, pixels: np.ndarray, step: int) -> None:
    tracker.log_images({name: [pixels]}, step=step)


def _in_trackio(tracker: Any, name: str, pixels: np.ndarray, step: int) -> None:
    import trackio  # type: ignore[import-not-found]

    tracker.log({name: trackio.Image(pixels)}, step=step)


SHOW: dict[str, Callable[[Any, str, np.ndarray, int], None]] = {
    "tensorboard": _in_tensorboard,
    "wandb": _in_wandb,
    "trackio": _in_trackio,
}
